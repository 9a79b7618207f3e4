"""gRPC streams that are cut off: cancelled, out of time, half closed, their client dead; nothing of them stays."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer
from grpc_clients import url_of
from grpc_wire import connect, frame, header_block
from http_models import wait_nothing_in_use, write_identity
from scheduling_models import add_stream_model
from tritonclient.grpc import service_pb2, service_pb2_grpc

STREAM = b"/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("streams") / "models"
    write_identity(models, "echo", [("TYPE_FP32", "-1")])
    write_identity(models, "slow", [("TYPE_FP32", "-1")], delay_ms=300)
    write_identity(models, "slow_rows", [("TYPE_FP32", "4")], batch=8, delay_ms=300)
    add_stream_model(models, "decoupled")
    with ForebayServer(models, protocols=("grpc", "http", "metrics")) as running:
        yield running


@pytest.fixture
def stub(server: ForebayServer) -> Iterator[Any]:
    with grpc.insecure_channel(url_of(server)) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        yield stub


@pytest.fixture(autouse=True)
def nothing_stays(server: ForebayServer) -> Iterator[None]:
    """All rows and blocks come back, the processes are the same as before, and none of them has complained."""
    before = server.pids()
    yield
    wait_nothing_in_use(server)
    assert server.pids() == before
    assert "Traceback" not in server.stderr


def request(model: str, *values: float, request_id: str = "") -> Any:
    """Return a request; ``decoupled`` answers as often as its value says."""
    made = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    shape = [1, 4] if model == "slow_rows" else [len(values)]
    made.inputs.add(name="X" if model == "decoupled" else "INPUT0", datatype="FP32", shape=shape)
    made.raw_input_contents.append(np.array(values, np.float32).tobytes())
    return made


def decoupled() -> Any:
    return request("decoupled", 15)


def in_a_block() -> Any:
    return request("slow", *range(100))


def in_rows() -> Any:
    return request("slow_rows", 1, 2, 3, 4)


KINDS = pytest.mark.parametrize("make", [decoupled, in_a_block, in_rows])


class Held:
    """The requests of a stream that its client leaves open."""

    def __init__(self, *requests: Any) -> None:
        self._requests = requests
        self.is_open = True

    def __iter__(self) -> Iterator[Any]:
        yield from self._requests
        while self.is_open:
            time.sleep(0.01)


def code_of(call: Any) -> tuple[int, grpc.StatusCode]:
    """Read a stream to its end; return the number of replies and the status."""
    count = 0
    try:
        for _reply in call:
            count += 1
    except grpc.RpcError:
        pass
    return count, call.code()


@KINDS
def test_of_several_streams_only_those_that_are_cut_off_end(stub: Any, make: Callable[[], Any]) -> None:
    """On one connection: one is cancelled, the time of another passes, the others are answered in full."""
    feeds = [Held(make()) for _ in range(4)]
    calls = [
        stub.ModelStreamInfer(iter(feed), timeout=0.15 if index == 1 else None) for index, feed in enumerate(feeds)
    ]
    time.sleep(0.1)
    calls[2].cancel()
    for feed in feeds:
        feed.is_open = False
    whole = 15 if make is decoupled else 1
    assert code_of(calls[0]) == (whole, grpc.StatusCode.OK)
    assert code_of(calls[1])[1] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert code_of(calls[2])[1] is grpc.StatusCode.CANCELLED
    assert code_of(calls[3]) == (whole, grpc.StatusCode.OK)


@pytest.mark.parametrize("make", [in_a_block, in_rows])
def test_of_several_calls_only_those_that_are_cancelled_end(stub: Any, make: Callable[[], Any]) -> None:
    calls = [stub.ModelInfer.future(make()) for _ in range(6)]
    calls[3].cancel()
    calls[0].cancel()
    for index in (1, 2, 4, 5):
        assert calls[index].result(PATIENCE_S).raw_output_contents


@KINDS
def test_half_closed_streams_are_answered(stub: Any, make: Callable[[], Any]) -> None:
    call = stub.ModelStreamInfer(iter([make(), make()]))
    assert code_of(call) == (30 if make is decoupled else 2, grpc.StatusCode.OK)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_streams(stub: Any, compression: grpc.Compression) -> None:
    sizes = [1, 40_000, 3]
    sent = [request("echo", *range(size), request_id=str(size)) for size in sizes]
    replies = list(stub.ModelStreamInfer(iter(sent), compression=compression))
    assert [reply.infer_response.id for reply in replies] == [str(size) for size in sizes]
    assert [reply.infer_response.raw_output_contents[0] for reply in replies] == [
        each.raw_input_contents[0] for each in sent
    ]


def test_a_killed_client_leaves_nothing(server: ForebayServer) -> None:
    program = (
        "import sys, time, grpc\n"
        "from tritonclient.grpc import service_pb2, service_pb2_grpc\n"
        "requests = [service_pb2.ModelInferRequest.FromString(bytes.fromhex(each)) for each in sys.argv[2:]]\n"
        "def feed():\n"
        "    yield from requests * 10\n"
        "    time.sleep(60)\n"
        "stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "call = stub.ModelStreamInfer(feed())\n"
        "next(call)\n"
        "print('answered', flush=True)\n"
        "time.sleep(60)\n"
    )
    sent = [make().SerializeToString().hex() for make in (decoupled, in_a_block, in_rows)]
    command = [sys.executable, "-c", program, url_of(server), *sent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "answered\n"
        client.kill()


# --- by hand, what no library sends


def header(**fields: bytes) -> bytes:
    block = header_block(STREAM)
    for name, value in fields.items():
        named = name.replace("_", "-").encode()
        block += b"\0" + bytes((len(named),)) + named + bytes((len(value),)) + value
    return block


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def read_until(wire: Any, text: bytes) -> bytes:
    received = b""
    while text not in received:
        received += wire.recv(65_536)
    return received


@KINDS
def test_a_deadline_that_never_comes(server: ForebayServer, make: Callable[[], Any]) -> None:
    """``99999999H``: in nanoseconds more than 64 bits hold."""
    message = framed(make().SerializeToString())
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(1, 4, 1, header(grpc_timeout=b"99999999H")) + frame(0, 1, 1, message))
        assert b"grpc-status\x010" in read_until(wire, b"grpc-status")


@pytest.mark.parametrize("sent_bytes", [3, 60_000, 100_000])
def test_a_stream_that_is_reset_within_a_message(server: ForebayServer, sent_bytes: int) -> None:
    """What was asked on it before is let go of; other streams of the connection go on."""
    pending = framed(in_a_block().SerializeToString()) + framed(decoupled().SerializeToString())
    torn = framed(request("echo", *range(50_000)).SerializeToString())[:sent_bytes]
    parts = [torn[start : start + 16_000] for start in range(0, len(torn), 16_000)]
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(1, 4, 1, header()) + frame(0, 0, 1, pending) + b"".join(frame(0, 0, 1, p) for p in parts))
        wire.sendall(frame(3, 0, 1, (8).to_bytes(4, "big")))
        message = framed(request("echo", 1, request_id="other").SerializeToString())
        wire.sendall(frame(1, 4, 3, header()) + frame(0, 1, 3, message))
        assert b"other" in read_until(wire, b"grpc-status")


def test_a_stream_that_is_reset_while_its_replies_wait_for_room(server: ForebayServer) -> None:
    """The window of the client is closed, and a decoupled model goes on answering."""
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(4, 0, 0, b"\0\4\0\0\0\0"))
        wire.sendall(frame(1, 4, 1, header()) + frame(0, 0, 1, framed(decoupled().SerializeToString())))
        time.sleep(0.1)
        wire.sendall(frame(3, 0, 1, (8).to_bytes(4, "big")))
        wire.sendall(frame(1, 4, 3, header()) + frame(8, 0, 3, (65_536).to_bytes(4, "big")))
        wire.sendall(frame(0, 1, 3, framed(request("echo", 1).SerializeToString())))
        assert b"grpc-status\x010" in read_until(wire, b"grpc-status")
