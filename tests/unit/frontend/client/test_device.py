"""Requests whose tensors lie in device memory: who gives their room back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forebay.client.device import DeviceArena, DeviceModel
from forebay.client.errors import DeadlineExceeded
from forebay.client.pending import BlockLease
from forebay.ipc.tensor import TensorSpec

ARENA_BYTES = 1 << 12


class HostMemory:
    """Plays the device."""

    device_id = 0
    byte_size = ARENA_BYTES
    handle = bytes(64)

    def __init__(self) -> None:
        self._bytes = np.zeros(ARENA_BYTES, np.uint8)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Any:
        size = int(np.prod(shape)) * dtype.itemsize
        return self._bytes[offset : offset + size].view(dtype).reshape(shape)

    def copy(self, target: Any, source: Any) -> None:
        target[...] = source

    def synchronize(self) -> None:
        pass


class LateServer:
    """Answers when it is too late."""

    def __init__(self) -> None:
        self.waiters: list[Callable[[], None]] = []
        self.connection: Any = SimpleNamespace(
            completions=self,
            next_token=lambda: 1,
            loan_block=lambda size: BlockLease(SimpleNamespace(append=lambda _block: None), 64, size),  # type: ignore[arg-type]
            submit=lambda _pending: None,
            cancel=lambda _pending: None,
        )

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
    opened: Any = SimpleNamespace(signature=signature, name="m", edition=1, has_fixed_inputs=True)
    arena = DeviceArena(engine, HostMemory())
    model = DeviceModel(arena, opened)
    for _ in range(8):
        model.input("X", (1024,))
        with pytest.raises(DeadlineExceeded):
            model.infer(timeout_s=0.001)
        server.answer()
