"""This frontend's device memory for what the steps of ensembles on one GPU tell each other: numbers, never opened here.

The supervisor sends a pool for a GPU when there is an ensemble that needs it. Blocks are freed by their last user, so a
request that runs keeps its blocks whatever becomes of the workers that had it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from forebay.ipc.device_blocks import DeviceBlocks, tail_of
from forebay.ipc.errors import ArenaFull
from forebay.ipc.messages import DeviceMemory


class DeviceBlock:
    """Bytes of a pool with a count of users; the maker is the first. Used in the event loop only."""

    __slots__ = ("_pool", "_users", "byte_size", "offset")

    def __init__(self, pool: DevicePool, offset: int, byte_size: int) -> None:
        self._pool = pool
        self._users = 1
        self.offset = offset
        self.byte_size = byte_size

    @property
    def memory(self) -> DeviceMemory:
        return self._pool.memory

    def hold(self) -> None:
        self._users += 1

    def release(self) -> None:
        """One user less; the last one frees the bytes."""
        self._users -= 1
        if self._users == 0:
            self._pool.free(self.offset, self.byte_size)

    def shrink(self, byte_size: int) -> None:
        """Free what is behind so many bytes; nobody may use it any more."""
        offset, freed_bytes = tail_of(self.offset, self.byte_size, byte_size)
        if freed_bytes:
            self._pool.free(offset, freed_bytes)
        self.byte_size = byte_size


class DevicePool:
    """One memory on one GPU."""

    def __init__(self, memory: DeviceMemory, on_empty: Callable[[int], None]) -> None:
        """
        Args:
            on_empty: told the memory's number when the pool is retired and nothing of it is used.
        """
        self.memory = memory
        self._blocks = DeviceBlocks(memory.byte_size)
        self._on_empty = on_empty
        self._is_retired = False

    def take(self, byte_size: int) -> DeviceBlock | None:
        """Return a block; None: there is no room."""
        try:
            return DeviceBlock(self, self._blocks.allocate(byte_size), byte_size)
        except ArenaFull:
            return None

    def free(self, offset: int, byte_size: int) -> None:
        self._blocks.free(offset, byte_size)
        self._report_if_over()

    def retire(self) -> None:
        """No further blocks will be asked for."""
        self._is_retired = True
        self._report_if_over()

    def _report_if_over(self) -> None:
        if self._is_retired and not self._blocks.used_bytes:
            self._on_empty(self.memory.number)


class DevicePools:
    """The newest pool of each GPU."""

    def __init__(self) -> None:
        self._by_device: dict[int, DevicePool] = {}
        #: GPUs that never have one, by configuration.
        self.excluded: Collection[int] = ()
        #: Told the number of a pool that is not used any more.
        self.on_empty: Callable[[int], None] = _ignore

    def expects(self, device_id: int) -> bool:
        """Whether steps on a GPU will have a pool, though it may not be there at this moment."""
        return device_id not in self.excluded

    def add(self, memory: DeviceMemory) -> None:
        """Use this memory from now on; the one before is retired by :meth:`remove`."""
        self._by_device[memory.device_id] = DevicePool(memory, self._forward)

    def remove(self, number: int) -> None:
        """Take no more blocks of a pool."""
        for device_id, pool in list(self._by_device.items()):
            if pool.memory.number == number:
                del self._by_device[device_id]
                pool.retire()

    def take(self, device_id: int, byte_size: int) -> DeviceBlock | None:
        """Return a block on a GPU; None: there is no pool, or no room in it."""
        pool = self._by_device.get(device_id)
        return None if pool is None else pool.take(byte_size)

    def _forward(self, number: int) -> None:
        self.on_empty(number)


def _ignore(_number: int) -> None:
    """Nobody wants to know."""
