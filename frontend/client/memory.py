"""A client's arena: which rows and blocks are free. The connection's lock is held in every call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from forebay.client.opened import Opened
from forebay.client.pending import BlockLease, BlockReturns, Pending, RowsLease, RowsReturns
from forebay.ipc.arena import Arena, BlockAllocator
from forebay.ipc.slabs import Slab

#: Large blocks give their pages back to the kernel when they are freed.
_DISCARD_BYTES = 64 * 1024 * 1024


class Memory:
    """The books of one arena."""

    def __init__(self, arena: Arena) -> None:
        """Take over the arena, all of which is free."""
        self._arena = arena
        self._blocks = BlockAllocator(arena.byte_size)
        self._blocks.allocate(64)  # Offset 0 is nobody's.
        self._rows_returns: RowsReturns = deque()
        self._block_returns: BlockReturns = deque()
        self._slabs: dict[int, Slab[Pending]] = {}
        #: Slabs of signatures of the past, by base; freed when nobody has rows in them.
        self._retired: dict[int, Slab[Pending]] = {}
        self._is_closed = False
        #: Bytes of tensors copied in user space.
        self.copied_bytes = 0

    @property
    def view(self) -> memoryview:
        """uint8 [arena bytes]"""
        return self._arena.view

    def loan_rows(self, model: Opened, rows: int) -> RowsLease:
        """Return free rows of a slab of the model.

        Raises:
            ArenaFull: there are none, and no room for another slab.
        """
        lease = self.loan_free_rows(model, rows)
        if lease is not None:
            return lease
        layout = model.next_layout(rows)
        slab = Slab[Pending](self._blocks.allocate(layout.byte_size), layout)
        model.slabs.append(slab)
        self._slabs[slab.base] = slab
        return RowsLease(self._rows_returns, slab, slab.loan(rows), rows)

    def loan_free_rows(self, model: Opened, rows: int) -> RowsLease | None:
        """Return free rows of the slabs that the model has; None: there are none."""
        if self._rows_returns or self._block_returns:
            self._take_returns()
        for slab in reversed(model.slabs):
            first = slab.loan(rows)
            if first >= 0:
                return RowsLease(self._rows_returns, slab, first, rows)
        return None

    def loan_block(self, byte_size: int) -> BlockLease:
        """Return a free block.

        Raises:
            ArenaFull: there is no room.
        """
        self._take_returns()
        return BlockLease(self._block_returns, self._blocks.allocate(byte_size), byte_size)

    def write(self, lease: BlockLease, data: bytes) -> None:
        """Copy bytes to the beginning of a block."""
        self._arena.view[lease.offset : lease.offset + len(data)] = data
        self.copied_bytes += len(data)

    def retire(self, slabs: Iterable[Slab[Pending]]) -> None:
        """Nobody will take rows of these slabs any more: free each as soon as nobody has any."""
        for slab in slabs:
            if slab.live:
                self._retired[slab.base] = slab
            else:
                self._free_slab(slab)

    def _take_returns(self) -> None:
        rows_returns, block_returns = self._rows_returns, self._block_returns
        while rows_returns:
            slab, first, rows = rows_returns.popleft()
            slab.release(first, rows)
            if not slab.live and self._retired.pop(slab.base, None) is not None:
                self._free_slab(slab)
        while block_returns:
            offset, byte_size = block_returns.popleft()
            self._blocks.free(offset, byte_size)
            if byte_size >= _DISCARD_BYTES and not self._is_closed:
                self._arena.discard(offset, byte_size)

    def _free_slab(self, slab: Slab[Pending]) -> None:
        self._slabs.pop(slab.base, None)
        self._blocks.free(slab.base, slab.layout.byte_size)

    def slab(self, base: int) -> Slab[Pending] | None:
        """Return the slab that begins there."""
        return self._slabs.get(base)

    def owners(self) -> Iterator[Pending]:
        """Yield every request in flight that lives in rows."""
        for slab in self._slabs.values():
            yield from (pending for pending in slab.owners if pending is not None)

    def forget_owners(self) -> None:
        """No request in rows is in flight any more."""
        for slab in self._slabs.values():
            slab.owners[:] = [None] * len(slab.owners)

    def used_bytes(self) -> int:
        """Return the bytes of the arena in use, slabs as a whole."""
        self._take_returns()
        return self._blocks.used_bytes

    def close(self) -> None:
        """Unmap the arena, as soon as no array looks into it any more."""
        self._is_closed = True
        self._arena.close()
