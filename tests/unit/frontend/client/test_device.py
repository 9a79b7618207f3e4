"""Tensors in GPU memory of this process: how they get there, and who gives their room back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from forebay.client.device import CudaMemory, DeviceArena, DeviceModel
from forebay.client.errors import DeadlineExceeded, EngineGone
from forebay.client.pending import BlockLease
from forebay.ipc.errors import ServingError, Unavailable
from forebay.ipc.tensor import TensorSpec

ARENA_BYTES = 1 << 12


class HostMemory:
    """Plays the device."""

    device_id = 0
    byte_size = ARENA_BYTES
    handle = bytes(64)

    def __init__(self) -> None:
        self._bytes = np.zeros(ARENA_BYTES, np.uint8)
        self.is_closed = False

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Any:
        size = int(np.prod(shape)) * dtype.itemsize
        return self._bytes[offset : offset + size].view(dtype).reshape(shape)

    def copy(self, target: Any, source: Any) -> None:
        target[...] = source

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class LateServer:
    """Answers when it is too late."""

    def __init__(self) -> None:
        self.waiters: list[Callable[[], None]] = []
        self.connection: Any = SimpleNamespace(
            view=memoryview(b""),
            completions=self,
            next_token=lambda: 1,
            loan_block=lambda size: BlockLease(SimpleNamespace(append=lambda _block: None), 64, size),  # type: ignore[arg-type]
            submit=lambda _pending: None,
            cancel=lambda _pending: None,
            check_usable=lambda: None,
            close_memory=self.close_memory,
            has_server_ended=False,
        )
        #: What there is to be said about closing a memory.
        self.refusals: list[ServingError] = []

    def close_memory(self, _number: int, _device_id: int) -> None:
        if self.refusals:
            raise self.refusals.pop(0)

    def wait(self, _pending: object, _deadline_ns: int) -> None:
        raise DeadlineExceeded("too late")

    def notify(self, _pending: object, waiter: Callable[[], None]) -> bool:
        self.waiters.append(waiter)
        return True

    def answer(self) -> None:
        while self.waiters:
            self.waiters.pop()()


def test_room_of_requests_that_were_given_up_comes_back_with_their_answers() -> None:
    server = LateServer()
    engine: Any = server
    signature = SimpleNamespace(
        inputs=(TensorSpec("X", "UINT8", (1024,)),), outputs=(TensorSpec("Y", "UINT8", (1024,)),), max_batch_size=0
    )
    opened: Any = SimpleNamespace(signature=signature, name="m", edition=1, has_fixed_inputs=True, ensemble=None)
    arena = DeviceArena(engine, HostMemory())
    model = DeviceModel(arena, opened)
    for _ in range(8):
        model.input("X", (1024,))
        with pytest.raises(DeadlineExceeded):
            model.infer(timeout_s=0.001)
        server.answer()


def test_an_arena_is_freed_when_workers_have_closed_it() -> None:
    server, memory = LateServer(), HostMemory()
    engine: Any = server
    arena = DeviceArena(engine, memory)
    server.refusals = [Unavailable("still open")] * 3
    with pytest.raises(DeadlineExceeded):
        arena.close(timeout_s=0)
    assert not memory.is_closed
    arena.close()
    arena.close()
    assert memory.is_closed


def test_an_arena_is_kept_as_long_as_a_server_that_cannot_be_asked_may_use_it() -> None:
    server, memory = LateServer(), HostMemory()
    engine: Any = server
    arena = DeviceArena(engine, memory)
    server.refusals = [EngineGone("cut off"), EngineGone("ended")]
    with pytest.raises(EngineGone):
        arena.close()
    assert not memory.is_closed
    server.connection.has_server_ended = True
    arena.close()
    assert memory.is_closed


#: Chosen with :func:`device`.
DEVICES: list[int] = []


def device(number: int) -> contextlib.AbstractContextManager[None]:
    DEVICES.append(number)
    return contextlib.nullcontext()


def copied(source: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Return what an input of this type holds after a copy, with NumPy in the part of CuPy."""
    memory = CudaMemory.__new__(CudaMemory)
    memory.device_id = 3
    memory._cupy = SimpleNamespace(cuda=SimpleNamespace(Device=device), from_dlpack=lambda array: array)
    target = np.zeros(source.shape, dtype)
    memory.copy(target, source)
    return target


def test_values_are_converted_and_never_reinterpreted() -> None:
    assert copied(np.array([1, 2], np.int32), np.float32).tolist() == [1.0, 2.0]
    assert copied(np.array([1.5, 2.5], np.float64), np.float32).tolist() == [1.5, 2.5]
    assert DEVICES[-1] == 3


def test_bfloat16_is_copied_bit_by_bit() -> None:
    source = np.array([1.0, -2.0], ml_dtypes.bfloat16)
    assert copied(source, np.uint16).tolist() == source.view(np.uint16).tolist() == [0x3F80, 0xC000]
