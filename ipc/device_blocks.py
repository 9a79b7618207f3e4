"""Which bytes of a device memory are free. Numbers only: whoever keeps these books need not have the memory open."""

from __future__ import annotations

from forebay.ipc.arena import BlockAllocator

#: Where blocks begin: what CUDA's own allocations are aligned to.
ALIGNMENT_BYTES = 256


class DeviceBlocks(BlockAllocator):
    """As in an arena, but aligned as a device wants it."""

    def allocate(self, byte_size: int) -> int:
        return super().allocate(_aligned(byte_size))

    def free(self, offset: int, byte_size: int) -> None:
        super().free(offset, _aligned(byte_size))


def tail_of(offset: int, byte_size: int, kept_bytes: int) -> tuple[int, int]:
    """Return offset and bytes of what can be freed of a block that is used up to ``kept_bytes`` only; 0: nothing."""
    kept = _aligned(kept_bytes)
    return offset + kept, max(_aligned(byte_size) - kept, 0)


def _aligned(byte_size: int) -> int:
    return (max(byte_size, 1) + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES
