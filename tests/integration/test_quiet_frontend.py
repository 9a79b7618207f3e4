"""Connections of quiet models are served in a process of their own while another model is crowded (issue 4)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forebay_server import CONF_MODELS, ForebayServer, is_running, wait_until
from http_models import wait_nothing_in_use, write_identity
from http_wire import Ended, WireClient, infer

from forebay.ipc.time_slices import LARGER_SHARE_NICE

#: Of the crowd: requests that are sent together on each connection.
TOGETHER = 12
CONNECTIONS = 6


WRAPPER = """
platform: "ensemble"
max_batch_size: 64
input [ { name: "IN" data_type: TYPE_FP32 dims: [ 50 ] } ]
output [ { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] } ]
ensemble_scheduling { step [ {
  model_name: "alpha_model" model_version: -1
  input_map { key: "features" value: "IN" } output_map { key: "prediction" value: "OUT" }
} ] }
"""


def write_models(repository: Path) -> Path:
    for name in ("crowded", "quiet"):
        write_identity(repository, name, [("TYPE_FP32", "4")], batch=8)
    return repository


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForebayServer]:
    with ForebayServer(write_models(tmp_path)) as running:
        yield running
        wait_nothing_in_use(running)


def request(model: str, value: float) -> tuple[bytes, bytes]:
    """Return a request and the tensor that its answer ends with."""
    data = struct.pack("<4f", value, 1, 2, 3)
    return infer(model, [("INPUT0", "FP32", (1, 4), data)]), data


def ask_together(model: str, clients: Sequence[WireClient], count: int, value: float = 0.0) -> None:
    """Send ``count`` requests on each connection before reading from any, and check what they are answered."""
    asked = [[request(model, value + index) for index in range(count)] for _ in clients]
    for client, requests in zip(clients, asked, strict=True):
        client.send(*(message for message, _data in requests))
    for client, requests in zip(clients, asked, strict=True):
        assert [client.answer().tensors for _ in requests] == [data for _message, data in requests]


@contextlib.contextmanager
def crowd(port: int, ask: Callable[[Sequence[WireClient]], None] | None = None) -> Iterator[list[WireClient]]:
    """Keep a model crowded on connections of its own, all of which must last.

    Args:
        ask: asks it once and checks the answers; None: of ``crowded``.
    """
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            if ask is None:
                ask_together("crowded", clients, TOGETHER)
            else:
                ask(clients)

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        clients = [stack.enter_context(WireClient(port)) for _ in range(CONNECTIONS)]
        asking = thread.submit(keep_asking)
        try:
            yield clients
        finally:
            is_over.set()
        asking.result()


def ask_wrapper(clients: Sequence[WireClient]) -> None:
    """Ask an ensemble of one step for something that the model takes rows for."""
    message = infer("wrapper", [("IN", "FP32", (1, 50), bytes(200))])
    for client in clients:
        client.send(message * TOGETHER)
    for client in clients:
        assert {client.answer().status for _ in range(TOGETHER)} == {200}


def served_by(server: ForebayServer, role: str, clients: Sequence[WireClient]) -> int:
    """Count those of the connections whose server's end a process holds."""
    pid = server.pid_of(role)
    if not pid:
        return 0
    inodes: dict[str, int] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        inodes[f"socket:[{fields[9]}]"] = int(fields[2].rpartition(":")[2], 16)
    held: set[int] = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            held.add(inodes.get(os.readlink(f"/proc/{pid}/fd/{fd}"), 0))
    return sum(client.sock.getsockname()[1] in held for client in clients)


def ask_until(condition: Callable[[], bool], clients: Sequence[WireClient], what: str, count: int = 1) -> None:
    """Ask the quiet model on these connections until a condition holds."""
    values = iter(range(1 << 24))

    def holds() -> bool:
        for _ in range(20):
            ask_together("quiet", clients, count, next(values))
        return condition()

    wait_until(holds, what)


def move(server: ForebayServer, clients: Sequence[WireClient]) -> None:
    """Ask one request at a time on each, beside a crowd, until all of them are with the quiet frontend."""
    with crowd(server.http_port):
        ask_until(lambda: served_by(server, "http quiet", clients) == len(clients), clients, "them to move")


def test_connection_of_a_quiet_model_moves_and_gets_every_answer(server: ForebayServer) -> None:
    assert server.pid_of("http quiet") == 0
    with WireClient(server.http_port) as client, WireClient(server.http_port) as idle:
        move(server, [client])
        assert served_by(server, "http 0", [client]) == 0
        assert served_by(server, "http 0", [idle]) == 1
        # It has forgotten nothing that a connection can do.
        client.send(b"GET /v2/models/quiet/ready HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.answer().status == 200
        message, data = request("crowded", 7)
        for byte_count in (1, len(message) - 1):
            client.send(message[:byte_count]).send(message[byte_count:])
            assert client.answer().tensors == data
        client.send(b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert client.answer().status == 200
        with pytest.raises(Ended):
            client.answer()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_gets_a_larger_share_of_the_cores_than_the_crowd(server: ForebayServer) -> None:
    with WireClient(server.http_port) as client:
        move(server, [client])
        crowded, quiet = (os.getpriority(os.PRIO_PROCESS, server.pid_of(f"http {name}")) for name in ("0", "quiet"))
        assert quiet == max(crowded + LARGER_SHARE_NICE, -20)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_workers_of_quiet_models_get_a_larger_share_as_long_as_there_is_a_crowd(server: ForebayServer) -> None:
    def nice(model: str) -> int:
        return os.getpriority(os.PRIO_PROCESS, server.pid_of(f"worker {model}"))

    usual = nice("quiet")
    favoured = max(usual + LARGER_SHARE_NICE, -20)
    with crowd(server.http_port):
        wait_until(lambda: nice("quiet") == favoured, "the larger share")
        assert nice("crowded") == usual
        os.kill(pid := server.pid_of("worker quiet"), signal.SIGKILL)
        wait_until(lambda: server.pid_of("worker quiet") not in (0, pid), "the successor")
        wait_until(lambda: nice("quiet") == favoured, "the successor's larger share")
    wait_until(lambda: nice("quiet") == usual, "the end of the larger share")


def test_crowd_of_the_quiet_frontend_goes_back(server: ForebayServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WireClient(server.http_port)) for _ in range(CONNECTIONS)]
        move(server, clients)
        ask_until(
            lambda: served_by(server, "http 0", clients) == CONNECTIONS, clients, "the crowd to go back", TOGETHER
        )
        assert served_by(server, "http quiet", clients) == 0


def test_crowd_of_an_ensemble_stays(tmp_path: Path) -> None:
    """It is its first model that is crowded."""
    write_models(tmp_path)
    shutil.copytree(CONF_MODELS / "alpha_model", tmp_path / "alpha_model")
    (tmp_path / "wrapper" / "1").mkdir(parents=True)
    (tmp_path / "wrapper" / "config.pbtxt").write_text(WRAPPER)
    with (
        ForebayServer(tmp_path) as server,
        WireClient(server.http_port) as client,
        crowd(server.http_port, ask_wrapper) as crowded,
    ):
        ask_until(lambda: served_by(server, "http quiet", [client]) == 1, [client], "it to move")
        for _ in range(20):
            ask_until(lambda: True, [client], "some answers")
        assert served_by(server, "http 0", crowded) == CONNECTIONS


def test_only_connections_of_the_quiet_frontend_end_with_it(server: ForebayServer) -> None:
    with WireClient(server.http_port) as client, crowd(server.http_port):
        ask_until(lambda: served_by(server, "http quiet", [client]) == 1, [client], "it to move")
        killed = server.pid_of("http quiet")
        os.kill(killed, signal.SIGKILL)
        with pytest.raises((Ended, OSError)):
            client.answer()
        with WireClient(server.http_port) as second:
            ask_until(lambda: served_by(server, "http quiet", [second]) == 1, [second], "the next one to move")
            assert not is_running(killed)


def test_successor_of_a_frontend_knows_the_quiet_one(server: ForebayServer) -> None:
    with WireClient(server.http_port) as kept:
        move(server, [kept])
        killed = server.pid_of("http 0")
        os.kill(killed, signal.SIGKILL)
        server.wait_for(lambda: server.pid_of("http 0") not in (0, killed), "the successor")
        ask_together("quiet", [kept], 1)
        with WireClient(server.http_port) as client:
            move(server, [client])


def test_models_come_and_go_beside_it(tmp_path: Path) -> None:
    """It takes part in what all frontends must agree on, and shared memory that clients register."""
    flags = ("--model-control-mode=explicit", "--load-model=*")
    with ForebayServer(write_models(tmp_path), *flags) as server, WireClient(server.http_port) as client:
        move(server, [client])
        write_identity(tmp_path, "new", [("TYPE_FP32", "4")], batch=8)
        assert server.post("/v2/repository/models/new/load")[0] == 200
        message, data = request("new", 5)
        client.send(message)
        assert client.answer().tensors == data
        assert server.post("/v2/repository/models/new/unload")[0] == 200
        client.send(message)
        assert client.answer().status == 404


def test_stop_tells_connections_that_were_moved(tmp_path: Path) -> None:
    with ForebayServer(write_models(tmp_path)) as server, WireClient(server.http_port) as client:
        move(server, [client])
        assert server.stop() == 0
        with pytest.raises(Ended):
            client.answer()


@pytest.mark.parametrize(
    "flag",
    [
        "--http-quiet-frontend=false",
        # Each frontend keeps its own: a client that moves would find another one.
        "--cache-config=local,size=1048576",
    ],
)
def test_there_is_none_where_nobody_wants_it(tmp_path: Path, flag: str) -> None:
    with ForebayServer(write_models(tmp_path), flag) as server:
        with WireClient(server.http_port) as client, crowd(server.http_port):
            for value in range(2000):
                ask_together("quiet", [client], 1, value)
        assert server.pid_of("http quiet") == 0


def test_no_more_connections_move_than_it_may_have(tmp_path: Path) -> None:
    with (
        ForebayServer(write_models(tmp_path), f"--max-connections={CONNECTIONS + 4}") as server,
        crowd(server.http_port),
        contextlib.ExitStack() as stack,
    ):
        clients: list[WireClient] = []

        def is_full() -> bool:
            return served_by(server, "http quiet", clients) == CONNECTIONS + 4

        def ask_all() -> bool:
            for client in clients:  # One after the other: together they would be a crowd.
                ask_together("quiet", [client], 1)
            return is_full()

        for _ in range(CONNECTIONS + 6):
            clients.append(stack.enter_context(WireClient(server.http_port)))
            ask_all()
        server.wait_for(ask_all, "it to be full")
        for _ in range(50):
            assert ask_all()
        assert served_by(server, "http 0", clients) == 2


def test_client_that_leaves_while_its_request_runs_is_noticed(tmp_path: Path) -> None:
    """Also when its connection is to be handed over as soon as that is answered (spec H-016)."""
    write_models(tmp_path)
    write_identity(tmp_path, "slow", [("TYPE_FP32", "4")], batch=8, delay_ms=3000)
    with ForebayServer(tmp_path) as server, WireClient(server.http_port) as mover, crowd(server.http_port):
        ask_until(lambda: served_by(server, "http quiet", [mover]) == 1, [mover], "it to be open")
        with WireClient(server.http_port) as other, WireClient(server.http_port) as leaver:
            other.send(request("slow", 1)[0])
            time.sleep(0.1)
            leaver.send(request("slow", 2)[0])
            time.sleep(0.25)
        server.wait_for(
            lambda: server.counter("nv_inference_request_failure", model="slow", reason="CANCELED") >= 1,
            "the request to be cancelled",
        )
