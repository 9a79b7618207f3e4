"""The watchdog looks at every instance, again and again."""

from __future__ import annotations

import asyncio

import pytest

from forebay.engine.supervisor import watchdog as watchdog_module
from forebay.engine.supervisor.watchdog import Watchdog


class Recorder:
    def __init__(self) -> None:
        self.looks: list[int] = []
        self.has_been_watched = asyncio.Event()

    def end_if_hung(self, now_ns: int) -> None:
        self.looks.append(now_ns)
        if len(self.looks) >= 3:
            self.has_been_watched.set()


def test_watched_instances_are_looked_at_until_they_are_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_LOOK_INTERVAL_S", 0.001)
    watched, discarded = Recorder(), Recorder()

    async def run() -> None:
        watchdog = Watchdog()
        watchdog.add(watched)
        watchdog.add(discarded)
        watchdog.discard(discarded)
        task = asyncio.create_task(watchdog.run())
        await watched.has_been_watched.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert watched.looks == sorted(watched.looks)
    assert discarded.looks == []
