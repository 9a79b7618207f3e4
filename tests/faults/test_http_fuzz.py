"""Malformed headers, JSON and binary layouts by the thousand, against a running server.

Whatever comes: no 5xx without a cause that the client is told, no hang, no slot that stays taken, no process that dies,
no memory that keeps growing. A few seconds by default; ``make fuzz`` runs for minutes (``FOREBAY_FUZZ_EXAMPLES``).
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server import ForebayServer
from http_models import wait_nothing_in_use, write_models
from http_wire import Answer, Ended, WireClient, chunked, get, infer, post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FOREBAY_FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
#: No answer takes longer, s; what waits for more bytes is told that there are none.
ANSWER_S = 20.0
#: All processes together may grow by so much, KiB: allocators keep some.
GROWTH_KIB = 200 * 1024

pytestmark = pytest.mark.timeout(max(120, EXAMPLES))

#: How a 5xx begins that names its cause; the client's own mistakes too, where Triton says 500 (spec H-002).
CAUSES = re.compile(
    r"failed to (parse|get|load|reserve)|Unable to (parse|set|open)|attempt to |Shape does not|unexpected error on|"
    r"Converting keyword|Expected JSON object|shared memory size|shared memory region|explicit model load|"
    r"'repository_name' spec|trace file location|log file location|invalid argument for --log_format|"
    r"Unsupported compression|only the transfer encoding|HTTP version not supported|HTTP end point|"
    r"incomplete requests of all clients|not enough shared memory|failed to open"
)

# --- what is sent ---

NUMBERS = st.integers(-3, 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63) - 1, 10**30]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=6)
VOCABULARY = st.sampled_from(
    [
        *(
            "id",
            "inputs",
            "outputs",
            "parameters",
            "name",
            "datatype",
            "shape",
            "data",
            "binary_data_size",
            "binary_data",
        ),
        *("binary_data_output", "classification", "shared_memory_region", "shared_memory_byte_size", "sequence_id"),
        *(
            "shared_memory_offset",
            "sequence_start",
            "sequence_end",
            "priority",
            "timeout",
            "triton_x",
            "INPUT0",
            "ready",
        ),
        *(
            "config",
            "file:1/model.onnx",
            "unload_dependents",
            "key",
            "offset",
            "byte_size",
            "raw_handle",
            "b64",
            "device_id",
        ),
        *("trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file", "log_info", "log_verbose_level"),
    ]
)
WORDS = st.sampled_from(
    ["INPUT0", "INPUT1", "OUTPUT0", "features", "FP32", "BYTES", "INT64", "BF16", "OFF", "TENSORS", "r"]
)
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(VOCABULARY | st.text(max_size=4), inner, max_size=5),
    max_leaves=25,
)
MODELS = st.sampled_from(["echo", "pair", "strings", "alpha_model", "nope"])

TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": WORDS | JSON,
        "datatype": st.sampled_from(["FP32", "BYTES", "INT64", "FP16", "BOOL"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data": st.lists(SCALARS | st.lists(SCALARS, max_size=3), max_size=6) | JSON,
        "parameters": st.dictionaries(VOCABULARY, NUMBERS | WORDS | st.booleans(), max_size=3) | JSON,
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3) | JSON},
    optional={
        "id": SCALARS,
        "parameters": st.dictionaries(VOCABULARY | st.text(max_size=5), JSON, max_size=4),
        "outputs": st.lists(TENSOR, max_size=3) | JSON,
    },
)
HEADER_NAMES = st.sampled_from(
    [
        *(
            "Content-Length",
            "Transfer-Encoding",
            "Content-Encoding",
            "Accept-Encoding",
            "Inference-Header-Content-Length",
        ),
        *(
            "Expect",
            "Connection",
            "Upgrade",
            "Host",
            "X-Fwd-A",
            "priority",
            "traceparent",
            "Content-Type",
            "HTTP2-Settings",
        ),
    ]
) | st.text("abcXYZ-_ :\t\0é", max_size=8)
HEADER_VALUES = st.sampled_from(
    [
        "0",
        "1",
        "-1",
        "5",
        "99999999999",
        "abc",
        "chunked",
        "gzip",
        "deflate",
        "identity",
        "100-continue",
        "close",
        "h2c",
        "",
    ]
) | st.text(st.characters(max_codepoint=255), max_size=12)
HEADERS = st.lists(st.tuples(HEADER_NAMES, HEADER_VALUES), max_size=4)
CONTROL_PATHS = st.sampled_from(
    [
        *(
            "/v2",
            "/v2/health/ready",
            "/v2/models/echo",
            "/v2/models/echo/config",
            "/v2/models/stats",
            "/v2/trace/setting",
        ),
        *("/v2/models/echo/trace/setting", "/v2/logging", "/v2/repository/index", "/v2/repository/models/nope/load"),
        *(
            "/v2/repository/models/nope/unload",
            "/v2/systemsharedmemory/region/r/register",
            "/v2/systemsharedmemory/status",
        ),
        *("/v2/systemsharedmemory/unregister", "/v2/cudasharedmemory/region/r/register", "/v2/models/echo/generate"),
        *("/v2/models/strings/generate_stream", "/v2/models/echo/versions/1/infer", "/forebay/explain/echo"),
    ]
) | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12).map("/v2/".__add__)
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])


def dumps(document: Any) -> bytes:
    """Return JSON, NaN and all; lone surrogates as they are written in escapes."""
    return json.dumps(document).encode()


def message(method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """Return a request whose header lines are what they are."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


# --- the server ---


class Target:
    """A server, and what holds of it however it is treated."""

    def __init__(self, server: ForebayServer) -> None:
        self.server = server
        self._pids = server.pids()
        self._memory_kib = self._resident_kib()

    def _resident_kib(self) -> int:
        fields = [Path(f"/proc/{pid}/status").read_text() for pid in self._pids.values()]
        return sum(int(found[1]) for text in fields if (found := re.search(r"VmRSS:\s+(\d+)", text)))

    def send(self, data: bytes) -> None:
        """Send bytes and the end of all bytes; every answer must be one that may be."""
        with WireClient(self.server.http_port, timeout_s=ANSWER_S) as wire:
            try:
                wire.send(data).finish_sending()
                while True:
                    self._judge(wire.answer(), data)
            except (Ended, ConnectionError):
                return

    @staticmethod
    def _judge(answer: Answer, data: bytes) -> None:
        if answer.status < 500:
            return
        assert b"internal error" not in answer.body, data
        text = answer.body.removeprefix(b"data: ")
        assert CAUSES.search(json.loads(text)["error"]), (answer, data)

    def check(self) -> None:
        """Assert that the server is as it was."""
        wait_nothing_in_use(self.server)
        assert self.server.pids() == self._pids
        assert self._resident_kib() < self._memory_kib + GROWTH_KIB
        with WireClient(self.server.http_port) as wire:
            answer = wire.send(infer("echo", [("INPUT0", "FP32", [2], struct.pack("<2f", 1, 2))])).answer()
            assert answer.tensors == struct.pack("<2f", 1, 2)
        assert "Traceback" not in self.server.stderr


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    repository = write_models(tmp_path_factory.mktemp("fuzz") / "models")
    flags = (
        *("--model-control-mode=explicit", "--load-model=*", "--allow-client-shm=true", "--http-frontends=1"),
        *("--http-max-input-size=1048576", "--http-header-forward-pattern=X-Fwd.*"),
    )
    with ForebayServer(repository, *flags) as server:
        found = Target(server)
        yield found
        found.check()


@pytest.fixture(autouse=True)
def _as_before(target: Target) -> Iterator[None]:
    yield
    target.check()


# --- tests ---


@FUZZ
@given(model=MODELS, document=REQUEST | JSON)
def test_json_requests(target: Target, model: str, document: Any) -> None:
    target.send(post(f"/v2/models/{model}/infer", dumps(document)))


@FUZZ
@given(
    model=MODELS, document=REQUEST, tail=st.binary(max_size=40), length=st.none() | HEADER_VALUES | st.integers(0, 60)
)
def test_binary_layouts(target: Target, model: str, document: Any, tail: bytes, length: str | int | None) -> None:
    text = dumps(document)
    said = len(text) if length is None else length
    head = f"Inference-Header-Content-Length: {said}".encode("latin-1", "replace")
    body = text + tail
    target.send(
        b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: %d\r\n\r\n"
        % (model.encode(), head, len(body))
        + body
    )


@FUZZ
@given(
    elements=st.lists(st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 6), st.binary(max_size=6)), max_size=4),
    shape=st.lists(st.integers(0, 4), max_size=3),
)
def test_strings_in_binary(target: Target, elements: list[tuple[int, bytes]], shape: list[int]) -> None:
    """Spec H-091: lengths that promise more, less, or nothing."""
    data = b"".join(struct.pack("<I", length) + content for length, content in elements)
    target.send(infer("strings", [("INPUT0", "BYTES", shape, data)]))


@FUZZ
@given(method=METHODS, path=CONTROL_PATHS, headers=HEADERS, body=st.binary(max_size=60) | JSON.map(dumps))
def test_headers_and_paths(target: Target, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> None:
    target.send(message(method, path, [*headers, ("Content-Length", str(len(body)))], body))
    target.send(message(method, path, headers, body))


@FUZZ
@given(path=CONTROL_PATHS, document=JSON | st.dictionaries(VOCABULARY, JSON, max_size=5))
def test_control_documents(target: Target, path: str, document: Any) -> None:
    target.send(post(path, dumps(document)))


@FUZZ
@given(
    model=MODELS,
    action=st.sampled_from(["generate", "generate_stream"]),
    document=st.dictionaries(VOCABULARY | WORDS, JSON, max_size=5),
)
def test_generate(target: Target, model: str, action: str, document: Any) -> None:
    target.send(post(f"/v2/models/{model}/{action}", dumps(document)))


SEEDS = [
    get("/v2/models/echo"),
    infer("echo", [("INPUT0", "FP32", [2], bytes(8))]),
    infer("strings", [("INPUT0", "BYTES", [1], b"\1\0\0\0x")], "X-Fwd-A: b", request_id="r"),
    post(
        "/v2/models/echo/infer", dumps({"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1], "data": [1]}]})
    ),
    b"POST /v2/models/echo/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunked(b'{"INP', b'UT0":[1]}'),
    post("/v2/repository/models/nope/load", dumps({"parameters": {"file:1/a": base64.b64encode(b"x").decode()}})),
]


@FUZZ
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), max_size=6),
)
def test_torn_and_patched_requests(target: Target, seed: bytes, edits: list[tuple[float, int, bytes]]) -> None:
    data = bytearray(seed)
    for where, removed, added in edits:
        at = int(where * len(data))
        data[at : at + removed] = added
    target.send(bytes(data))


@FUZZ
@given(data=st.binary(max_size=300))
def test_any_bytes(target: Target, data: bytes) -> None:
    target.send(data)
    target.send(b"POST /v2/models/echo/infer HTTP/1.1\r\n" + data)
