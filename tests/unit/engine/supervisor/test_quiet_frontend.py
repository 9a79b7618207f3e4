"""Who gets a client's connection that a frontend hands over, and who hears that there is a quiet frontend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from forebay.engine.supervisor.quiet_frontend import QuietFrontend
from forebay.ipc.frontend_messages import ConnectionMoved, QuietOpen
from forebay.ipc.messages import Message


class FakeRole:
    """A frontend that is up or not when the test says so; also its child."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_up = False
        self.starts = 0
        #: It has so much unread that a send would have to wait.
        self.is_busy = False
        self.sent: list[tuple[Message, tuple[int, ...]]] = []
        self.greetings: Callable[[], tuple[Message, ...]] = tuple
        self.on_presence: Callable[[], None] = lambda: None
        self.on_quiet_wanted: Callable[[], None] = lambda: None
        self.on_connection_moved: Callable[[int], None] = lambda _fd: None

    @property
    def child(self) -> FakeRole | None:
        return self if self.is_up else None

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        self.sent.append((message, fds))
        return True

    def send_nowait(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        return not self.is_busy and self.send(message, fds)

    def serve(self) -> None:
        pass

    def start_when_possible(self) -> None:
        self.starts += 1

    def be_up(self, *, is_up: bool = True) -> None:
        self.is_up = is_up
        self.on_presence()

    def take_sent(self) -> list[tuple[Message, tuple[int, ...]]]:
        sent, self.sent = self.sent, []
        return sent


class Scene:
    """A quiet frontend, which knows all models when the test says so, and two others that are up."""

    def __init__(self) -> None:
        self.quiet, self.first, self.second = FakeRole(1), FakeRole(2), FakeRole(3)
        self.knows_models = asyncio.Event()
        self.asked: list[int] = []
        roles: Any = [self.first, self.second]
        role: Any = self.quiet
        self.switch = QuietFrontend(role, roles, self._wait_ready)
        self.first.be_up()
        self.second.be_up()

    async def _wait_ready(self, number: int) -> None:
        self.asked.append(number)
        await self.knows_models.wait()

    async def open(self) -> None:
        self.knows_models.set()
        self.quiet.be_up()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert self.first.take_sent() == self.second.take_sent() == [(QuietOpen(is_open=True), ())]


@pytest.fixture
def play() -> Callable[[Callable[[Scene], Any]], None]:
    def play(scenario: Callable[[Scene], Any]) -> None:
        async def main() -> None:
            await scenario(Scene())

        asyncio.run(main())

    return play


def test_it_is_started_when_it_is_wanted_and_open_when_it_knows_the_models(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        assert s.quiet.starts == 0
        s.second.on_quiet_wanted()
        assert s.quiet.starts == 1
        s.quiet.be_up()
        await asyncio.sleep(0)
        assert s.asked == [1]
        assert s.first.sent == []
        assert list(s.first.greetings()) == []
        s.knows_models.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert s.first.sent == s.second.sent == [(QuietOpen(is_open=True), ())]
        # A frontend that is started again hears it at once.
        assert list(s.first.greetings()) == [QuietOpen(is_open=True)]

    play(scenario)


def test_nobody_hands_over_to_one_that_is_gone(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        await s.open()
        s.quiet.be_up(is_up=False)
        assert s.first.take_sent() == [(QuietOpen(is_open=False), ())]
        assert list(s.first.greetings()) == []
        # What was on its way goes back to where it came from.
        s.second.take_sent()
        s.second.on_connection_moved(42)
        assert s.second.sent == [(ConnectionMoved(), (42,))]
        assert s.first.sent == []

    play(scenario)


def test_one_that_ends_before_it_is_open_is_never_announced(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        s.quiet.be_up()
        await asyncio.sleep(0)
        s.quiet.be_up(is_up=False)
        s.knows_models.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert s.first.sent == []

    play(scenario)


def test_connections_go_to_the_quiet_one_and_come_back_by_turns(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        await s.open()
        s.first.on_connection_moved(7)
        assert s.quiet.sent == [(ConnectionMoved(), (7,))]
        for fd in (8, 9, 10):
            s.quiet.on_connection_moved(fd)
        assert [fds for _message, fds in s.first.sent] == [(8,), (10,)]
        assert [fds for _message, fds in s.second.sent] == [(9,)]
        s.first.is_up = s.second.is_up = False
        s.quiet.take_sent()
        s.quiet.on_connection_moved(11)
        assert s.quiet.sent == [(ConnectionMoved(), (11,))]

    play(scenario)


def test_quiet_frontend_that_hangs_holds_nobody_up(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        await s.open()
        s.quiet.is_busy = True
        s.first.on_connection_moved(7)
        assert s.quiet.sent == []
        assert s.first.sent == [(ConnectionMoved(), (7,))]

    play(scenario)


def test_connection_that_nobody_can_serve_is_given_up(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        s.first.is_up = s.second.is_up = False
        s.first.on_connection_moved(5)
        assert s.quiet.sent == s.first.sent == s.second.sent == []

    play(scenario)
