"""Keep-alive of a gRPC connection (spec G-082), on a clock of its own."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest

from forebay.frontend.grpc.connection import GrpcConnection
from forebay.frontend.grpc.http2.frames import PREFACE
from forebay.frontend.grpc.server import GrpcFrontend
from forebay.frontend.grpc.settings import GrpcView

SETTINGS_FRAME = b"\0\0\0\4\0\0\0\0\0"


class Clock:
    """An event loop's timers."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        when_s = self.now_s + delay_s
        handle = asyncio.TimerHandle(when_s, action, (), mock.Mock())
        heapq.heappush(self._due, (when_s, next(self._numbers), handle))
        return handle

    def run_until(self, time_s: float) -> None:
        while self._due and self._due[0][0] <= time_s:
            self.now_s, _number, handle = heapq.heappop(self._due)
            if not handle.cancelled():
                handle._run()
        self.now_s = time_s


class Scene:
    """A client that has said hello; it is asked every so often whether it is there, and has 20 s to say so."""

    def __init__(self, keepalive_time_ms: int = 10_000) -> None:
        self.clock = Clock()
        settings = GrpcView(
            keepalive_time=keepalive_time_ms, keepalive_timeout=20_000, keepalive_permit_without_calls=True,
            http2_max_pings_without_data=0,
        )  # fmt: skip
        frontend = SimpleNamespace(
            settings=settings, loop=self.clock, heads=mock.Mock(), scratch_view=memoryview(bytearray(4096)),
            opened=mock.Mock(), closed=mock.Mock(), is_draining=False, engine=mock.Mock(),
        )  # fmt: skip
        self.scratch = frontend.scratch_view
        self.transport = mock.Mock()
        self.connection = GrpcConnection(cast(GrpcFrontend, frontend))
        self.connection.connection_made(self.transport)
        self.receive(PREFACE + SETTINGS_FRAME)

    def receive(self, data: bytes) -> None:
        self.connection.get_buffer(-1)
        self.scratch[: len(data)] = data
        self.connection.buffer_updated(len(data))

    @property
    def is_left(self) -> bool:
        return bool(self.transport.abort.called)

    def pong(self) -> None:
        self.receive(b"\0\0\10\6\1\0\0\0\0" + bytes(8))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_client_has_as_long_as_configured_to_answer_a_ping(scene: Scene) -> None:
    scene.clock.run_until(29.9)
    assert not scene.is_left
    scene.clock.run_until(30.1)
    assert scene.is_left


def test_answered_pings_count_no_more_when_later_ones_are_due(scene: Scene) -> None:
    scene.clock.run_until(10.5)
    scene.pong()
    scene.clock.run_until(39.9)  # The second ping is out since 20 s, the third since 30 s.
    assert not scene.is_left
    scene.pong()
    scene.clock.run_until(59.9)
    assert not scene.is_left


def test_answer_that_lay_there_when_the_time_was_up_is_read_first(scene: Scene) -> None:
    scene.clock.run_until(30.0)
    scene.pong()
    scene.clock.run_until(35.0)
    assert not scene.is_left


@pytest.mark.parametrize("keepalive_time_ms", [0, -1])
def test_an_interval_of_nothing_is_no_busy_loop(keepalive_time_ms: int) -> None:
    """``--grpc-keepalive-time`` takes any number, as in Triton."""
    scene = Scene(keepalive_time_ms)
    scene.clock.run_until(1.0)
    assert 1 <= scene.transport.write.call_count <= 200
