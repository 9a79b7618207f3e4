"""How much of something a client may do: at once, and per second."""

from __future__ import annotations

from collections.abc import Callable


class Allowance:
    """A bucket that holds ``burst`` and refills with ``per_s``."""

    __slots__ = ("_burst", "_left", "_now_s", "_per_s", "_since_s")

    def __init__(self, burst: float, per_s: float, now_s: Callable[[], float]) -> None:
        """Start full; ``now_s`` gives monotonic seconds and is only asked when the bucket is empty."""
        self._burst = burst
        self._per_s = per_s
        self._now_s = now_s
        self._left = float(burst)
        self._since_s = now_s()

    def take(self, cost: float = 1.0) -> bool:
        """Use some of it; False: there is not enough."""
        self._left -= cost
        if self._left >= 0:
            return True
        now_s = self._now_s()
        self._left = min(self._left + (now_s - self._since_s) * self._per_s, self._burst)
        self._since_s = now_s
        return self._left >= 0
