"""Names that would leave where they belong, in every field of every API that names a file, a model or a region.

Nothing is read or written outside of the repository, nothing dies, and no answer tells a path, a process or an address
(issue "Bad input"; spec H-216, H-223, R-014).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from forebay_server import ForebayServer
from http_models import wait_nothing_in_use, write_models
from http_wire import Answer, Ended, WireClient, get, infer, post

#: What stands where only the server may look; no answer may hold it.
SECRET = "b7f1-secret"

CORPUS = [
    *(
        "..",
        ".",
        "../secret",
        "..\\secret",
        "a/../../secret",
        "/etc/passwd",
        "//etc/passwd",
        "....//secret",
        "~/secret",
    ),
    *("%2e%2e/secret", "%2e%2e%2fsecret", "..%2fsecret", "..%00", "echo\0", "echo/../../secret", "echo%00.txt"),
    *("\u2024\u2024/secret", "\uff0e\uff0e\uff0fsecret", "..\u2215secret", "..;/secret", "C:\\secret"),
    *("\\\\host\\share", "file:///etc/passwd", "link/secret", "link", "x" * 300, "x/" * 200, "", " ", "\n", "\ud800"),
    *("/proc/self/environ", "/dev/stdin", "echo/1/../../../secret"),
]


@dataclass
class Target:
    """A server as it was at first."""

    server: ForebayServer
    ports: dict[str, int]
    pids: list[int]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("traversal")
    (directory / "secret").mkdir()
    (directory / "secret" / "config.pbtxt").write_text(f"# {SECRET}\nbackend: '{SECRET}'")
    repository = write_models(directory / "models")
    (repository / "link").symlink_to(directory / "secret")
    flags = (
        *("--model-control-mode=explicit", "--load-model=echo", "--load-model=strings", "--allow-client-shm=true"),
        *("--allow-sagemaker=true", "--sagemaker-port=0"),
    )
    with ForebayServer(repository, *flags) as found:
        yield Target(found, found.ports(), list(found.pids().values()))


def send(target: Target, message: bytes, service: str = "HTTPService") -> Answer | None:
    with WireClient(target.ports[service]) as wire:
        try:
            return wire.send(message).answer()
        except (Ended, ConnectionError):
            return None


def check(target: Target, answer: Answer | None, name: str) -> None:
    """Assert that an answer tells nothing that its client did not know, and that the server is alive."""
    if answer is None:
        return
    told = answer.body.decode(errors="replace").replace(json.dumps(name)[1:-1], "").replace(name, "")
    assert SECRET not in told
    tells_nothing(target, told)


def tells_nothing(target: Target, told: str) -> None:
    """Assert that a text holds no path of this machine, no process, no address and no name of our code."""
    found = re.search(
        r"/(?:tmp|work|root|home|usr|proc|dev|run|var|opt)/|0x[0-9a-f]{6,}|Traceback|\bpid\b|forebay\.", told
    )
    assert found is None, told
    assert not any(re.search(rf"\b{pid}\b", told) for pid in target.pids if pid > 9999), told


def in_path(name: str) -> list[str]:
    """Return how a name may stand in a path: as it is, as far as HTTP has bytes for it, and escaped."""
    raw = name.encode("utf-8", "surrogatepass")
    as_is = "".join(chr(byte) for byte in raw if 32 < byte != 127)
    return [part for part in (as_is, quote(raw, safe="")) if part != "echo"]


@pytest.mark.parametrize("name", CORPUS, ids=lambda name: repr(name)[:30])
def test_names_in_paths(target: Target, name: str) -> None:
    for part in in_path(name):
        for message in (
            *(
                get(f"/v2/models/{part}{rest}")
                for rest in ("", "/config", "/ready", "/stats", "/versions/1", "/trace/setting")
            ),
            *(post(f"/v2/models/{part}/{action}", b"{}") for action in ("infer", "generate", "generate_stream")),
            post(f"/v2/models/echo/versions/{part}/infer", b"{}"),
            post(f"/v2/models/{part}/trace/setting", b'{"trace_rate":"1"}'),
            *(post(f"/v2/repository/models/{part}/{verb}") for verb in ("load", "unload")),
            *(post(f"/v2/repository/{part}/{rest}") for rest in ("index", "models/echo/load")),
            get(f"/v2/systemsharedmemory/region/{part}/status"),
            get(f"/v2/cudasharedmemory/region/{part}/status"),
            post(f"/v2/systemsharedmemory/region/{part}/unregister"),
            get(f"/forebay/explain/{part}"),
            get(f"/{part}"),
        ):
            check(target, send(target, message), name)
        check(target, send(target, post(f"/models/{part}/invoke", b"{}"), "Sagemaker HTTPService"), name)


@pytest.mark.parametrize("name", CORPUS, ids=lambda name: repr(name)[:30])
def test_names_in_documents(target: Target, name: str) -> None:
    content = base64.b64encode(b"x").decode()
    override = json.dumps({"backend": "nonexist", "default_model_filename": name})
    labels = json.dumps({"backend": "nonexist", "output": [{"name": "O", "label_filename": name}]})
    backend = json.dumps({"backend": name, "runtime": name, "platform": name, "name": name})
    tensor = {"name": name, "datatype": "FP32", "shape": [1], "data": [1]}
    region = {"shared_memory_region": name, "shared_memory_byte_size": 4}
    good = {"name": "INPUT0", "datatype": "FP32", "shape": [1], "data": [1]}
    asked: list[tuple[str, object]] = [
        *(
            ("/v2/repository/models/victim/load", {"parameters": {"config": text}})
            for text in (override, labels, backend)
        ),
        ("/v2/repository/models/victim/load", {"parameters": {"config": override, f"file:{name}": content}}),
        ("/v2/repository/models/victim/load", {"parameters": {"config": override, f"file:1/{name}": content}}),
        ("/v2/repository/models/victim/load", {"parameters": {name: "x"}}),
        ("/v2/models/echo/infer", {"inputs": [tensor]}),
        ("/v2/models/echo/infer", {"inputs": [good], "outputs": [{"name": name}]}),
        ("/v2/models/echo/infer", {"id": name, "inputs": [good]}),
        ("/v2/models/echo/infer", {"parameters": {name: name}, "inputs": [good]}),
        ("/v2/models/echo/infer", {"inputs": [{**good, "data": None, "parameters": region}]}),
        ("/v2/models/echo/infer", {"inputs": [good], "outputs": [{"name": "OUTPUT0", "parameters": region}]}),
        ("/v2/models/echo/generate", {"INPUT0": 1, name: name}),
        ("/v2/systemsharedmemory/region/r/register", {"key": name, "byte_size": 1}),
        ("/v2/trace/setting", {"trace_file": name}),
        ("/v2/logging", {"log_file": name}),
    ]
    for path, document in asked:
        check(target, send(target, post(path, json.dumps(document).encode())), name)
        send(target, post("/v2/systemsharedmemory/unregister"))
    for hosted in ({"model_name": name, "url": "/nonexistent"}, {"model_name": "victim", "url": name}):
        answer = send(target, post("/models", json.dumps(hosted).encode()), "Sagemaker HTTPService")
        assert answer is None or answer.status != 200
        check(target, answer, name)


def test_nothing_was_loaded_and_nothing_is_missing(target: Target, tmp_path: Path) -> None:
    """Runs last: the models of before serve, and no other has come."""
    index = send(target, post("/v2/repository/index", b'{"ready":true}'))
    assert index is not None
    assert [entry["name"] for entry in index.json()] == ["echo", "strings"]
    answer = send(target, infer("echo", [("INPUT0", "FP32", [1], bytes(4))]))
    assert answer is not None
    assert answer.status == 200
    wait_nothing_in_use(target.server)


def test_errors_tell_no_paths(target: Target) -> None:
    """What clients can make the server say about itself, beside names of theirs."""
    victims = [
        *("nonexistent", "link", "victim"),
        *({"backend": "python"}, {"backend": "onnxruntime"}, {"backend": "pytorch"}, {"platform": "x"}, {}),
    ]
    for victim in victims:
        name, body = (
            (victim, b"")
            if isinstance(victim, str)
            else ("slow", json.dumps({"parameters": {"config": json.dumps(victim)}}).encode())
        )
        answer = send(target, post(f"/v2/repository/models/{name}/load", body))
        assert answer is not None
        tells_nothing(target, answer.body.decode())
    index = send(target, post("/v2/repository/index"))
    assert index is not None
    tells_nothing(target, index.body.decode())
    assert SECRET not in index.body.decode()
