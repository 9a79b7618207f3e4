"""Device memory for what the steps of ensembles on one GPU tell each other: a pool per GPU and frontend.

Made by the GPU's courier when the first ensemble is there whose steps pass tensors on that GPU, and kept until there is
none left. A frontend cuts blocks from its pools by number alone; workers on the GPU open them by handle. Nothing of a
pool is freed before its frontend uses none of it any more and all workers have closed it::

    supervisor -- MakeMemory --> courier
    supervisor -- PoolUp -----------------> frontend: steps' tensors lie there from now on
        ...
    supervisor -- PoolDown ---------------> frontend: the ensemble, or the courier, is gone
    supervisor <-- PoolEmpty -------------- frontend: the last request that used it has ended
    supervisor -- MemoryDown --> workers, then courier
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from forebay.engine.settings import GpuSettings
from forebay.ipc.catalog import EnsembleStep, ModelEntry
from forebay.ipc.device_blocks import ALIGNMENT_BYTES
from forebay.ipc.errors import ServingError
from forebay.ipc.frontend_messages import PoolDown, PoolUp
from forebay.ipc.log import log
from forebay.ipc.messages import DeviceMemory, Message

#: Bytes of all pools on a GPU that ``--cuda-memory-pool-byte-size`` does not name (spec F-151).
DEFAULT_BYTES = 64 << 20

#: When to try again to make a pool that could not be made, s.
_RETRY_S = 60.0


class PoolMaker(Protocol):
    """Makes device memory elsewhere: the couriers."""

    async def make(self, device_id: int, owner: int, number: int, byte_size: int) -> DeviceMemory: ...

    async def close(self, memory: DeviceMemory) -> None: ...

    def worker_of(self, device_id: int) -> int: ...


class Recipient(Protocol):
    """A frontend's process."""

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool: ...


@dataclass(frozen=True)
class _Pool:
    memory: DeviceMemory
    worker: int
    """Number of the process that keeps it."""
    is_unused: asyncio.Event = field(default_factory=asyncio.Event)


class DevicePools:
    """All pools of a server. Used in the supervisor's event loop only."""

    def __init__(self, settings: GpuSettings) -> None:
        self._bytes: Mapping[int, int] = {pool.device: pool.byte_size for pool in settings.memory_pool_byte_sizes}
        #: None: there are no GPUs.
        self._maker: PoolMaker | None = None
        self._frontends: dict[int, Recipient] = {}
        #: How many frontends share a GPU's bytes.
        self.share_count = 1
        self._wanted: frozenset[int] = frozenset()
        #: By frontend and device.
        self._pools: dict[tuple[int, int], _Pool] = {}
        #: Pools on their way back, by number.
        self._leaving: dict[int, _Pool] = {}
        self._numbers = itertools.count(1)
        self._settling: asyncio.Task[None] | None = None
        self._is_changed = False
        self._closing: set[asyncio.Task[None]] = set()

    def use_maker(self, maker: PoolMaker) -> None:
        """From now on pools can be made."""
        self._maker = maker

    # --- frontends ---

    def attach(self, number: int, frontend: Recipient) -> None:
        """A frontend has been started."""
        self._frontends[number] = frontend
        self.settle()

    def detach(self, number: int) -> None:
        """A frontend's process is gone, and its requests with it."""
        self._frontends.pop(number, None)
        for pool in self._leaving.values():
            if pool.memory.owner == number:
                pool.is_unused.set()
        self.settle()

    def note_empty(self, number: int, pool_number: int) -> None:
        """A frontend uses nothing of a pool any more."""
        pool = self._leaving.get(pool_number)
        if pool is not None and pool.memory.owner == number:
            pool.is_unused.set()

    # --- what is wanted ---

    def follow(self, models: Iterable[ModelEntry]) -> None:
        """Take in which ensembles there are."""
        if self._maker is None:
            return
        wanted = wanted_devices(models, before=self._wanted)
        if wanted != self._wanted:
            self._wanted = wanted
            self.settle()

    def settle(self) -> None:
        """Something has changed: make what is missing, give back what is not wanted, in the background."""
        if self._maker is None or not (self._wanted or self._pools):
            return
        self._is_changed = True
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle(self._maker))

    async def _settle(self, maker: PoolMaker) -> None:
        try:
            while self._is_changed:
                self._is_changed = False
                for key, pool in list(self._pools.items()):
                    self._retire_if_over(maker, key, pool)
                for device_id in sorted(self._wanted):
                    for number in list(self._frontends):
                        if (number, device_id) not in self._pools:
                            await self._make(maker, number, device_id)
        finally:
            self._settling = None

    async def _make(self, maker: PoolMaker, number: int, device_id: int) -> None:
        size = self._bytes.get(device_id, DEFAULT_BYTES) // self.share_count // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if not size:
            return
        try:
            memory = await maker.make(device_id, number, next(self._numbers), size)
        except ServingError as error:
            log.warning(f"ensembles pass tensors through host memory on GPU {device_id}: {error.text}")
            # A courier that is started again says when it is back; nobody says when there is room.
            asyncio.get_running_loop().call_later(_RETRY_S, self.settle)
            return
        self._pools[number, device_id] = _Pool(memory, maker.worker_of(device_id))
        frontend = self._frontends.get(number)
        if frontend is not None:
            frontend.send(PoolUp(memory=memory))
        # While it was made, its frontend or its courier may have ended.
        self._is_changed = True

    def _retire_if_over(self, maker: PoolMaker, key: tuple[int, int], pool: _Pool) -> None:
        number, device_id = key
        frontend = self._frontends.get(number)
        if frontend is not None and device_id in self._wanted and pool.worker == maker.worker_of(device_id):
            return
        del self._pools[key]
        self._leaving[pool.memory.number] = pool
        if frontend is None or not frontend.send(PoolDown(number=pool.memory.number)):
            pool.is_unused.set()
        task = asyncio.create_task(self._close(maker, pool))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, maker: PoolMaker, pool: _Pool) -> None:
        await pool.is_unused.wait()
        del self._leaving[pool.memory.number]
        await maker.close(pool.memory)

    def stop(self) -> None:
        """Make and give back nothing more: couriers and workers are about to end, and the memory with them."""
        self._maker = None
        for task in (*self._closing, *(() if self._settling is None else (self._settling,))):
            task.cancel()


def wanted_devices(models: Iterable[ModelEntry], before: frozenset[int] = frozenset()) -> frozenset[int]:
    """Return the GPUs on which a step of an ensemble reads what another has made there.

    Args:
        before: GPUs that stay wanted as long as any ensemble has a step on a GPU: while a worker is replaced, nobody
            knows where its model takes tensors.
    """
    entries = list(models)
    versions = _Versions(entries)
    wanted: set[int] = set()
    is_any_on_gpu = False
    for ensemble in entries:
        written: set[tuple[str, int]] = set()
        read: set[tuple[str, int]] = set()
        for step in ensemble.steps:
            for entry in versions.of(step):
                is_any_on_gpu = is_any_on_gpu or bool(entry.gpu_uuid)
                for device_id in versions.devices(entry):
                    written.update((tensor, device_id) for tensor in step.outputs.values())
                    read.update((tensor, device_id) for tensor in step.inputs.values())
        wanted.update(device_id for _tensor, device_id in written & read)
    return frozenset(wanted | before) if is_any_on_gpu else frozenset(wanted)


class _Versions:
    """Which models steps mean, and where these take tensors."""

    def __init__(self, entries: Iterable[ModelEntry]) -> None:
        self._by_name: dict[tuple[str, str], list[ModelEntry]] = {}
        for entry in entries:
            self._by_name.setdefault((entry.namespace, entry.name), []).append(entry)

    def of(self, step: EnsembleStep) -> list[ModelEntry]:
        found = self._by_name.get((step.namespace, step.model), [])
        return [entry for entry in found if step.version < 1 or step.version == entry.version]

    def devices(self, entry: ModelEntry) -> set[int]:
        """Return the GPUs of a model, or of all models that an ensemble is made of."""
        found: set[int] = set()
        seen: set[int] = set()
        pending = [entry]
        while pending:
            entry = pending.pop()
            if id(entry) not in seen:
                seen.add(id(entry))
                found.add(entry.device_id)
                pending.extend(inner for step in entry.steps for inner in self.of(step))
        return found - {-1}
