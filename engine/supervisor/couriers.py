"""Couriers: one worker on each GPU that clients have registered memory of; see ``engine/backends/courier_backend.py``.

Started when the first region of a GPU is registered, or the first pool made on it, and replaced like any worker. A
courier's route is known to frontends by the regions that name it, and stands in no catalog.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from forebay.engine.devices.memory_limit import PINNED_KEY
from forebay.engine.settings import Settings
from forebay.engine.supervisor.instance import Instance, InstanceEvents
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.worker_processes import WorkerProcesses
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import SCHEDULER_WORDS
from forebay.ipc.errors import InvalidArgument, ServingError, Unavailable
from forebay.ipc.messages import DeviceMemory
from forebay.ipc.scheduler_messages import BatchingPolicy, RouteUp
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

_BACKEND = "forebay_courier"

#: Any bytes in, the same bytes out.
_INPUTS = (TensorSpec(name="X", datatype="UINT8", dims=(-1,)),)
_OUTPUTS = (TensorSpec(name="Y", datatype="UINT8", dims=(-1,)),)


def _nothing(_text: str = "") -> None:
    """Nobody watches a courier."""


@dataclass(frozen=True)
class _Courier:
    instance: Instance
    entry: ModelEntry


def _restarting(device_id: int) -> str:
    """Return what clients are told: they know of GPUs, not of couriers."""
    return f"the server's access to memory of GPU {device_id} is being restored, try again in a moment"


class Couriers:
    """All couriers of a server."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._lock = asyncio.Lock()
        self._by_device: dict[int, _Courier] = {}
        #: Called when a courier has died or is back.
        self.on_changed: Callable[[], None] = _nothing

    async def open(self, memory: DeviceMemory) -> tuple[ModelEntry, str]:
        """Have the courier of a memory's device open it.

        Returns:
            What frontends send the courier's requests to, and why it cannot open the memory, or nothing.

        Raises:
            ServingError: there is no courier.
        """
        courier = await self._courier(memory.device_id)
        worker = courier.instance.worker
        if worker is None:
            raise InvalidArgument(_restarting(memory.device_id))
        return courier.entry, await worker.check_memory(memory)

    async def make(self, device_id: int, owner: int, number: int, byte_size: int) -> DeviceMemory:
        """Have the courier of a device allocate memory on it, until :meth:`close` or the courier's end.

        Raises:
            ServingError: there is no courier, or no room.
        """
        worker = (await self._courier(device_id)).instance.worker
        if worker is None:
            raise Unavailable(_restarting(device_id))
        return DeviceMemory(owner, number, device_id, byte_size, await worker.make_memory(owner, number, byte_size))

    def worker_of(self, device_id: int) -> int:
        """Return the number of a courier's process, never used again; 0: there is none now."""
        courier = self._by_device.get(device_id)
        worker = None if courier is None else courier.instance.worker
        return 0 if worker is None else worker.number

    async def _courier(self, device_id: int) -> _Courier:
        async with self._lock:
            courier = self._by_device.get(device_id)
            if courier is None:
                courier = self._by_device[device_id] = await self._start(device_id)
        return courier

    def _changed(self) -> None:
        self.on_changed()

    async def _start(self, device_id: int) -> _Courier:
        plant = self._plant
        route = next(plant.next_route)
        name = f"courier of GPU {device_id}"
        spec = _spec(plant.settings, route, name, device_id)
        events = InstanceEvents(changed=self._changed, phase=_nothing)
        processes = WorkerProcesses(plant, _BACKEND)
        timeout_s = plant.settings.process.worker_timeout_secs
        instance = Instance(plant, spec, 0, events, processes, timeout_s=timeout_s)
        scheduler_offset = plant.counters.allocate(SCHEDULER_WORDS)
        plant.switchboard.add_route(
            RouteUp(
                route=route,
                name=name,
                version=1,
                batching=BatchingPolicy(),
                # Never granted: frontends know it by no catalog.
                extra={"decoupled": True},
                counter_offset=scheduler_offset,
            )
        )
        try:
            await instance.start()
        except ServingError as error:
            plant.switchboard.remove_route(route, error.code, error.text)
            instance.release()
            plant.counters.free(scheduler_offset, SCHEDULER_WORDS)
            raise
        entry = ModelEntry(
            name=name, version=1, state="READY", route=route, inputs=_INPUTS, outputs=_OUTPUTS, wants_parcels=True
        )
        return _Courier(instance, entry)

    async def close(self, memory: DeviceMemory) -> None:
        """Have everybody who may have opened a memory close it, then its courier, who may have made it."""
        workers = [worker for worker in self._plant.workers if worker.device_id == memory.device_id]
        await asyncio.gather(*(worker.close_memory(memory.owner, memory.number) for worker in workers))
        courier = self._by_device.get(memory.device_id)
        if courier is not None and courier.instance.worker is not None:
            await courier.instance.worker.close_memory(memory.owner, memory.number)

    async def stop(self) -> None:
        """End all couriers; no requests are in flight any more."""
        await asyncio.gather(*(courier.instance.stop() for courier in self._by_device.values()))
        self._by_device.clear()

    def kill(self) -> None:
        """End all couriers at once."""
        for courier in self._by_device.values():
            courier.instance.kill()


def _spec(settings: Settings, route: int, name: str, device_id: int) -> InstanceSpec:
    return InstanceSpec(
        model=name,
        version=1,
        route=route,
        instance=0,
        instance_name=name,
        backend=_BACKEND,
        model_path="",
        version_path="",
        model_file="",
        kind="GPU",
        device_id=device_id,
        inputs=_INPUTS,
        outputs=_OUTPUTS,
        # It loads no model: how full a GPU may be for one does not matter.
        extra={PINNED_KEY: settings.memory.pinned_pool_byte_size},
    )
