"""The metrics process as the supervisor starts it: lifeline, control socket, scrapes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from fake_frontend import Answer, RawClient, entry

from forebay.ipc.catalog import Catalog
from forebay.ipc.channel import TypedCodec, control_address
from forebay.ipc.counters import COUNTERS_BYTES, PRODUCER_WORDS, CountersFile, ProducerCounter
from forebay.ipc.frontend_messages import (
    CatalogPush,
    CatalogSeen,
    FrontendStart,
    FrontendToControl,
    FrontendToSupervisor,
    Hello,
    Serve,
)
from forebay.ipc.lifeline import Lifeline
from forebay.ipc.messages import Message, Started, Stop


class Supervisor:
    """The supervisor's side of one metrics process."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(20)
        self.directory = directory
        self.lifeline: Lifeline[Started] = Lifeline(ours, FrontendToSupervisor)
        self.counters = CountersFile()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self._codec: TypedCodec[Hello | CatalogSeen] = TypedCodec(FrontendToControl)
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        self._control.setsockopt(zmq.RCVTIMEO, 20_000)
        self._control.bind(control_address(str(directory)))
        self._peer = b""
        with theirs:
            command = [sys.executable, "-P", "-m", "forebay.frontend.metrics_main"]
            self.process = subprocess.Popen(
                [*command, "--lifeline-fd", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
            )

    def start(self) -> None:
        """Send what every frontend gets first: four descriptors, of which it needs the last two."""
        port = int(self.listener.getsockname()[1])
        message = FrontendStart(
            producer=3,
            arena_bytes=0,
            counters_bytes=COUNTERS_BYTES,
            runtime_directory=str(self.directory),
            scheduler_epoch=1,
            settings={"metrics": {"allow_cpu": True}},
            listen=(("127.0.0.1", port),),
        )
        null = os.open(os.devnull, os.O_RDONLY)
        self.lifeline.send(message, (null, null, self.counters.fd, self.listener.fileno()))
        os.close(null)
        assert self.lifeline.receive() == (Started(), [])
        assert self.receive() == Hello(producer=3)

    def receive(self) -> Message:
        self._peer, data = self._control.recv_multipart()
        return self._codec.decode(data)

    def push(self, catalog: Catalog) -> None:
        self._control.send_multipart([self._peer, self._codec.encode(CatalogPush(catalog=catalog))])
        assert self.receive() == CatalogSeen(producer=3, generation=catalog.generation)

    def ask(self, method: str, path: str) -> Answer:
        async def run() -> Answer:
            reader, writer = await asyncio.open_connection(*self.listener.getsockname()[:2])
            try:
                return await asyncio.wait_for(RawClient(reader, writer).ask(method, path), 20)
            finally:
                writer.close()
                await writer.wait_closed()

        return asyncio.run(run())

    def close(self) -> None:
        self.lifeline.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.listener.close()
            self._control.close(linger=0)
            self._context.term()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    try:
        yield supervisor
    finally:
        supervisor.close()


def test_it_serves_from_serve_to_stop(supervisor: Supervisor) -> None:
    """Spec M-001, M-002, M-006, M-007, E-158, E-159."""
    supervisor.start()
    producer = supervisor.counters.allocate(PRODUCER_WORDS)
    models = (entry("m", producer_counter_offsets=(producer,)),)
    supervisor.push(Catalog(generation=1, models=models))
    supervisor.lifeline.send(Serve())
    answer = supervisor.ask("GET", "/metrics?x=y")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert b'nv_inference_request_success{model="m",version="1"} 0\n' in answer.body
    assert "server" not in answer.headers
    supervisor.counters.block(producer, PRODUCER_WORDS)[ProducerCounter.SUCCESS] = 3
    assert b'nv_inference_request_success{model="m",version="1"} 3\n' in supervisor.ask("GET", "/metrics").body
    assert supervisor.ask("GET", "/").triple == (200, "text/plain; charset=utf-8", b"")
    for path in ("/metrics", "/"):
        assert supervisor.ask("POST", path).triple == (405, "text/plain", b'{"error":"Method Not Allowed"}')
    supervisor.push(Catalog(generation=2))
    assert b"model=" not in supervisor.ask("GET", "/metrics").body
    supervisor.lifeline.send(Stop())
    assert supervisor.process.wait(20) == 0


def test_it_can_be_stopped_before_it_serves(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.lifeline.send(Stop())
    assert supervisor.process.wait(20) == 0


def test_it_ends_with_its_supervisor(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.push(Catalog(generation=1))
    supervisor.lifeline.send(Serve())
    assert supervisor.ask("GET", "/").status == 200
    supervisor.lifeline.sock.shutdown(socket.SHUT_RDWR)
    assert supervisor.process.wait(20) == 1
