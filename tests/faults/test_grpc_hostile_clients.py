"""gRPC clients that misbehave: bounded memory, and everybody else is served."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import PATIENCE_S, ForebayServer
from grpc_clients import features, tensor, url_of
from grpc_wire import INFER, connect, frame
from http_models import write_models
from tritonclient.grpc import service_pb2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    with ForebayServer(write_models(tmp_path_factory.mktemp("grpc") / "models"), protocols=("grpc",)) as running:
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(url_of(server)) as opened:
        yield opened


def memory_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no memory")


def rapid_reset(wire: socket.socket) -> None:
    for number in range(1, 200_000, 2):
        wire.sendall(frame(1, 4, number, INFER) + frame(3, 0, number, bytes(4)))


def endless_header(wire: socket.socket) -> None:
    wire.sendall(frame(1, 0, 1, INFER))
    for _ in range(100_000):
        wire.sendall(frame(9, 0, 1, b"\0\x01a\x7f\x81\x1e" + b"v" * 4000))


def settings_flood(wire: socket.socket) -> None:
    for _ in range(100_000):
        wire.sendall(frame(4, 0, 0, b"\0\4\0\0\0\0" * 8))


def ping_flood(wire: socket.socket) -> None:
    for _ in range(100_000):
        wire.sendall(frame(6, 0, 0, bytes(8)) * 10)


def header_bomb(wire: socket.socket) -> None:
    """A few bytes that stand for far more: one long field in the table, named again and again."""
    wire.sendall(frame(1, 4, 1, INFER + b"\x40\x01a\x7f\x81\x1e" + b"v" * 4000))
    for number in range(3, 200_000, 2):
        wire.sendall(frame(1, 4, number, INFER + b"\xbe" * 8000))


def window_flood(wire: socket.socket) -> None:
    for _ in range(100_000):
        wire.sendall(frame(8, 0, 0, b"\0\0\0\1") * 20)


@pytest.mark.parametrize("attack", [rapid_reset, endless_header, header_bomb, settings_flood, ping_flood, window_flood])
def test_a_flood_ends_its_connection_and_nothing_else(
    server: ForebayServer, client: grpcclient.InferenceServerClient, attack: Callable[[socket.socket], None]
) -> None:
    client.is_server_live()
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    with (
        connect(server.ports()["GRPCInferenceService"]) as wire,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        attack(wire)
    client.infer("alpha_model", [tensor("features", features(1))])
    assert server.pid_of("grpc") == pid
    assert memory_kib(pid) - before < 50_000


def echo_message(count: int) -> bytes:
    """Return a request for so many numbers, as it follows a header."""
    message = service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(4 * count)])
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[count])
    body: bytes = message.SerializeToString()
    return b"\0" + len(body).to_bytes(4, "big") + body


def send_message(wire: socket.socket, number: int, data: bytes) -> None:
    """Send a call on a stream of that number."""
    pieces = [data[start : start + 16_384] for start in range(0, len(data), 16_384)]
    wire.sendall(frame(1, 4, number, INFER) + b"".join(frame(0, 0, number, piece) for piece in pieces[:-1]))
    wire.sendall(frame(0, 1, number, pieces[-1]))


def test_a_client_that_takes_no_reply_costs_bounded_memory(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    """A window of zero: replies wait, until calls are refused."""
    client.is_server_live()
    data = echo_message(250_000)
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    refused = threading.Event()

    def read(wire: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := wire.recv(65536):
                if b"\0\0\4\3\0" in received:
                    refused.set()

    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(4, 0, 0, b"\0\4\0\0\0\0"))
        reader = threading.Thread(target=read, args=(wire,))
        reader.start()
        number = 1
        while not refused.is_set() and number < 10_000:
            send_message(wire, number, data)
            number += 2
        assert refused.wait(PATIENCE_S)
        grown = memory_kib(pid) - before
        wire.shutdown(socket.SHUT_RDWR)
        reader.join(PATIENCE_S)
    assert grown < 200_000
    client.infer("alpha_model", [tensor("features", features(1))])


def test_a_client_that_never_reads_its_socket(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    """Its windows are wide open, so replies go out until the kernel takes no more of them."""
    client.is_server_live()
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    data = echo_message(250_000)
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(4, 0, 0, b"\0\4\x7f\xff\xff\xff") + frame(8, 0, 0, b"\x7f\0\0\0"))
        wire.settimeout(2.0)
        with contextlib.suppress(OSError):
            for number in range(1, 2000, 2):
                send_message(wire, number, data)
        assert memory_kib(pid) - before < 300_000
        client.infer("alpha_model", [tensor("features", features(1))])
    client.infer("alpha_model", [tensor("features", features(1))])


def test_a_thousand_idle_connections_are_in_nobodys_way(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    client.is_server_live()
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    wires = [connect(server.ports()["GRPCInferenceService"]) for _ in range(1000)]
    try:
        client.infer("alpha_model", [tensor("features", features(1))])
        assert (memory_kib(pid) - before) / len(wires) < 64
    finally:
        for wire in wires:
            wire.close()


def test_half_a_message_holds_nothing(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    """Lengths that lie: a message of 2 GB is announced, and a few bytes of it sent."""
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(1, 4, 1, INFER) + frame(0, 1, 1, b"\0\x7f\xff\xff\xff" + b"few bytes"))
        received = b""
        while b"grpc-status" not in received:
            received += wire.recv(4096)
        assert b"the request ends within a message" in received
    client.infer("alpha_model", [tensor("features", features(1))])


# --- the fuzzer ---

#: How long the server is sent nonsense, s: ``FOREBAY_FUZZ_SECS=600 pytest tests/faults/test_grpc_hostile_clients.py``.
FUZZ_SECS = float(os.environ.get("FOREBAY_FUZZ_SECS", "3"))


def conversation(chance: random.Random) -> bytes:
    """Return what a client might say, with frames of any kind between and within it, and some bytes changed."""
    small = echo_message(chance.choice([0, 1, 50, 5000]))
    payloads = [b"", INFER, bytes(4), bytes(5), bytes(8), b"\0\0\0\1", b"\0\4\0\0\0\0", small, small[:-3]]
    parts: list[bytes] = []
    for number in range(1, 2 * chance.randrange(1, 30), 2):
        for _ in range(chance.choice([0, 0, 1, 3])):
            flags, stream = (
                chance.choice([0, 1, 4, 5, 8, 0x20, 0x2D, 0xFF]),
                chance.choice([0, 1, number, number + 2, 2]),
            )
            payload = chance.choice([*payloads, chance.randbytes(chance.randrange(60))])
            parts.append(frame(chance.randrange(12), flags, stream, payload))
        parts.append(frame(1, 4, number, INFER))
        end = chance.randrange(len(small) + 1)
        parts.append(frame(0, 0, number, small[:end]) + frame(0, chance.choice([1, 1, 0]), number, small[end:]))
    data = bytearray(b"".join(parts))
    for _ in range(chance.choice([0, 0, 1, 2, 20])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def test_nonsense_harms_nobody(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    """Our frame fuzzer against a server: it stays the same process, of bounded size, and serves others meanwhile."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    client.is_server_live()
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    end_s = time.monotonic() + FUZZ_SECS
    rounds = 0
    while time.monotonic() < end_s:
        with connect(server.ports()["GRPCInferenceService"]) as wire, contextlib.suppress(OSError):
            wire.settimeout(0.02)
            wire.sendall(conversation(chance))
            while chance.random() < 0.7 and wire.recv(65_536):
                pass
        rounds += 1
        if rounds % 20 == 0:
            client.infer("alpha_model", [tensor("features", features(1))])
    assert server.pid_of("grpc") == pid, f"seed {seed}"
    assert memory_kib(pid) - before < 100_000, f"seed {seed}"
    assert "Traceback" not in server.stderr, f"seed {seed}"
    given = np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(client.infer("echo", [tensor("INPUT0", given)]).as_numpy("OUTPUT0"), given)
