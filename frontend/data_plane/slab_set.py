"""The slabs that requests of one form lie in: grows when none has room, shrinks when they empty."""

from __future__ import annotations

from collections.abc import Callable

from forebay.frontend.data_plane.owners import OwnedSlab
from forebay.ipc.errors import ArenaFull

#: Bytes of the first slab, at most.
SLAB_BYTES_FIRST = 2 * 1024 * 1024
#: Bytes of the first slab of a model whose batches need more, at most.
SLAB_BYTES_OF_BATCHES = 32 * 1024 * 1024
#: Rows of the first slab, at least, and of any, at most.
SLAB_ROWS_MIN, SLAB_ROWS_MAX = 64, 65536


class SlabSet:
    """Slabs, the newest of which is the largest and comes first."""

    __slots__ = ("_capacity_first", "_free", "_is_retired", "_make", "slabs")

    def __init__(
        self, row_bytes: int, max_batch_size: int, make: Callable[[int], OwnedSlab], free: Callable[[OwnedSlab], None]
    ) -> None:
        """Begin without any.

        Args:
            row_bytes: what one row takes in all areas.
            max_batch_size: rows of a batch; 0: the model does not batch.
            make: returns a slab of so many rows; raises ArenaFull.
            free: gives the memory of an empty one back.
        """
        wanted = min(max(SLAB_ROWS_MIN, 8 * max_batch_size), SLAB_BYTES_FIRST // max(row_bytes, 1))
        batches = min(2 * max(max_batch_size, 1), SLAB_BYTES_OF_BATCHES // max(row_bytes, 1))
        self._capacity_first = max(wanted, batches, 1)
        self._make = make
        self._free = free
        self._is_retired = False
        self.slabs: list[OwnedSlab] = []

    def loan(self, rows: int) -> tuple[OwnedSlab, int]:
        """Return a slab and the first of ``rows`` free consecutive rows in it.

        Raises:
            ArenaFull: the arena has no room for a larger slab.
        """
        for slab in reversed(self.slabs):
            first = slab.loan(rows)
            if first >= 0:
                return slab, first
        capacity = self.slabs[-1].capacity * 2 if self.slabs else self._capacity_first
        slab = self._make(min(max(capacity, rows), SLAB_ROWS_MAX))
        self.slabs.append(slab)
        first = slab.loan(rows)
        if first < 0:
            raise ArenaFull("too many requests in flight for one model; send fewer at a time")
        return slab, first

    def retire(self) -> None:
        """No further rows will be asked for: free every slab, as soon as it is empty."""
        self._is_retired = True
        self.free_idle()

    def free_idle(self) -> None:
        """Free slabs that hold nothing, all but the newest."""
        if len(self.slabs) <= 1 and not self._is_retired:
            return
        keep = () if self._is_retired else self.slabs[-1:]
        for slab in list(self.slabs):
            if slab.live == 0 and slab not in keep:
                self.slabs.remove(slab)
                self._free(slab)
