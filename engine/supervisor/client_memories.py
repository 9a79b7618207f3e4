"""Device memory of shared-memory clients: what couriers keep for them, and what they export themselves.

A client that runs ensembles, or a Python model that calls others, asks for memory on a GPU and cuts blocks from it by
number, as frontends do from their pools (:mod:`forebay.engine.supervisor.device_pools`). It is kept until the client
gives it back or is gone. Memory that a client exports itself is its own to free, once no worker has it open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from forebay.engine.settings import GpuSettings
from forebay.engine.supervisor.device_pools import DEFAULT_BYTES, PoolMaker
from forebay.ipc.device_blocks import ALIGNMENT_BYTES
from forebay.ipc.errors import AlreadyExists, InvalidArgument, Unavailable
from forebay.ipc.messages import DeviceMemory

#: How long workers may take to close a memory before its client has to ask again, s: less than clients wait for us.
_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class _Kept:
    memory: DeviceMemory
    worker: int
    """Number of the process that keeps it."""


class ClientMemories:
    """All such memory of a server. Used in the supervisor's event loop only."""

    def __init__(self, settings: GpuSettings) -> None:
        self._bytes: Mapping[int, int] = {pool.device: pool.byte_size for pool in settings.memory_pool_byte_sizes}
        #: None: there are no GPUs.
        self._maker: PoolMaker | None = None
        self._device_ids: frozenset[int] = frozenset()
        #: By client and number.
        self._kept: dict[tuple[int, int], _Kept] = {}
        #: One memory is made at a time, so that two do not count on the same bytes.
        self._making = asyncio.Lock()
        #: Told client and number of a memory whose courier has ended.
        self.on_lost: Callable[[int, int], None] = _ignore
        #: Memories that workers are asked to close, by client and number.
        self._closing: dict[tuple[int, int], asyncio.Task[None]] = {}

    def use_maker(self, maker: PoolMaker, device_ids: Iterable[int]) -> None:
        """From now on there is memory of these GPUs."""
        self._maker = maker
        self._device_ids = frozenset(device_ids)

    async def make(self, client: int, number: int, device_id: int) -> DeviceMemory:
        """Keep memory for a client, half of what the GPU has left for clients.

        Args:
            number: what the client knows it by.

        Raises:
            InvalidArgument, AlreadyExists: there is no such GPU, or the client has memory there.
            ServingError: there is no room, or no courier.
        """
        maker = self._checked_maker(device_id)
        async with self._making:
            for (owner, known), kept in self._kept.items():
                if owner == client and (known == number or kept.memory.device_id == device_id):
                    raise AlreadyExists(f"the client has memory on GPU {device_id} already")
            size = self._room(device_id)
            if not size:
                raise Unavailable(
                    f"clients have all memory of GPU {device_id} that --cuda-memory-pool-byte-size allows"
                )
            memory = await maker.make(device_id, client, number, size)
            self._kept[client, number] = _Kept(memory, maker.worker_of(device_id))
        return memory

    def _checked_maker(self, device_id: int) -> PoolMaker:
        if self._maker is None or device_id not in self._device_ids:
            raise InvalidArgument(f"the server has no GPU {device_id}")
        return self._maker

    def _room(self, device_id: int) -> int:
        kept = (kept.memory for kept in self._kept.values())
        left = self._bytes.get(device_id, DEFAULT_BYTES) - sum(m.byte_size for m in kept if m.device_id == device_id)
        return left // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES

    async def close(self, client: int, number: int, device_id: int) -> None:
        """Have all workers close a memory of a client; what is ours of it is freed.

        Raises:
            Unavailable: a worker runs something and has not closed it yet.
        """
        maker = self._maker
        if maker is None or device_id not in self._device_ids:
            return  # Nobody here can have opened it.
        self._kept.pop((client, number), None)
        task = self._begin_closing(maker, DeviceMemory(client, number, device_id, 0, b""))
        try:
            await asyncio.wait_for(asyncio.shield(task), _CLOSE_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(f"a worker on GPU {device_id} still has the memory open, ask again") from None

    def _begin_closing(self, maker: PoolMaker, memory: DeviceMemory) -> asyncio.Task[None]:
        key = (memory.owner, memory.number)
        task = self._closing.get(key)
        if task is None:
            task = self._closing[key] = asyncio.create_task(maker.close(memory))
            task.add_done_callback(lambda _task: self._closing.pop(key))
        return task

    def forget(self, client: int) -> None:
        """A client is gone: free what was kept for it, as soon as no worker has it open."""
        maker = self._maker
        for key, kept in list(self._kept.items()):
            if key[0] == client:
                del self._kept[key]
                if maker is not None:
                    self._begin_closing(maker, kept.memory)

    def note_couriers(self) -> None:
        """A courier has died or is back: tell those whose memory it kept, so that they give it back."""
        maker = self._maker
        if maker is not None:
            for key, kept in list(self._kept.items()):
                if kept.worker != maker.worker_of(kept.memory.device_id):
                    del self._kept[key]
                    self.on_lost(*key)

    def stop(self) -> None:
        """Make and give back nothing more: couriers and workers are about to end, and the memory with them."""
        self._maker = None
        for task in self._closing.values():
            task.cancel()


def _ignore(_client: int, _number: int) -> None:
    """Nobody wants to know."""
