"""Which instances share a process (``--instances-per-process``)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from forebay.engine.settings import ProcessSettings, Settings
from forebay.engine.supervisor.worker_processes import WorkerProcesses
from forebay.ipc.errors import Unavailable
from forebay.ipc.worker_messages import InstanceSpec


class Worker:
    """A handle that remembers whom it has adopted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = asyncio.Event()
        self.guests: list[str] = []
        self.refuses = False
        self.is_stopping = False
        self.is_killed = False

    def give_up(self) -> None:
        self.is_stopping = True

    def kill(self) -> None:
        self.is_stopping = self.is_killed = True

    def adopt(self, guest: Worker) -> bool:
        if self.refuses:
            return False
        self.guests.append(guest.name)
        return True


class Plant:
    """Forks in a moment, or not at all."""

    def __init__(self, per_process: int) -> None:
        self.settings = Settings(process=ProcessSettings(instances_per_process=per_process))
        self.forked: list[str] = []
        self.greeted: list[str] = []
        self.fails = False

    async def fork(self, family: str, worker: Worker) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise Unavailable("no library")
        self.forked.append(worker.name)

    def greet(self, worker: Worker) -> None:
        self.greeted.append(worker.name)


def place(kind: str = "CPU", device_id: int = 0, **optimization: bool) -> InstanceSpec:
    spec: Any = SimpleNamespace(kind=kind, device_id=device_id, optimization=optimization)
    return spec


def processes(plant: Plant, backend: str = "onnxruntime") -> Any:
    any_plant: Any = plant
    return WorkerProcesses(any_plant, backend)


def test_instances_started_together_fill_processes() -> None:
    async def scenario() -> None:
        plant = Plant(3)
        made = processes(plant)
        workers = [Worker(name) for name in "abcde"]
        await asyncio.gather(*(made.start(worker, place()) for worker in workers))
        assert plant.forked == ["a", "d"]
        assert workers[0].guests == ["b", "c"]
        assert workers[3].guests == ["e"]
        assert sorted(plant.greeted) == ["b", "c", "e"]

    asyncio.run(scenario())


def test_each_device_has_processes_of_its_own() -> None:
    async def scenario() -> None:
        plant = Plant(8)
        made = processes(plant)
        for name, spec in (("a", place("GPU", 0)), ("b", place("GPU", 1)), ("c", place("CPU"))):
            await made.start(Worker(name), spec)
        assert plant.forked == ["a", "b", "c"]

    asyncio.run(scenario())


def test_backends_with_global_state_never_share() -> None:
    async def scenario() -> None:
        plant = Plant(8)
        made = processes(plant, "python")
        for name in "ab":
            await made.start(Worker(name), place())
        assert plant.forked == ["a", "b"]

    asyncio.run(scenario())


def test_onnx_runtime_is_alone_where_it_captures_graphs() -> None:
    """It captures in CUDA's global mode: whatever another thread asks of CUDA meanwhile ends the capture."""

    async def scenario() -> None:
        for backend, kind, count in (("onnxruntime", "GPU", 2), ("onnxruntime", "CPU", 1), ("tensorrt", "GPU", 1)):
            plant = Plant(8)
            made = processes(plant, backend)
            for name in "ab":
                await made.start(Worker(name), place(kind, cuda_graphs=True))
            assert len(plant.forked) == count

    asyncio.run(scenario())


def test_a_worker_takes_the_room_of_one_that_ended() -> None:
    async def scenario() -> None:
        plant = Plant(2)
        made = processes(plant)
        workers = [Worker(name) for name in "abc"]
        for worker in workers[:2]:
            await made.start(worker, place())
        workers[1].ended.set()
        await made.start(workers[2], place())
        assert (plant.forked, workers[0].guests) == (["a"], ["b", "c"])
        # Those that share the room of the first may adopt too, once it has ended itself.
        workers[0].ended.set()
        last = Worker("d")
        await made.start(last, place())
        assert workers[2].guests == ["d"]

    asyncio.run(scenario())


def test_who_is_not_adopted_gets_a_process() -> None:
    async def scenario() -> None:
        plant = Plant(2)
        made = processes(plant)
        first = Worker("a")
        await made.start(first, place())
        first.refuses = True
        await made.start(Worker("b"), place())
        assert plant.forked == ["a", "b"]

    asyncio.run(scenario())


def test_a_fork_that_fails_leaves_nobody_waiting() -> None:
    async def scenario() -> None:
        plant = Plant(2)
        plant.fails = True
        made = processes(plant)
        first, second = Worker("a"), Worker("b")
        first.refuses = second.refuses = True
        results = await asyncio.gather(made.start(first, place()), made.start(second, place()), return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]

    asyncio.run(scenario())


def test_who_cannot_be_loaded_takes_nobody_along() -> None:
    async def scenario() -> None:
        made = processes(Plant(3))
        serving, failed, failed_too = workers = [Worker(name) for name in "abc"]
        for worker in workers:
            await made.start(worker, place())
        made.give_up(failed)
        made.give_up(failed_too)
        assert [worker.is_stopping for worker in workers] == [False, True, True]
        # Nobody is wanted any more: there is nothing to wait for.
        made.give_up(serving)
        assert [worker.is_killed for worker in workers] == [True, False, False]

    asyncio.run(scenario())


def test_who_lives_alone_is_killed() -> None:
    async def scenario() -> None:
        made = processes(Plant(1))
        worker = Worker("a")
        await made.start(worker, place())
        made.give_up(worker)
        assert worker.is_killed

    asyncio.run(scenario())
