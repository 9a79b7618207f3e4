"""Device memory that the server keeps for this client, for tensors that nobody needs on the host: numbers, not opened.

It is asked for when it is of use for the first time, and comes as news at the door. Until then, and where it has no
room, tensors go through the arena. The connection's lock is held in every call.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable

from forebay.client.door import Door
from forebay.client.pending import BlockLease, BlockReturns
from forebay.ipc.device_blocks import DeviceBlocks, tail_of
from forebay.ipc.errors import ArenaFull
from forebay.ipc.messages import DeviceMemory

#: When to ask again for memory that the server did not have, ns: at first, and after twice as long each time, at most.
_PAUSE_FIRST_NS, _PAUSE_LAST_NS = 10**9, 64 * 10**9

#: Numbers of device memories of this process, pools and what it exports itself; unique for every connection.
memory_numbers = itertools.count(1)


class DeviceLease(BlockLease):
    """The right to bytes of a device memory."""

    __slots__ = ("__weakref__", "memory")

    def __init__(self, returns: BlockReturns, memory: DeviceMemory, offset: int, byte_size: int) -> None:
        super().__init__(returns, offset, byte_size)
        self.memory = memory

    def shrink(self, byte_size: int) -> None:
        """Give back what is behind so many bytes; nobody may use it any more."""
        offset, freed_bytes = tail_of(self.offset, self.byte_size, byte_size)
        if freed_bytes:
            self._returns.append((offset, freed_bytes))
        self.byte_size = byte_size


class _Pool:
    """One memory, and which of it is free."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._blocks = DeviceBlocks(memory.byte_size)
        self._returns: BlockReturns = deque()

    def take(self, byte_size: int) -> DeviceLease | None:
        self._take_returns()
        try:
            return DeviceLease(self._returns, self.memory, self._blocks.allocate(byte_size), byte_size)
        except ArenaFull:
            return None

    @property
    def is_unused(self) -> bool:
        self._take_returns()
        return not self._blocks.used_bytes

    def _take_returns(self) -> None:
        while self._returns:
            self._blocks.free(*self._returns.popleft())


class DevicePools:
    """A pool on each GPU that has been asked for, and those that are on their way back."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._by_device: dict[int, _Pool] = {}
        #: Whoever kept them has ended: nothing more is taken from them.
        self._retired: list[_Pool] = []
        #: When to ask again, monotonic ns, and how long to wait after that, by device.
        self._next_questions: dict[int, tuple[int, int]] = {}
        #: Called before a pool is given back, so that nobody here has it open.
        self.on_over: Callable[[DeviceMemory], None] = _ignore

    def take(self, device_id: int, byte_size: int) -> DeviceLease | None:
        """Return a block on a GPU; None: there is no pool, or not yet, or no room in it.

        Raises:
            EngineGone: the server is gone.
        """
        self._take_news()
        pool = self._by_device.get(device_id)
        if pool is not None:
            return pool.take(byte_size)
        self._ask(device_id)
        return None

    def _ask(self, device_id: int) -> None:
        now_ns = time.monotonic_ns()
        due_ns, pause_ns = self._next_questions.get(device_id, (0, _PAUSE_FIRST_NS))
        if now_ns >= due_ns:
            self._next_questions[device_id] = (now_ns + pause_ns, min(2 * pause_ns, _PAUSE_LAST_NS))
            self._door.ask_memory(next(memory_numbers), device_id)

    def _take_news(self) -> None:
        made, lost = self._door.memories, self._door.lost_memories
        while made:
            memory = made.popleft()
            former = self._by_device.get(memory.device_id)
            if former is not None:
                self._retired.append(former)
            self._by_device[memory.device_id] = _Pool(memory)
        while lost:
            self._retire(lost.popleft())
        for pool in [pool for pool in self._retired if pool.is_unused]:
            self._retired.remove(pool)
            self.on_over(pool.memory)
            self._door.give_memory_back(pool.memory.number, pool.memory.device_id)

    def _retire(self, number: int) -> None:
        for device_id, pool in list(self._by_device.items()):
            if pool.memory.number == number:
                self._retired.append(self._by_device.pop(device_id))
                self._next_questions.pop(device_id, None)


def _ignore(_memory: DeviceMemory) -> None:
    """Nobody has it open."""
