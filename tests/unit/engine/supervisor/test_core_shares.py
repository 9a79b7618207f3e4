"""Who gets a larger share of the cores, and for how long; the clock is real, and crowds last shortly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from forebay.engine.supervisor import core_shares
from forebay.engine.supervisor.core_shares import CoreShares

LASTS_S = 0.05


class FakeInstance:
    def __init__(self, route: int) -> None:
        self.route = route
        self.shares: list[bool] = []
        self.has_given_back = asyncio.Event()

    def take_share(self, *, is_larger: bool) -> None:
        self.shares.append(is_larger)
        if not is_larger:
            self.has_given_back.set()


def play(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    monkeypatch.setattr(core_shares, "_CROWD_LASTS_S", LASTS_S)
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_quiet_ones_are_favoured_until_nobody_speaks_of_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        shares = CoreShares()
        crowded, quiet, other = FakeInstance(1), FakeInstance(2), FakeInstance(2)
        for instance in (crowded, quiet, other):
            shares.add(instance)
        shares.note_crowds([1])
        shares.note_crowds([1])
        assert (crowded.shares, quiet.shares, other.shares) == ([], [True], [True])
        await quiet.has_given_back.wait()
        await other.has_given_back.wait()
        assert (crowded.shares, quiet.shares, other.shares) == ([], [True, False], [True, False])
        shares.note_crowds([1])
        assert quiet.shares == [True, False, True]

    play(monkeypatch, scenario)


def test_crowds_that_are_spoken_of_again_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        shares = CoreShares()
        quiet = FakeInstance(2)
        shares.add(quiet)
        end_s = asyncio.get_running_loop().time() + 5 * LASTS_S
        while asyncio.get_running_loop().time() < end_s:
            shares.note_crowds([1])
            await asyncio.sleep(0)
        assert quiet.shares == [True]

    play(monkeypatch, scenario)


def test_who_becomes_crowded_is_favoured_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        shares = CoreShares()
        instance = FakeInstance(2)
        shares.add(instance)
        shares.note_crowds([1])
        shares.note_crowds([1, 2])
        assert instance.shares == [True, False]

    play(monkeypatch, scenario)


def test_new_worker_beside_a_crowd_is_favoured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        shares = CoreShares()
        restarted, gone = FakeInstance(2), FakeInstance(3)
        shares.add(gone)
        shares.note_crowds([1])
        shares.add(restarted)
        shares.add(restarted)
        shares.discard(gone)
        assert restarted.shares == [True, True]
        await restarted.has_given_back.wait()
        assert (restarted.shares, gone.shares) == ([True, True, False], [True])

    play(monkeypatch, scenario)
