"""``grpc.health.v1.Health/Watch``, which Triton does not have: every change, to everybody who watches (spec G-019)."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from forebay_server import PATIENCE_S, ForebayServer
from grpc_clients import url_of
from grpc_wire import connect, frame, header_block
from http_models import write_identity

SERVING, NOT_SERVING = 1, 2
WATCH = "/grpc.health.v1.Health/Watch"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("watched") / "models"
    write_identity(models, "echo", [("TYPE_FP32", "-1")])
    broken: Path = models / "broken"
    (broken / "1").mkdir(parents=True)
    (broken / "config.pbtxt").write_text('backend: "nowhere"')
    with ForebayServer(models, "--model-control-mode=explicit", protocols=("grpc", "http")) as running:
        yield running


@pytest.fixture
def channel(server: ForebayServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(url_of(server)) as opened:
        yield opened


class Watcher:
    """One watch, with the states that it was told in a queue; None: it has ended."""

    def __init__(self, channel: grpc.Channel, service: bytes = b"", **options: Any) -> None:
        message = b"\x0a" + bytes((len(service),)) + service if service else b""
        self.call: Any = channel.unary_stream(WATCH)(message, **options)
        self._states: queue.Queue[int | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for reply in self.call:
                self._states.put(reply[1])
        except grpc.RpcError:
            self._states.put(None)

    def take(self) -> int | None:
        return self._states.get(timeout=PATIENCE_S)

    def wait_end(self) -> grpc.StatusCode:
        self._thread.join(PATIENCE_S)
        code: grpc.StatusCode = self.call.code()
        return code


def test_every_watcher_is_told_of_every_change(server: ForebayServer, channel: grpc.Channel) -> None:
    """The name of the service is ignored, as ``Check`` does; who has gone is in nobody's way."""
    watchers = [Watcher(channel, service) for service in (b"", b"unknown") for _ in range(50)]
    leaving, expiring = Watcher(channel), Watcher(channel, timeout=0.5)
    for watcher in (*watchers, leaving, expiring):
        assert watcher.take() == SERVING
    leaving.call.cancel()
    assert expiring.wait_end() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.post("/v2/repository/models/broken/load")[0] == 400
    assert {watcher.take() for watcher in watchers} == {NOT_SERVING}
    assert server.post("/v2/repository/models/broken/unload")[0] == 200
    assert {watcher.take() for watcher in watchers} == {SERVING}


def test_what_is_no_request_is_no_watch(channel: grpc.Channel) -> None:
    call: Any = channel.unary_stream(WATCH)(b"\xff")
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() is grpc.StatusCode.INTERNAL


def test_a_watcher_that_never_reads_is_in_nobodys_way(server: ForebayServer, channel: grpc.Channel) -> None:
    with connect(server.ports()["GRPCInferenceService"]) as deaf:
        deaf.sendall(frame(4, 0, 0, b"\0\4\0\0\0\0"))
        deaf.sendall(frame(1, 4, 1, header_block(WATCH.encode())) + frame(0, 1, 1, bytes(5)))
        watcher = Watcher(channel)
        assert watcher.take() == SERVING
        for _ in range(5):
            server.post("/v2/repository/models/broken/load")
            assert watcher.take() == NOT_SERVING
            server.post("/v2/repository/models/broken/unload")
            assert watcher.take() == SERVING


def test_watches_end_with_their_frontend_and_begin_anew(server: ForebayServer, channel: grpc.Channel) -> None:
    watcher = Watcher(channel)
    assert watcher.take() == SERVING
    os.kill(server.pid_of("grpc"), signal.SIGKILL)
    assert watcher.wait_end() is grpc.StatusCode.UNAVAILABLE

    def is_serving() -> bool:
        # A call may be sent on the connection that is gone, before its channel notices: it is not waited for then.
        return Watcher(channel, wait_for_ready=True).take() == SERVING

    server.wait_for(is_serving, "the successor to serve")
