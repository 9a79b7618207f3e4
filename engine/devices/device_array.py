"""A tensor in device memory: what a numpy array is to host memory, without any arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """Elements in C order from ``address`` on. Valid as long as whoever owns the memory says."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    owner: object = None
    """What must live as long, if the memory is freed with it."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> DeviceArray:
        """Return ``count`` rows of the first dimension."""
        row_bytes = self.nbytes // max(self.shape[0], 1)
        return replace(self, address=self.address + first * row_bytes, shape=(count, *self.shape[1:]))
