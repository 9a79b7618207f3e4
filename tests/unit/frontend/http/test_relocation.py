"""Which connections a frontend hands over, and which of those that come it keeps; the clock is played."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.frontend.http import relocation
from forebay.frontend.http.relocation import Relocation

STEP_S = 0.05
CROWDED = SimpleNamespace(route=7)


class FakeConnection:
    """One that leaves when it is told to, if it can."""

    def __init__(self, *, can_leave: bool = True) -> None:
        self.stays_until_s = 0.0
        self.can_leave = can_leave
        self.times_left = 0

    def leave(self) -> bool:
        self.times_left += self.can_leave
        return self.can_leave


class Scene:
    """A frontend beside a crowd, a quiet frontend being open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_quiet: bool = False) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(relocation.time, "monotonic", lambda: self.now_s)
        self.sent: list[int] = []
        self.told: list[tuple[int, ...]] = []
        self.take: Callable[[socket.socket], None] = lambda _sock: None
        self.process: Any = SimpleNamespace(
            start=SimpleNamespace(is_quiet=is_quiet),
            is_quiet_open=True,
            is_quiet_wanted=False,
            want_quiet=self._want,
            tell_crowds=self.told.append,
            hand_over=lambda fd: self.sent.append(fd) or True,
            take_connections=lambda take: setattr(self, "take", take),
        )
        self.express: Any = SimpleNamespace(quiet_connections=[])
        self.opened: list[Any] = []
        self.frontend: Any = SimpleNamespace(
            express=self.express,
            engine=SimpleNamespace(crowded_routes=[CROWDED]),
            is_draining=False,
            is_full=False,
            connection=self._connection,
        )
        Relocation(self.process, self.frontend)

    def _want(self) -> None:
        self.process.is_quiet_wanted = True

    def _connection(self) -> Any:
        class Opened(asyncio.Protocol):
            stays_until_s = 0.0

        self.opened.append(Opened())
        return self.opened[-1]

    def review(self, times: int = 1) -> None:
        for _ in range(times):
            self.now_s += STEP_S
            self.express.on_review()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_connection_that_three_reviews_in_a_row_find_is_handed_over(scene: Scene) -> None:
    kept, fickle = FakeConnection(), FakeConnection()
    scene.express.quiet_connections = [kept, fickle]
    scene.review(2)
    assert kept.times_left == 0
    scene.express.quiet_connections = [kept]
    scene.review()
    assert (kept.times_left, fickle.times_left) == (1, 0)


def test_reviews_that_are_far_apart_or_find_no_crowd_are_not_in_a_row(scene: Scene) -> None:
    connection = FakeConnection()
    scene.express.quiet_connections = [connection]
    scene.review(2)
    scene.now_s += 10
    scene.review(2)
    scene.frontend.engine.crowded_routes = []
    scene.review()
    scene.frontend.engine.crowded_routes = [CROWDED]
    scene.review(2)
    assert connection.times_left == 0
    scene.review()
    assert connection.times_left == 1


def test_quiet_frontend_is_asked_for_once_and_waited_for(scene: Scene) -> None:
    connection = FakeConnection()
    scene.express.quiet_connections = [connection]
    scene.process.is_quiet_open = False
    scene.review(2)
    assert not scene.process.is_quiet_wanted
    scene.review(10)
    assert scene.process.is_quiet_wanted
    assert connection.times_left == 0
    scene.process.is_quiet_open = True
    scene.review(3)
    assert connection.times_left >= 1


def test_those_that_cannot_leave_keep_nobody_else(scene: Scene) -> None:
    stuck = [FakeConnection(can_leave=False) for _ in range(20)]
    free = [FakeConnection() for _ in range(10)]
    scene.express.quiet_connections = [*stuck, *free]
    scene.review(3)
    assert sum(connection.times_left for connection in free) == 8


def test_quiet_frontend_hands_back_who_belongs_to_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, is_quiet=True)
    crowding, settling = FakeConnection(), FakeConnection()
    settling.stays_until_s = scene.now_s + 1
    scene.express.crowd |= {crowding, settling}
    scene.review(3)
    assert (crowding.times_left, settling.times_left) == (1, 0)


def test_nobody_is_handed_over_while_the_server_stops(scene: Scene) -> None:
    connection = FakeConnection()
    scene.express.quiet_connections = [connection]
    scene.frontend.is_draining = True
    scene.review(5)
    assert connection.times_left == 0


@pytest.mark.parametrize(("is_quiet", "stays_s"), [(True, 1.0), (False, 30.0)])
def test_connection_that_came_stays_for_a_while(
    monkeypatch: pytest.MonkeyPatch, *, is_quiet: bool, stays_s: float
) -> None:
    """Longer where it was sent back to: it may be too few for a crowd there, and too many again where it comes from."""
    scene = Scene(monkeypatch, is_quiet=is_quiet)

    async def take() -> None:
        client, server = socket.socketpair()
        with client:
            server.setblocking(False)
            scene.take(server)
            await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

    asyncio.run(take())
    assert scene.opened[0].stays_until_s == scene.now_s + stays_s


def test_full_quiet_frontend_sends_back_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, is_quiet=True)
    scene.frontend.is_full = True
    with socket.socket() as sock:
        fd = sock.fileno()
        scene.take(sock)
        assert scene.sent == [fd]
        assert sock.fileno() == -1
    assert scene.opened == []


def test_supervisor_is_told_of_crowds_now_and_then_as_long_as_there_are_any(scene: Scene) -> None:
    scene.review(20)
    assert len(scene.told) == 4
    assert set(scene.told) == {(7,)}
    scene.frontend.engine.crowded_routes = []
    scene.review(20)
    assert len(scene.told) == 4
