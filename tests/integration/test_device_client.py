"""``forebay.client.device``: tensors stay on the device, from this process to the model and back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_models import add_doubler
from forebay_server import ForebayServer

from forebay.client import shm
from forebay.client.device import DeviceArena, cuda_arena
from forebay.engine.devices.host_device import HostDevice
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE
from forebay.ipc.errors import ArenaFull, InvalidArgument, ServingError

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]


class HostAsDevice:
    """The host's stand-in for :class:`forebay.client.device.CudaMemory`; its arrays are numpy's."""

    device_id = 0

    def __init__(self, byte_size: int) -> None:
        self.byte_size = byte_size
        self._device = HostDevice()
        self._memory = self._device.allocate(byte_size)
        self.handle = self._device.export_memory(self._memory)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        raw = (ctypes.c_uint8 * self.byte_size).from_address(self._memory.address)
        count = int(np.prod(shape))
        return np.frombuffer(memoryview(raw), dtype, count, offset).reshape(shape)

    def copy(self, target: np.ndarray[Any, Any], source: Any) -> None:
        target[...] = np.from_dlpack(source)

    def synchronize(self) -> None:
        """Memory of the host is there at once."""


@pytest.fixture(params=KINDS, scope="module")
def arena(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceArena]:
    root: Path = tmp_path_factory.mktemp("models")
    add_doubler(root, "gpu", "KIND_GPU", more="dynamic_batching { }")
    add_doubler(root, "gpu_varying", "KIND_GPU", dim=-1)
    add_doubler(root, "cpu", "KIND_CPU")
    is_host = request.param == "host"
    environment = {PLAYED_GPUS_VARIABLE: "1"} if is_host else {}
    with (
        ForebayServer(root, environment=environment) as server,
        shm.connect(server.runtime_base) as engine,
    ):
        yield DeviceArena(engine, HostAsDevice(1 << 20)) if is_host else cuda_arena(engine, 1 << 20)


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
