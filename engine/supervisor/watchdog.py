"""The watchdog: ends workers whose execution takes longer than their model may.

Each worker writes into its counters when it began a batch, so looking costs nobody a message, and works whatever the
model does to its process. What such a worker ran is failed, not tried again: it would hang the next one too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

#: How often it looks, s; an execution may take so much longer than it may.
_LOOK_INTERVAL_S = 1.0


class Watched(Protocol):
    """An instance."""

    def end_if_hung(self, now_ns: int) -> None:
        """Look, and end the worker if its execution takes too long."""


class Watchdog:
    """Looks at all instances. Used in the supervisor's event loop only."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()

    def add(self, instance: Watched) -> None:
        self._watched.add(instance)

    def discard(self, instance: Watched) -> None:
        self._watched.discard(instance)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            now_ns = time.monotonic_ns()
            for instance in list(self._watched):
                instance.end_if_hung(now_ns)
