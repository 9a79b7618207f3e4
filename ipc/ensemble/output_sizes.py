"""How large outputs of varying size are expected to be, by what was seen of them. Pure."""

from __future__ import annotations

#: How fast what is expected follows outputs that are smaller, as a power of two.
_FORGETTING = 6


class OutputSizes:
    """Bytes per batch item of one model's outputs, by name."""

    def __init__(self) -> None:
        self._row_bytes: dict[str, int] = {}

    def expected(self, name: str, rows: int) -> int:
        """Return how many bytes an output of so many rows will take; 0: nobody knows."""
        return self._row_bytes.get(name, 0) * rows

    def learn(self, name: str, rows: int, byte_size: int) -> None:
        """Take in how large one was. What is expected grows at once, and shrinks slowly."""
        seen = -(-byte_size // max(rows, 1))
        known = self._row_bytes.get(name, 0)
        self._row_bytes[name] = seen if seen >= known else known - ((known - seen) >> _FORGETTING)
