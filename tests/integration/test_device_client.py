"""``forebay.client.device``: tensors stay on the device, from this process to the model and back."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_models import add_chain, add_doubler
from forebay_server import ForebayServer
from played_memories import count_memories
from raw_shm_client import RawClient

from forebay.client import shm
from forebay.client.device import DeviceArena, cuda_arena
from forebay.client.shm import DeadlineExceeded, EngineGone
from forebay.engine.devices.host_device import HostDevice
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE
from forebay.ipc.client_wire import MEMORY_NAME, DoorKind
from forebay.ipc.errors import ArenaFull, InvalidArgument, ServingError

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]


class HostAsDevice:
    """The host's stand-in for :class:`forebay.client.device.CudaMemory`; its arrays are numpy's."""

    device_id = 0

    def __init__(self, byte_size: int) -> None:
        self.byte_size = byte_size
        device = HostDevice()
        memory = device.allocate(byte_size)
        self.handle = device.export_memory(memory)
        # Arrays have this in common: the memory is freed with the last of them.
        self._raw = (ctypes.c_uint8 * byte_size).from_address(memory.address)
        weakref.finalize(self._raw, memory.close)

    def close(self) -> None:
        del self._raw

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        raw = self._raw
        count = int(np.prod(shape))
        return np.frombuffer(memoryview(raw), dtype, count, offset).reshape(shape)

    def copy(self, target: np.ndarray[Any, Any], source: Any) -> None:
        target[...] = np.from_dlpack(source)

    def synchronize(self) -> None:
        """Memory of the host is there at once."""


class Setup:
    """A server, this process as its client, and arenas on the device."""

    def __init__(self, kind: str, server: ForebayServer, engine: shm.Engine) -> None:
        self.is_host = kind == "host"
        self.server = server
        self.engine = engine

    def arena(self) -> DeviceArena:
        if self.is_host:
            return DeviceArena(self.engine, HostAsDevice(1 << 20))
        return cuda_arena(self.engine, 1 << 20)

    def memories(self, pid: int | str) -> int:
        """Return how many device memories a process has open; 0 on CUDA, where nobody can tell."""
        return count_memories(pid) if self.is_host else 0


def environment_of(kind: str) -> dict[str, str]:
    return {PLAYED_GPUS_VARIABLE: "1"} if kind == "host" else {}


@pytest.fixture(params=KINDS, scope="module")
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    root: Path = tmp_path_factory.mktemp("models")
    add_doubler(root, "gpu", "KIND_GPU", more="dynamic_batching { }")
    add_doubler(root, "gpu_patient", "KIND_GPU", more="dynamic_batching { max_queue_delay_microseconds: 700000 }")
    add_doubler(root, "gpu_varying", "KIND_GPU", dim=-1)
    add_doubler(root, "cpu", "KIND_CPU")
    add_chain(root, "chain")
    add_chain(root, "nested", model="chain")
    add_chain(root, "chain_varying", model="gpu_varying", dim=-1)
    add_chain(root, "chain_patient", model="gpu_patient")
    add_chain(root, "half", last="cpu")
    add_chain(root, "other_half", model="cpu", last="gpu")
    with (
        ForebayServer(root, environment=environment_of(request.param)) as server,
        shm.connect(server.runtime_base) as engine,
    ):
        yield Setup(request.param, server, engine)


@pytest.fixture
def arena(setup: Setup) -> Iterator[DeviceArena]:
    with setup.arena() as made:
        yield made


def to_host(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor if isinstance(tensor, np.ndarray) else tensor.get()


def test_fill_in_place_and_take_in_place(arena: DeviceArena) -> None:
    model = arena.model("gpu")
    for factor in (1, 2, 3):
        x = model.input("X", (2, 4))
        x[...] = factor
        y = model.infer()["Y"]
        np.testing.assert_array_equal(to_host(y), np.full((2, 4), 2 * factor, np.float32))


def test_arena_in_host_memory_keeps_its_pages(arena: DeviceArena) -> None:
    """The server says so: its workers on the GPU page-lock it."""
    assert arena.engine.connection.arena.keeps_pages


def test_tensors_of_other_libraries_go_in_by_dlpack(arena: DeviceArena) -> None:
    model = arena.model("gpu")
    source = arena.memory.view(arena.allocate(32), (2, 4), np.dtype(np.float32))
    source[...] = 5
    model.put("X", source)
    np.testing.assert_array_equal(to_host(model.infer()["Y"]), np.full((2, 4), 10, np.float32))
    torch = pytest.importorskip("torch")
    if isinstance(source, np.ndarray):
        model.put("X", torch.full((1, 4), 3.0))
        answer = torch.from_dlpack(model.infer()["Y"])
        assert answer.tolist() == [[6.0] * 4]


def test_outputs_that_vary_are_given_room(arena: DeviceArena) -> None:
    model = arena.model("gpu_varying")
    model.input("X", (1, 3))[...] = 1
    with pytest.raises(InvalidArgument, match="output 'Y' varies in size"):
        model.infer()
    answer = model.infer(output_bytes={"Y": 1024})["Y"]
    assert answer.shape == (1, 3)
    with pytest.raises(ServingError, match=r"output 'Y' \(8 bytes\) should be at least 12 bytes"):
        model.infer(output_bytes={"Y": 8})


@pytest.mark.parametrize(("name", "factor"), [("chain", 4), ("nested", 16)])
def test_ensembles_read_and_write_the_arena(setup: Setup, arena: DeviceArena, name: str, factor: int) -> None:
    """Issue 8, 4: by handle; once the server keeps memory for what their steps tell each other, nothing crosses."""

    def counted(family: str, **labels: str) -> int:
        return setup.server.counter(family, model="gpu", **labels)

    def crossed() -> list[int]:
        return [counted("forebay_device_copied_bytes_total", direction=f"{to}_device") for to in ("to", "from")]

    model = arena.model(name)
    numbers = iter(range(1, 1000))

    def infer() -> None:
        number = next(numbers)
        model.input("X", (2, 4))[...] = number
        np.testing.assert_array_equal(to_host(model.infer()["Y"]), np.full((2, 4), factor * number))

    def passes() -> bool:
        before = crossed()
        infer()
        return crossed() == before

    setup.server.wait_for(passes, "steps to pass tensors on the GPU")
    assert all(passes() for _ in range(5))


def test_ensembles_whose_outputs_vary_are_given_room(arena: DeviceArena) -> None:
    model = arena.model("chain_varying")

    def infer(width: int, room_bytes: int) -> Any:
        model.input("X", (1, width))[...] = 2
        return to_host(model.infer(output_bytes={"Y": room_bytes})["Y"])

    for width in (3, 300):
        np.testing.assert_array_equal(infer(width, 2048), np.full((1, width), 8))
    with pytest.raises(ServingError, match=r"output 'Y' \(2048 bytes\) should be at least 4000 bytes"):
        infer(1000, 2048)


def test_ensembles_with_steps_elsewhere_are_refused(arena: DeviceArena) -> None:
    for name, text in (
        ("half", "'Y' of ensemble 'half' is not made on GPU 0"),
        ("other_half", "that reads 'X' lives on"),
    ):
        with pytest.raises(ServingError, match=text):
            double(arena, name)


def test_room_of_ensembles_that_were_given_up_comes_back(arena: DeviceArena) -> None:
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            double(arena, "chain_patient", timeout_s=0.1)
    np.testing.assert_array_equal(to_host(double(arena, "chain")), np.full((1, 4), 12))


def test_what_cannot_be_is_said(arena: DeviceArena) -> None:
    cpu = arena.model("cpu")
    cpu.input("X", (1, 4))[...] = 0
    with pytest.raises(InvalidArgument, match="model 'cpu' does not live on a GPU"):
        cpu.infer()
    gpu = arena.model("gpu")
    with pytest.raises(InvalidArgument, match="needs input 'X', which was not filled"):
        gpu.infer()
    with pytest.raises(InvalidArgument, match="has no input 'Z'"):
        gpu.input("Z", (1, 4))
    with pytest.raises(ArenaFull):
        gpu.input("X", (1 << 20, 4))


def double(arena: DeviceArena, model_name: str = "gpu", *, timeout_s: float | None = None) -> Any:
    model = arena.model(model_name)
    model.input("X", (1, 4))[...] = 3
    return model.infer(timeout_s=timeout_s)["Y"]


def test_a_closed_arena_is_freed_with_its_last_array(setup: Setup) -> None:
    worker = setup.server.pid_of("worker gpu:1")
    with setup.arena() as arena:
        double(arena)  # The model makes room for itself, too.
    before = setup.memories("self"), setup.memories(worker)
    with setup.arena() as arena:
        model = arena.model("gpu")
        answer = double(arena)
        open_now = 1 if setup.is_host else 0
        assert (setup.memories("self"), setup.memories(worker)) == (before[0] + open_now, before[1] + open_now)
    np.testing.assert_array_equal(to_host(answer), np.full((1, 4), 6, np.float32))
    assert (setup.memories("self"), setup.memories(worker)) == (before[0] + open_now, before[1])
    del answer
    assert setup.memories("self") == before[0]
    for use in (lambda: model.input("X", (1, 4)), model.infer):
        with pytest.raises(InvalidArgument, match="the device arena was closed"):
            use()
    arena.close()
    with setup.arena() as another:
        double(another)


def test_requests_that_were_given_up_do_not_keep_an_arena(setup: Setup) -> None:
    arena = setup.arena()
    with pytest.raises(DeadlineExceeded):
        double(arena, "gpu_patient", timeout_s=0.05)
    arena.close()
    assert setup.memories(setup.server.pid_of("worker gpu_patient:1")) == 0
    assert "ERROR" not in setup.server.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_an_arena_is_freed_when_the_server_has_ended_and_kept_when_nobody_knows(tmp_path: Path, kind: str) -> None:
    add_doubler(tmp_path, "gpu", "KIND_GPU")
    with ForebayServer(tmp_path, environment=environment_of(kind)) as server:
        engine = shm.connect(server.runtime_base)
        setup = Setup(kind, server, engine)
        before = setup.memories("self")
        arenas = [setup.arena() for _ in range(2)]
        for arena in arenas:
            double(arena)
        engine.close()
        with pytest.raises(EngineGone):
            arenas[0].close()
        engine.reconnect()
        arenas[0].close()
        double(arenas[1])
        server.stop()
        arenas[1].close()
        assert setup.memories("self") == before
        engine.close()


def test_what_the_server_keeps_for_a_client_goes_with_it(setup: Setup) -> None:
    """F-151; whatever else it says about memory at the door is refused."""
    client = RawClient(setup.server.runtime_base)
    door = client.door
    setup.server.wait_for(lambda: setup.server.pid_of("worker courier") != 0, "the courier")
    courier = setup.server.pid_of("worker courier")
    setup.server.wait_for(lambda: not setup.is_host or setup.memories(courier) > 0, "the frontend's pool")
    before = setup.memories(courier)
    door.ask_memory(7, 0)
    setup.server.wait_for(lambda: bool(door.look() or door.memories), "memory for the client")
    assert setup.memories(courier) == before + (1 if setup.is_host else 0)
    ask = DoorKind.MAKE_MEMORY
    for kind, body, text in (
        (ask, MEMORY_NAME.pack(7, 0, 0), "the client has memory on GPU 0 already"),
        (ask, MEMORY_NAME.pack(8, 0, 0), "the client has memory on GPU 0 already"),
        (ask, MEMORY_NAME.pack(8, 77, 0), "the server has no GPU 77"),
        (ask, MEMORY_NAME.pack(8, (1 << 32) - 1, 0), "the server has no GPU 4294967295"),
        (ask, b"short", "the message cannot be read"),
        (DoorKind.CLOSE_MEMORY, b"", "the message cannot be read"),
    ):
        with pytest.raises(ServingError, match=text):
            door._ask(kind, body, DoorKind.CLOSED)
    for number in (1, 1, 1 << 63, 7):
        door.close_memory(number, 0)
    door.close_memory(1, 77)
    assert setup.memories(courier) == before
    door.ask_memory(8, 0)
    setup.server.wait_for(lambda: bool(door.look() or len(door.memories) > 1), "memory for the client")
    client.close()
    setup.server.wait_for(lambda: setup.memories(courier) == before, "the memory to be freed")
