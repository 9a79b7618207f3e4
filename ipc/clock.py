"""Monotonic nanoseconds, and the clock that tests move by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that tells monotonic time."""

    def now_ns(self) -> int:
        """Return monotonic nanoseconds."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC: comparable between all processes of one machine."""

    def now_ns(self) -> int:
        return time.monotonic_ns()


class FakeClock:
    """A clock that stands still until :meth:`advance` is called."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance(self, *, us: int = 0, ns: int = 0) -> None:
        """Move time forward."""
        self._now_ns += us * 1000 + ns
