"""What goes into GPU memory of this process, with NumPy in the part of CuPy."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from forebay.client.device import CudaMemory

DEVICES: list[int] = []


def device(number: int) -> contextlib.AbstractContextManager[None]:
    DEVICES.append(number)
    return contextlib.nullcontext()


def copied(source: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Return what an input of this type holds after a copy."""
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
