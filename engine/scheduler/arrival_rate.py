"""How much is asked for at the moment: a sum of arrivals that fades. Pure."""

from __future__ import annotations

import math

#: How fast arrivals are forgotten, ns.
_MEMORY_NS = 100_000_000.0


class ArrivalRate:
    """Rows per nanosecond, over about the last tenth of a second."""

    __slots__ = ("_at_ns", "_last_rows", "_rows")

    def __init__(self) -> None:
        self._rows = 0.0
        self._last_rows = 0
        self._at_ns = 0

    @property
    def last_ns(self) -> int:
        """When rows came last."""
        return self._at_ns

    def note(self, rows: int, now_ns: int) -> None:
        """Rows have come."""
        elapsed_ns = max(now_ns - self._at_ns, 0)
        self._rows = self._rows * math.exp(-elapsed_ns / _MEMORY_NS) + rows
        self._last_rows = rows
        self._at_ns = max(now_ns, self._at_ns)

    def at(self, now_ns: int) -> float:
        """Return the rate as it looks at a time."""
        # Just after an arrival the sum of steady arrivals is half an arrival above its mean.
        rows = max(self._rows - self._last_rows / 2, 0.0)
        return rows * math.exp(-max(now_ns - self._at_ns, 0) / _MEMORY_NS) / _MEMORY_NS
