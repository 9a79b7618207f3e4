"""gRPC with clients of other families than grpc-core: grpc-js and grpc-go, h2load, curl and grpcurl.

    apt-get install nghttp2-client curl nodejs npm golang-go golang-google-grpc-dev
    npm install @grpc/grpc-js; NODE_PATH=$PWD/node_modules pytest tests/integration/test_grpc_interop.py

What is not installed is skipped, saying so.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer
from grpc_clients import alpha_model_of, features, url_of
from http_models import write_models
from tritonclient.grpc import service_pb2

SUPPORT = Path(__file__).resolve().parents[1] / "support"
#: Where Debian puts the sources of Go libraries.
GO_LIBRARIES = Path("/usr/share/gocode")
SERVICE = "/inference.GRPCInferenceService"

CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, UNIMPLEMENTED = 1, 3, 4, 5, 12


def program(name: str) -> str:
    """Return where a program is, or skip the test."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    with ForebayServer(write_models(tmp_path_factory.mktemp("grpc") / "models"), protocols=("grpc",)) as running:
        yield running


def infer_message(model: str, name: str, values: np.ndarray[Any, np.dtype[np.float32]], **fields: Any) -> bytes:
    made = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[values.tobytes()], **fields)
    made.inputs.add(name=name, datatype="FP32", shape=values.shape)
    body: bytes = made.SerializeToString()
    return body


# --- other implementations of gRPC ---


def node_command(_folder: Path) -> list[str]:
    node = program("node")
    if subprocess.run([node, "-e", "require('@grpc/grpc-js')"], capture_output=True, check=False).returncode:
        pytest.skip("@grpc/grpc-js is not there: npm install @grpc/grpc-js, and NODE_PATH=.../node_modules")
    return [node, str(SUPPORT / "grpc_js_client.js")]


def go_command(folder: Path) -> list[str]:
    if not GO_LIBRARIES.joinpath("src/google.golang.org/grpc").is_dir():
        pytest.skip("grpc-go is not there: apt-get install golang-go golang-google-grpc-dev")
    binary = folder / "client"
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": str(GO_LIBRARIES), "GOCACHE": str(folder / "cache")}
    subprocess.run(
        [program("go"), "build", "-o", binary, "."], cwd=SUPPORT / "grpc_go_client", env=environment, check=True
    )
    return [str(binary)]


@pytest.fixture(scope="module", params=[node_command, go_command], ids=["grpc-js", "grpc-go"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a client that reads requests as JSON."""
    command: list[str] = request.param(tmp_path_factory.mktemp("client"))
    return command


def asked(*messages: bytes, method: str = "ModelInfer", kind: str = "unary", **more: Any) -> dict[str, Any]:
    texts = [base64.b64encode(message).decode() for message in messages]
    return {"path": f"{SERVICE}/{method}", "kind": kind, "messages": texts, **more}


def ask(client: list[str], server: ForebayServer, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [*client, url_of(server)],
        input=json.dumps(requests), capture_output=True, text=True, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def reply_of(answer: dict[str, Any], index: int = 0) -> Any:
    return service_pb2.ModelInferResponse.FromString(base64.b64decode(answer["replies"][index]))


def test_unary_calls(client: list[str], server: ForebayServer) -> None:
    """Small and large, many at once, compressed, and what goes wrong."""
    rows, large = features(3), np.arange(1_000_000, dtype=np.float32)
    small = infer_message("alpha_model", "features", rows, id="mine")
    slow = infer_message("slow", "INPUT0", rows[0])
    answers = ask(
        client,
        server,
        asked(small, times=50),
        asked(infer_message("echo", "INPUT0", large)),
        asked(small, compress=True),
        asked(infer_message("zz", "INPUT0", rows)),
        asked(infer_message("alpha_model", "features", rows, model_version="x")),
        asked(slow, deadline_ms=50),
        asked(slow, cancel_ms=50),
        asked(small, method="Nope"),
        asked(small),
    )
    predictions = alpha_model_of(2)(rows)
    for answer in (*answers[:50], answers[51], answers[-1]):
        assert (answer["status"], reply_of(answer).id) == (0, "mine")
        found = np.frombuffer(reply_of(answer).raw_output_contents[0], np.float32)
        np.testing.assert_allclose(found, predictions.ravel(), rtol=1e-5)
    assert reply_of(answers[50]).raw_output_contents[0] == large.tobytes()
    assert answers[52]["details"] == "Request for unknown model: 'zz' is not found"
    assert [answer["status"] for answer in answers[52:57]] == [
        NOT_FOUND, INVALID_ARGUMENT, DEADLINE_EXCEEDED, CANCELLED, UNIMPLEMENTED,
    ]  # fmt: skip


def test_streams(client: list[str], server: ForebayServer) -> None:
    messages = [infer_message("echo", "INPUT0", np.full(2, index, np.float32), id=str(index)) for index in range(20)]
    (answer,) = ask(client, server, asked(*messages, method="ModelStreamInfer", kind="stream"))
    replies = [
        service_pb2.ModelStreamInferResponse.FromString(base64.b64decode(text)).infer_response
        for text in answer["replies"]
    ]
    assert answer["status"] == 0
    assert [(reply.id, reply.raw_output_contents[0]) for reply in replies] == [
        (str(index), np.full(2, index, np.float32).tobytes()) for index in range(20)
    ]


# --- programs that speak HTTP/2 ---


def test_h2load(server: ForebayServer, tmp_path: Path) -> None:
    """nghttp2's own idea of the protocol, with many streams in flight on each of several connections."""
    body = infer_message("alpha_model", "features", features(1))
    message = tmp_path / "message"
    message.write_bytes(b"\0" + len(body).to_bytes(4, "big") + body)
    done = subprocess.run(
        [program("h2load"), "-n", "2000", "-c", "4", "-m", "25", f"--data={message}",
         "--header=content-type: application/grpc", "--header=te: trailers",
         f"http://{url_of(server)}{SERVICE}/ModelInfer"],
        capture_output=True, text=True, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert re.search(r"2000 succeeded, 0 failed, 0 errored, 0 timeout", done.stdout), done.stdout


def test_curl_and_http_1_get_an_answer(server: ForebayServer) -> None:
    """curl speaks HTTP/2 without gRPC; a plain HTTP/1 request is turned away."""
    curl = program("curl")
    for arguments, status in ((["-X", "GET"], "405"), (["-d", "x"], "415"), (["-T", "-", "-X", "POST"], "415")):
        with subprocess.Popen(
            [curl, "-s", "--http2-prior-knowledge", *arguments, "-o", "/dev/null", "-w", "%{http_code}",
             f"http://{url_of(server)}{SERVICE}/ServerLive"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            if "-T" in arguments:
                time.sleep(0.3)  # Its header goes ahead.
            found, _ = process.communicate("x", timeout=PATIENCE_S)
        assert (process.returncode, found) == (0, status)
    host, port = url_of(server).split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"does not speak HTTP/2" in b"".join(iter(lambda: plain.recv(4096), b""))


def test_curl_makes_a_grpc_call(server: ForebayServer, tmp_path: Path) -> None:
    """The five bytes in front of a message, and trailers, by hand."""
    (tmp_path / "request").write_bytes(b"\0\0\0\0\0")
    done = subprocess.run(
        [program("curl"), "-s", "-v", "--http2-prior-knowledge", "--data-binary", f"@{tmp_path / 'request'}",
         "-H", "content-type: application/grpc", "-H", "te: trailers", "-o", str(tmp_path / "reply"),
         f"http://{url_of(server)}{SERVICE}/ServerLive"],
        capture_output=True, text=True, check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (tmp_path / "reply").read_bytes() == b"\0\0\0\0\x02\x08\x01"
    assert "< grpc-status: 0" in done.stderr


def test_grpcurl_lists_and_calls_by_reflection(server: ForebayServer) -> None:
    """grpc-go, and the messages as the server describes them (spec G-020)."""
    run = [program("grpcurl"), "-plaintext"]
    listed = subprocess.run(
        [*run, url_of(server), "list"], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert "inference.GRPCInferenceService" in listed.stdout.split()
    called = subprocess.run(
        [*run, url_of(server), f"{SERVICE[1:]}/ServerLive"],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert json.loads(called.stdout) == {"live": True}
