"""A server that stops: what has begun to arrive, and sequences that have begun, live out ``--exit-timeout-secs``."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
from forebay_server import ForebayServer, wait_until
from grpc_wire import INFER, connect, frame
from http_models import write_identity
from tritonclient.grpc import service_pb2

#: Longer than idle connections are given by a stopping server, s.
PAUSE_S = 0.5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForebayServer]:
    write_identity(tmp_path / "models", "echo", [("TYPE_FP32", "-1")])
    with ForebayServer(tmp_path / "models", protocols=("http", "grpc")) as running:
        yield running


def infer_request(elements: int) -> bytes:
    """Return the bytes of one binary request for ``elements`` zeros."""
    tensor = {
        "name": "INPUT0",
        "shape": [elements],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 4 * elements},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = head + bytes(4 * elements)
    return (
        b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(head), len(body))
    ) + body


def stop_and_pause(server: ForebayServer) -> None:
    """Have the server stop, and wait for longer than idle connections are left open."""
    time.sleep(PAUSE_S)
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: "Waiting for in-flight requests" in server.stderr, "the drain to begin")
    time.sleep(PAUSE_S)


@pytest.mark.parametrize("elements", [50, 1_000_000], ids=["small", "received into shared memory"])
def test_upload_at_sigterm_is_received_and_answered(server: ForebayServer, elements: int) -> None:
    """Spec R-110: requests that were begun are finished within the exit timeout."""
    request = infer_request(elements)
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as client:
        client.sendall(request[: len(request) // 2])
        stop_and_pause(server)
        client.sendall(request[len(request) // 2 :])
        answer = b""
        while chunk := client.recv(1 << 20):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert len(answer) > 4 * elements
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("elements", [50, 1_000_000], ids=["small", "received into shared memory"])
def test_grpc_message_at_sigterm_is_received_and_answered(server: ForebayServer, elements: int) -> None:
    """Spec R-110, G-087."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="INPUT0", datatype="FP32", shape=[elements])
    request = service_pb2.ModelInferRequest(
        model_name="echo", inputs=[tensor], raw_input_contents=[bytes(4 * elements)]
    ).SerializeToString()
    message = b"\0" + len(request).to_bytes(4, "big") + request
    half = len(message) // 2
    with connect(server.ports()["GRPCInferenceService"]) as client:
        client.sendall(frame(1, 4, 1, INFER) + data_frames(message[:half]))
        stop_and_pause(server)
        client.sendall(data_frames(message[half:]) + frame(0, 1, 1))
        answer = b"".join(iter(lambda: client.recv(1 << 20), b""))
    # A large answer waits for a window that this client never opens: its head is enough.
    assert b"echo" in answer
    assert b"OUTPUT0" in answer
    assert server.process.wait(30) == 0


def data_frames(data: bytes) -> bytes:
    """Return DATA frames of stream 1, none larger than HTTP/2 allows by default."""
    return b"".join(frame(0, 0, 1, data[start : start + 16384]) for start in range(0, len(data), 16384))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_load_at_sigterm_is_answered(tmp_path: Path, protocol: str) -> None:
    """Spec R-110: requests that are no inference are waited for too."""
    for name in ("echo", "slow"):
        write_identity(tmp_path / "models", name, [("TYPE_FP32", "-1")])
    config = tmp_path / "models" / "slow" / "config.pbtxt"
    config.write_text(config.read_text().replace('"identity"', '"python"'))
    (tmp_path / "models" / "slow" / "1" / "model.py").write_text(
        "import time\nclass TritonPythonModel:\n    def initialize(self, args):\n        time.sleep(2)\n"
    )
    path = "/v2/repository/models/slow/load"
    flags = ("--model-control-mode=explicit", "--load-model=echo")
    with ForebayServer(tmp_path / "models", *flags, protocols=("http", "grpc")) as server, ThreadPoolExecutor() as pool:
        if protocol == "http":
            loading = pool.submit(lambda: server.post(path)[0] == 200)
        else:
            client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
            loading = pool.submit(lambda: client.load_model("slow") is None)
        server.wait_logged("loading: slow:1")
        assert server.stop() == 0
        assert loading.result(30)
        assert "Found 1 live models and 1 in-flight non-inference requests" in server.stderr


SEQUENCES = """
backend: "identity"
max_batch_size: 2
input {{ name: "INPUT0" data_type: TYPE_INT32 dims: [ 1 ] }}
output {{ name: "OUTPUT0" data_type: TYPE_INT32 dims: [ 1 ] }}
sequence_batching {{ max_sequence_idle_microseconds: {} }}
"""


class SequenceClient:
    """One connection."""

    def __init__(self, server: ForebayServer) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)

    def close(self) -> None:
        self._connection.close()

    def ask(self, sequence: int, **flags: bool) -> tuple[int, str]:
        body = {
            "id": "mine",
            "parameters": {"sequence_id": sequence, **flags},
            "inputs": [{"name": "INPUT0", "datatype": "INT32", "shape": [1, 1], "data": [1]}],
        }
        self._connection.request("POST", "/v2/models/sequences/infer", json.dumps(body))
        reply = self._connection.getresponse()
        return reply.status, reply.read().decode()


def serve_sequences(root: Path, *, idle_secs: int) -> ForebayServer:
    (root / "sequences" / "1").mkdir(parents=True)
    (root / "sequences" / "config.pbtxt").write_text(SEQUENCES.format(idle_secs * 1_000_000))
    return ForebayServer(root, protocols=("http",))


def test_sequence_that_has_begun_at_sigterm_goes_on_and_no_new_one_begins(tmp_path: Path) -> None:
    """Spec R-112, S-071, S-036."""
    with serve_sequences(tmp_path, idle_secs=60) as sequences, closing(SequenceClient(sequences)) as client:
        assert client.ask(7, sequence_start=True)[0] == 200
        stop_and_pause(sequences)
        for _ in range(3):
            time.sleep(PAUSE_S)
            assert client.ask(7)[0] == 200
        status, text = client.ask(8, sequence_start=True)
        assert (status, json.loads(text)["error"]) == (
            503,
            "[request id: mine] Server is stopping, scheduler for model has stopped accepting new inference requests",
        )
        assert client.ask(7, sequence_end=True)[0] == 200
        assert sequences.process.wait(30) == 0
        assert "Exit timeout expired" not in sequences.stderr


def test_sequence_that_nobody_continues_does_not_keep_the_server(tmp_path: Path) -> None:
    """Spec R-112: an idle sequence is over, as it is at any other time."""
    with serve_sequences(tmp_path, idle_secs=2) as sequences, closing(SequenceClient(sequences)) as client:
        assert client.ask(7, sequence_start=True)[0] == 200
        assert client.ask(9, sequence_start=True, sequence_end=True)[0] == 200
        stop_and_pause(sequences)
        assert sequences.process.wait(30) == 0
        assert "Exit timeout expired" not in sequences.stderr


def test_upload_that_never_ends_is_cut_by_the_exit_timeout(tmp_path: Path) -> None:
    """Spec R-113."""
    write_identity(tmp_path / "models", "echo", [("TYPE_FP32", "-1")])
    with (
        ForebayServer(tmp_path / "models", "--exit-timeout-secs=1", protocols=("http",)) as server,
        socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as client,
    ):
        client.sendall(infer_request(50)[:-20])
        time.sleep(PAUSE_S)
        assert server.stop() == 1
        assert "Exit timeout expired" in server.stderr
