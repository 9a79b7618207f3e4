"""Who gets a larger share of the cores, and for how long; the clock is real, and crowds last shortly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from forebay.engine.supervisor import core_shares, priority
from forebay.engine.supervisor.core_shares import CoreShares

LASTS_S = 0.05
#: What the process 20 is said to have had before.
BEFORE = {20: 0, 21: 3}


@dataclass(eq=False)
class FakeInstance:
    route: int
    serving_pid: int


class Scene:
    """Processes that are given shares, in order; those that give one back are negative."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shares = CoreShares()
        self.given: list[int] = []
        self.has_given_back = asyncio.Event()
        monkeypatch.setattr(core_shares, "_CROWD_LASTS_S", LASTS_S)
        monkeypatch.setattr(priority, "enlarge_share", self._enlarge)
        monkeypatch.setattr(priority, "restore_share", self._restore)

    def _enlarge(self, pid: int) -> dict[int, int]:
        self.given.append(pid)
        return BEFORE

    def _restore(self, pid: int, before: Mapping[int, int]) -> None:
        assert before == BEFORE
        self.given.append(-pid)
        self.has_given_back.set()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scene], Coroutine[Any, Any, None]]], None]:
    def play(scenario: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
        async def run() -> None:
            await asyncio.wait_for(scenario(Scene(monkeypatch)), 30)

        asyncio.run(run())

    return play


def test_quiet_ones_are_favoured_until_nobody_speaks_of_a_crowd(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        s.shares.add(FakeInstance(route=1, serving_pid=10))
        s.shares.add(FakeInstance(route=2, serving_pid=20))
        s.shares.note_crowds([1])
        s.shares.note_crowds([1])
        assert s.given == [20]
        await s.has_given_back.wait()
        assert s.given == [20, -20]
        s.shares.note_crowds([1])
        assert s.given == [20, -20, 20]

    play(scenario)


def test_crowds_that_are_spoken_of_again_last(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        s.shares.add(FakeInstance(route=2, serving_pid=20))
        end_s = asyncio.get_running_loop().time() + 5 * LASTS_S
        while asyncio.get_running_loop().time() < end_s:
            s.shares.note_crowds([1])
            await asyncio.sleep(0)
        assert s.given == [20]

    play(scenario)


def test_who_becomes_crowded_is_favoured_no_more(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        s.shares.add(FakeInstance(route=2, serving_pid=20))
        s.shares.note_crowds([1])
        s.shares.note_crowds([1, 2])
        assert s.given == [20, -20]

    play(scenario)


def test_instances_of_one_process_have_one_share(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        first, second = FakeInstance(route=2, serving_pid=20), FakeInstance(route=2, serving_pid=20)
        s.shares.add(first)
        s.shares.add(second)
        s.shares.note_crowds([1])
        s.shares.discard(second)
        s.shares.note_crowds([1])
        assert s.given == [20]

    play(scenario)


def test_new_worker_beside_a_crowd_is_favoured_too_and_a_dead_one_left_alone(play: Any) -> None:
    async def scenario(s: Scene) -> None:
        restarted, gone = FakeInstance(route=2, serving_pid=10), FakeInstance(route=3, serving_pid=30)
        s.shares.add(restarted)
        s.shares.note_crowds([1])
        s.shares.add(gone)
        restarted.serving_pid = 0
        s.shares.note_crowds([1])
        restarted.serving_pid = 20
        s.shares.add(restarted)
        s.shares.discard(gone)
        assert s.given == [10, 30, 20]
        await s.has_given_back.wait()
        assert s.given == [10, 30, 20, -20]

    play(scenario)
