"""Tensors of a library that has them on a GPU, where the host plays it: numpy's, and said to be elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebay.engine.backends.python_model import dlpack


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
