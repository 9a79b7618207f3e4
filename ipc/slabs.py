"""Slabs: which rows of a model's areas are free, and where a row's tensors lie.

Layout, a pure function of the model's signature and the capacity, so that nobody has to send it::

    base  -> | input 0: capacity * row_bytes | pad to 64 | input 1 ... | output 0 ... | output m |

Rows go free -> loaned (being filled) -> published -> free. Only the producer keeps that state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from forebay.ipc.arena import align
from forebay.ipc.tensor import TensorSpec

Owner = TypeVar("Owner")


class Area(NamedTuple):
    """The rows of one tensor."""

    offset: int
    """From the slab's base."""
    row_bytes: int


class SlabLayout:
    """Where the areas of a slab of ``capacity`` rows lie."""

    __slots__ = ("byte_size", "capacity", "inputs", "outputs")

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], capacity: int) -> None:
        self.capacity = capacity
        offset = 0
        areas: list[Area] = []
        for spec in (*inputs, *outputs):
            row_bytes = spec.row_bytes
            areas.append(Area(offset, row_bytes))
            offset += align(row_bytes * capacity)
        self.inputs = tuple(areas[: len(inputs)])
        self.outputs = tuple(areas[len(inputs) :])
        self.byte_size = max(offset, 1)

    @classmethod
    def of_areas(cls, inputs: Sequence[Area], outputs: Sequence[Area], capacity: int, byte_size: int) -> SlabLayout:
        """Return the layout of a slab whose areas lie as they are given; only its producer knows such a one."""
        layout = cls((), (), capacity)
        layout.inputs, layout.outputs, layout.byte_size = tuple(inputs), tuple(outputs), byte_size
        return layout


class Slab(Generic[Owner]):
    """The producer's books of one slab."""

    __slots__ = ("_next", "_used", "base", "capacity", "layout", "lender", "live", "owners")

    def __init__(self, base: int, layout: SlabLayout, lender: Slab[Owner] | None = None) -> None:
        """Begin with all rows free.

        Args:
            lender: the slab whose rows these are; None: itself.
        """
        self.base = base
        self.layout = layout
        self.capacity = layout.capacity
        self.lender: Slab[Owner] = self if lender is None else lender
        #: Rows loaned or published.
        self.live = 0
        #: Who waits for the row's answer; at a request's first row, None elsewhere.
        self.owners: list[Owner | None] = [None] * layout.capacity
        self._used = bytearray(layout.capacity)
        self._next = 0

    def loan(self, rows: int) -> int:
        """Return the first of ``rows`` consecutive free rows, if possible behind those loaned last; -1: none."""
        first = self._next if self.live else 0
        end = first + rows
        if end > self.capacity:
            first, end = 0, rows
            if end > self.capacity:
                return -1
        used = self._used
        if used.find(1, first, end) >= 0:
            # The ring has caught up with rows that are still running: start over at the lowest gap.
            first = used.find(bytes(rows))
            if first < 0:
                return -1
            end = first + rows
        used[first:end] = b"\x01" * rows
        self._next = end
        self.live += rows
        return first

    def release(self, first: int, rows: int) -> None:
        """Make rows free again."""
        self._used[first : first + rows] = bytes(rows)
        self.live -= rows
