"""Tensors of a library that has them on a GPU: CuPy's, or numpy's, said to be elsewhere, where the host plays it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from forebay.engine.backends.python_model import dlpack
from forebay.engine.devices.opening import played_gpu_count


class GpuTensor:
    """What a library with GPUs hands over."""

    def __init__(self, array: np.ndarray[Any, Any], device_id: int = 0) -> None:
        self.array = array
        self.device_id = device_id

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return dlpack.give(self.array, device_id=self.device_id)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device_id

    @staticmethod
    def from_dlpack(tensor: Any) -> GpuTensor:
        """Take another's tensor on a GPU; fails for one on the host."""
        kind, device_id = tensor.__dlpack_device__()
        assert kind == dlpack.CUDA
        array, _is_bfloat = dlpack.take(tensor.__dlpack__())
        return GpuTensor(array, device_id)


class CudaTensor:
    """One that is there."""

    def __init__(self, array: Any, device_id: int = 0) -> None:
        """Take the array of another library, or copy one of the host."""
        cupy = importlib.import_module("cupy")
        self.device_id = device_id
        with cupy.cuda.Device(device_id):
            self._tensor: Any = cupy.asarray(array)

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        found: np.ndarray[Any, Any] = self._tensor.get()
        return found

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return self._tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device_id

    @staticmethod
    def from_dlpack(tensor: Any) -> CudaTensor:
        """Take another's tensor on a GPU."""
        return CudaTensor(importlib.import_module("cupy").from_dlpack(tensor), tensor.__dlpack_device__()[1])


#: What models in this process use.
PlacedTensor: type[GpuTensor | CudaTensor] = GpuTensor if played_gpu_count() else CudaTensor
