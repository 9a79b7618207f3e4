"""Pools of device memory: when they are made, and who must have let go of one before it is freed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from forebay.engine.settings import DeviceBytes, GpuSettings
from forebay.engine.supervisor.device_pools import DEFAULT_BYTES, DevicePools, wanted_devices
from forebay.ipc.catalog import EnsembleStep, ModelEntry
from forebay.ipc.errors import Unavailable
from forebay.ipc.frontend_messages import PoolDown, PoolUp
from forebay.ipc.messages import DeviceMemory, Message


def model(name: str, device_id: int, *, version: int = 1, **options: Any) -> ModelEntry:
    uuid = f"GPU-{device_id}" if device_id >= 0 else ""
    return ModelEntry(name, version, "READY", **{"device_id": device_id, "gpu_uuid": uuid, **options})


def ensemble(*models: str, version: int = -1) -> ModelEntry:
    """The models in a line."""
    steps = tuple(EnsembleStep(name, version, {"X": f"t{i}"}, {"Y": f"t{i + 1}"}) for i, name in enumerate(models))
    return model("ens", -1, steps=steps, is_ensemble=True)


ON_GPU = (model("a", 0), model("b", 0), ensemble("a", "b"))


class Maker:
    """Stands in for the couriers."""

    def __init__(self) -> None:
        self.worker = 1
        self.made: list[DeviceMemory] = []
        self.closed: list[int] = []
        self.error = ""

    async def make(self, device_id: int, owner: int, number: int, byte_size: int) -> DeviceMemory:
        await asyncio.sleep(0)
        if self.error:
            raise Unavailable(self.error)
        self.made.append(DeviceMemory(owner, number, device_id, byte_size, b""))
        return self.made[-1]

    async def close(self, memory: DeviceMemory) -> None:
        self.closed.append(memory.number)

    def worker_of(self, device_id: int) -> int:
        return self.worker


class Frontend:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        self.messages.append(message)
        return True


class Scene:
    """Pools with one frontend, number 3."""

    def __init__(self, settings: GpuSettings | None = None) -> None:
        self.maker, self.frontend = Maker(), Frontend()
        self.pools = DevicePools(settings or GpuSettings())
        self.pools.use_maker(self.maker)
        self.pools.attach(3, self.frontend)

    async def follow(self, *models: ModelEntry) -> None:
        self.pools.follow(models)
        await settled()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def play(scenario: Callable[[Scene], Awaitable[None]], settings: GpuSettings | None = None) -> None:
    async def run() -> None:
        scene = Scene(settings)
        await scenario(scene)
        scene.pools.stop()

    asyncio.run(run())


def test_a_pool_is_made_for_the_first_ensemble_and_kept_to_the_last() -> None:
    async def scenario(s: Scene) -> None:
        await s.follow(*ON_GPU[:2])
        assert s.maker.made == []
        await s.follow(*ON_GPU)
        await s.follow(*ON_GPU, model("c", 0))
        assert s.maker.made == [DeviceMemory(3, 1, 0, DEFAULT_BYTES, b"")]
        assert s.frontend.messages == [PoolUp(memory=s.maker.made[0])]
        await s.follow(*ON_GPU[:2])
        assert s.frontend.messages[1:] == [PoolDown(number=1)]
        assert s.maker.closed == []
        s.pools.note_empty(4, 1)  # Not its pool.
        s.pools.note_empty(3, 9)  # No such pool.
        await settled()
        assert s.maker.closed == []
        s.pools.note_empty(3, 1)
        await settled()
        assert s.maker.closed == [1]

    play(scenario)


def test_every_frontend_has_its_share() -> None:
    """F-151."""

    async def scenario(s: Scene) -> None:
        s.pools.share_count = 2
        s.pools.attach(4, Frontend())
        await s.follow(*ON_GPU)
        assert [(memory.owner, memory.byte_size) for memory in s.maker.made] == [(3, 1024), (4, 1024)]

    play(scenario, GpuSettings(memory_pool_byte_sizes=(DeviceBytes(0, 2100),)))


def test_none_is_made_where_it_would_have_no_bytes() -> None:
    async def scenario(s: Scene) -> None:
        await s.follow(*ON_GPU)
        assert s.maker.made == []

    play(scenario, GpuSettings(memory_pool_byte_sizes=(DeviceBytes(0, 0),)))


def test_the_pool_of_a_dead_frontend_is_freed_and_its_successor_gets_another() -> None:
    async def scenario(s: Scene) -> None:
        await s.follow(*ON_GPU)
        s.pools.detach(3)
        successor = Frontend()
        s.pools.attach(7, successor)
        await settled()
        assert s.maker.closed == [1]
        assert successor.messages == [PoolUp(memory=DeviceMemory(7, 2, 0, DEFAULT_BYTES, b""))]

    play(scenario)


def test_a_frontend_that_dies_while_its_pool_leaves_is_not_waited_for() -> None:
    async def scenario(s: Scene) -> None:
        await s.follow(*ON_GPU)
        await s.follow()
        s.pools.detach(3)
        await settled()
        assert s.maker.closed == [1]

    play(scenario)


def test_another_courier_makes_another_pool() -> None:
    async def scenario(s: Scene) -> None:
        await s.follow(*ON_GPU)
        s.maker.worker, s.maker.error = 0, "being started again"
        s.pools.settle()
        await settled()
        s.maker.worker, s.maker.error = 2, ""
        s.pools.settle()
        await settled()
        assert s.frontend.messages[1:] == [PoolDown(number=1), PoolUp(memory=s.maker.made[1])]
        s.pools.note_empty(3, 1)
        await settled()
        assert s.maker.closed == [1]

    play(scenario)


def test_without_gpus_nothing_happens() -> None:
    async def scenario() -> None:
        pools = DevicePools(GpuSettings())
        pools.attach(3, Frontend())
        pools.follow(ON_GPU)
        pools.detach(3)
        pools.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("models", "devices"),
    [
        (ON_GPU, {0}),
        ((model("a", 1), model("b", 0), ensemble("a", "b")), set()),
        ((model("a", 1), model("b", -1), ensemble("a", "b", "a")), set()),
        ((model("a", 1), ensemble("a", "a")), {1}),
        ((model("a", 1), ensemble("a")), set()),
        ((model("a", 0), model("a", 1, version=2), ensemble("a", "a", version=2)), {1}),
        ((model("a", 0, namespace="other"), ensemble("a", "a")), set()),
    ],
    ids=["one GPU", "two", "by the host", "one model", "one step", "by version", "another namespace"],
)
def test_gpus_on_which_steps_read_what_others_made(models: tuple[ModelEntry, ...], devices: set[int]) -> None:
    assert wanted_devices(models) == devices


def test_ensembles_as_steps_are_where_their_models_are() -> None:
    """What they tell each other, or the models beside them, may stay there."""
    inner = model("inner", -1, steps=(EnsembleStep("a", -1, {"X": "x"}, {"Y": "y"}),), is_ensemble=True)
    models = (model("a", 0), model("b", 1), inner)
    assert wanted_devices((*models, ensemble("inner", "inner"))) == {0}
    assert wanted_devices((*models, ensemble("inner", "a"))) == {0}
    assert wanted_devices((*models, ensemble("inner", "b"))) == set()


def test_ensembles_in_a_circle_want_nothing() -> None:
    assert wanted_devices((ensemble("ens", "ens"),)) == set()


def test_a_gpu_stays_wanted_while_a_worker_is_replaced() -> None:
    replaced = (model("a", -1, gpu_uuid="GPU-0"), ensemble("a", "a"))
    assert wanted_devices(replaced, frozenset({0})) == {0}
    assert wanted_devices((model("a", -1), ensemble("a", "a")), frozenset({0})) == set()
