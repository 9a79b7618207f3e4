"""Processes that there must always be one of: when they are started again."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from forebay.engine.supervisor import processes
from forebay.engine.supervisor.backoff import HEALTHY_S
from forebay.ipc.messages import Failed, Started
from forebay.ipc.scheduler_messages import SchedulerToSupervisor


class FakeChild:
    """A process that is up or dies when the test says so."""

    started: list[FakeChild]

    def __init__(
        self, *_: object, on_message: Callable[[Any, list[int]], None], on_exit: Callable[[int], None], **__: object
    ) -> None:
        self.say_up = lambda: on_message(Started(), [])
        self.die = lambda: on_exit(-9)
        FakeChild.started.append(self)


class AnyRole(processes.Role[Started | Failed]):
    """One of which nobody else is told."""

    def _introduce(self, child: processes.Child[Started | Failed]) -> None:
        pass

    def _farewell(self, child: processes.Child[Started | Failed]) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The supervisor's time, s: the list's one element."""
    now_s = [1000.0]
    FakeChild.started = []
    monkeypatch.setattr(processes, "Child", FakeChild)
    monkeypatch.setattr("forebay.engine.supervisor.processes.time.monotonic", lambda: now_s[0])
    return now_s


async def kill(role: AnyRole, monkeypatch: pytest.MonkeyPatch) -> float:
    """Have the running process die; return how long its successor is waited for, s."""
    loop = asyncio.get_running_loop()
    delays: list[float] = []

    def call_at_once(delay_s: float, callback: Callable[[], None]) -> None:
        delays.append(delay_s)
        loop.call_soon(callback)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "call_later", call_at_once)
        FakeChild.started[-1].die()
    await asyncio.sleep(0)
    FakeChild.started[-1].say_up()
    assert role.is_up
    return delays[0]


def test_a_process_that_was_up_for_long_is_started_again_at_once(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it has died before, and whatever the time that it took to be up."""

    async def live_and_die() -> list[float]:
        role = AnyRole("http 0", "some.module", SchedulerToSupervisor)
        role.start()
        FakeChild.started[-1].say_up()
        delays = [await kill(role, monkeypatch) for _ in range(4)]
        clock[0] += HEALTHY_S
        return [*delays, await kill(role, monkeypatch), await kill(role, monkeypatch)]

    assert asyncio.run(live_and_die()) == [0.0, 0.1, 0.2, 0.4, 0.0, 0.1]


class Shortage:
    """Fails as often as is asked for."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def die_and_come_back(monkeypatch: pytest.MonkeyPatch, *, start: Shortage, introduction: Shortage) -> None:
    """Have a process that was up die while something is short; return when its successor is introduced."""

    class ShortChild(FakeChild):
        def __init__(self, *arguments: object, **named: Any) -> None:
            if FakeChild.started:
                start()
            super().__init__(*arguments, **named)

        def kill(self) -> None:
            self.die()

    class ShortRole(AnyRole):
        def _introduce(self, child: processes.Child[Started | Failed]) -> None:
            if len(FakeChild.started) > 1:
                introduction()
                is_back.set()

    is_back = asyncio.Event()
    FakeChild.started = []
    monkeypatch.setattr(processes, "Child", ShortChild)

    async def scenario() -> None:
        role = ShortRole("http 0", "some.module", SchedulerToSupervisor)
        role.start()
        FakeChild.started[-1].say_up()
        FakeChild.started[-1].die()
        await asyncio.wait_for(is_back.wait(), 60)

    asyncio.run(scenario())


def test_a_process_that_cannot_be_started_again_for_the_moment_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    die_and_come_back(monkeypatch, start=Shortage(2), introduction=Shortage(0))
    assert len(FakeChild.started) == 2
    assert capfd.readouterr().err.count("http 0 cannot be started: Resource temporarily unavailable; trying again") == 2


def test_a_process_that_cannot_be_introduced_is_ended_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    die_and_come_back(monkeypatch, start=Shortage(0), introduction=Shortage(1))
    assert len(FakeChild.started) == 3
