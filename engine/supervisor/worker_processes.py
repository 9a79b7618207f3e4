"""Which instances of a version share a worker process (``--instances-per-process``).

An instance is a loop in a process: with its own doorbell, lifeline and counters, and on a GPU its own stream. The first
of a process is forked by the zygote; the others are adopted, each as one more thread. Nobody else notices: for
scheduler, frontends and clients each is a worker like any other. They die together, and are started again each by
itself.
"""

from __future__ import annotations

import asyncio

from forebay.engine.backend_families import SHARING_BACKENDS, family_of
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.worker_messages import InstanceSpec

#: Where instances must be to share a process: CPU, GPU or MODEL, and the device.
_Place = tuple[str, int]


class _Process:
    """A process that is forked, or about to be."""

    def __init__(self, first: WorkerHandle) -> None:
        self._members = [first]
        #: Set when it was forked, or could not be.
        self.tried = asyncio.Event()

    def living(self) -> list[WorkerHandle]:
        """Return those of its workers that have not ended, those included that are about to join."""
        self._members = [member for member in self._members if not member.ended.is_set()]
        return self._members

    def is_wanted_beside(self, worker: WorkerHandle) -> bool:
        """Whether the worker lives in this process, and another one that is to go on."""
        members = self.living()
        return worker in members and any(each is not worker and not each.is_stopping for each in members)

    async def join(self, worker: WorkerHandle) -> bool:
        """Have a member adopt the worker, as soon as there is one that can; False if there is none."""
        others = tuple(self.living())
        self._members.append(worker)
        await self.tried.wait()
        if any(member.adopt(worker) for member in others):
            return True
        self._members.remove(worker)
        return False


class WorkerProcesses:
    """The worker processes of one version."""

    def __init__(self, plant: Plant, backend: str) -> None:
        """Fork nothing yet. Backends that keep global state, as Python models do, never share."""
        self._plant = plant
        self._backend = backend
        self._family = family_of(backend)
        self._loops_max = plant.settings.process.instances_per_process if backend in SHARING_BACKENDS else 1
        self._processes: dict[_Place, list[_Process]] = {}

    async def start(self, worker: WorkerHandle, spec: InstanceSpec) -> None:
        """Give a worker a process: one that has room, or a new one.

        Raises:
            Unavailable: the family's libraries cannot be imported.
        """
        if self._loops_max == 1 or self._must_be_alone(spec):
            await self._plant.fork(self._family, worker)
            return
        place = (spec.kind, spec.device_id)
        self._processes[place] = [process for process in self._processes.get(place, ()) if process.living()]
        for process in tuple(self._processes[place]):
            if len(process.living()) < self._loops_max and await process.join(worker):
                self._plant.greet(worker)
                return
        # Known before it is forked, so that the next one joins it.
        process = _Process(worker)
        self._processes[place].append(process)
        try:
            await self._plant.fork(self._family, worker)
        finally:
            process.tried.set()

    def _must_be_alone(self, spec: InstanceSpec) -> bool:
        """Whether it captures CUDA graphs in the way of ONNX Runtime, which no other thread's work may fall into."""
        return self._backend == "onnxruntime" and spec.kind == "GPU" and bool(spec.optimization.get("cuda_graphs"))

    def give_up(self, worker: WorkerHandle) -> None:
        """End a worker that could not be loaded: at once, unless others of its process are still wanted."""
        if any(process.is_wanted_beside(worker) for place in self._processes.values() for process in place):
            worker.give_up()
        else:
            worker.kill()
