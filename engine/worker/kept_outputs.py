"""Outputs that wait on the device until their producer has lent room for them there.

Only the model knows how large some outputs are, and its own memory is its next batch's. So they are copied aside, on
the device, and freed when they have been handed over, or nobody waits for them any more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from forebay.engine.devices.base import Device, DeviceError, DeviceMemoryFull, Memory, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.poisoning import DeviceGuard
from forebay.engine.worker.pending_response import address_of

#: Bytes that may wait on the device at a time; beyond that outputs come to the host.
KEPT_BYTES_MAX = 256 << 20

#: Begins copies on a stream.
Copies = Callable[[Stream], None]

#: Runs copies, and returns when they are done; ends the process if the device is broken.
RunCopies = Callable[[Copies], None]


class KeptOutput(NamedTuple):
    """One output that waits."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """As the client sees it."""
    array: DeviceArray
    store: KeptOutputs


class KeptOutputs:
    """What waits on one device. Thread-safe."""

    def __init__(self, device: Device, run: RunCopies) -> None:
        self._device = device
        self._run = run
        # Memory may be given back by the collector, in the middle of anything.
        self._lock = threading.RLock()
        self._used_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceArray | None:
        """Return memory for an output, which is freed when nobody refers to it any more; None: there is no room.

        Raises:
            BackendFailed: the device refused.
        """
        size = DeviceArray(0, shape, dtype).nbytes
        with self._lock:
            if self._used_bytes + size > KEPT_BYTES_MAX:
                return None
            with DeviceGuard(), self._device.current():
                try:
                    memory = self._device.allocate(size)
                except DeviceMemoryFull:
                    return None
            self._used_bytes += size
        return DeviceArray(memory.address, shape, dtype, _Kept(self, memory))

    def hand_over(self, copies: Sequence[tuple[int, DeviceArray]]) -> None:
        """Copy outputs to their rooms: (address on the device, output).

        Raises:
            BackendFailed: the device refused.
        """

        def begin(stream: Stream) -> None:
            for address, array in copies:
                stream.copy_within(address, array.address, array.nbytes)

        self._run(begin)

    def fetch(self, array: DeviceArray) -> memoryview:
        """Return an output's bytes on the host.

        Raises:
            BackendFailed: the device refused.
        """
        target = memoryview(bytearray(array.nbytes))
        self._run(lambda stream: stream.copy_out(address_of(target), array.address, array.nbytes))
        return target

    def give_back(self, memory: Memory) -> None:
        """Free what :meth:`take` has returned."""
        with self._lock:
            self._used_bytes -= memory.byte_size
        with contextlib.suppress(DeviceError), self._device.current():
            memory.close()


class _Kept:
    """Frees memory with itself."""

    def __init__(self, store: KeptOutputs, memory: Memory) -> None:
        self._store = store
        self._memory = memory

    def __del__(self) -> None:
        self._store.give_back(self._memory)
