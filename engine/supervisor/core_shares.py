"""While a model is crowded, workers of the others get a larger share of the cores than everybody else.

A quiet model's requests are few; what they lack beside a crowd is a core at the moment at which they come. Frontends
that have a crowd say so again and again; when nobody has for a while, all shares are equal again.

Measured on the development machine, the quiet frontend having its larger share already (a script like
``bench.isolation``, nice changed from outside, medians of 8 rounds by turns): 99th percentile of a quiet model beside
a saturated tiny one 460 -> 397 us with a real-time client and 483 -> 403 with a normal one, beside one that computes
all the time 326 -> 322 and 471 -> 339.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

from forebay.engine.supervisor import priority

#: A model is called crowded for so long after a frontend has said so, s; they say it more often.
_CROWD_LASTS_S = 1.0


class Sharer(Protocol):
    """An instance."""

    @property
    def route(self) -> int:
        """The number under which requests find its model."""
        ...

    @property
    def serving_pid(self) -> int:
        """Its worker's process, which others may share; 0: there is none, or it does not serve."""
        ...


class CoreShares:
    """Used in the supervisor's event loop only."""

    def __init__(self) -> None:
        self._sharers: set[Sharer] = set()
        #: Processes with a larger share, and by thread what nice values they had.
        self._enlarged: dict[int, dict[int, int]] = {}
        #: By route, the loop's time until which it is called crowded.
        self._crowded: dict[int, float] = {}
        self._review: asyncio.TimerHandle | None = None

    def add(self, sharer: Sharer) -> None:
        """It has a worker, or a new one."""
        self._sharers.add(sharer)
        self._share_out()

    def discard(self, sharer: Sharer) -> None:
        """It has no worker any more."""
        self._sharers.discard(sharer)

    def note_crowds(self, routes: Collection[int]) -> None:
        """A frontend says that these are crowded just now."""
        loop = asyncio.get_running_loop()
        self._crowded.update(dict.fromkeys(routes, loop.time() + _CROWD_LASTS_S))
        self._share_out()
        if self._review is None and self._crowded:
            self._review = loop.call_later(_CROWD_LASTS_S, self._forget_crowds)

    def _forget_crowds(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._crowded = {route: until_s for route, until_s in self._crowded.items() if until_s > now_s}
        self._share_out()
        self._review = loop.call_later(_CROWD_LASTS_S, self._forget_crowds) if self._crowded else None

    def _share_out(self) -> None:
        if not self._crowded and not self._enlarged:
            return
        ours = {sharer.serving_pid for sharer in self._sharers}
        quiet = {
            sharer.serving_pid for sharer in self._sharers if self._crowded and sharer.route not in self._crowded
        } - {0}
        for pid in self._enlarged.keys() - quiet:
            before = self._enlarged.pop(pid)
            if pid in ours:
                priority.restore_share(pid, before)
        for pid in quiet - self._enlarged.keys():
            self._enlarged[pid] = priority.enlarge_share(pid)
