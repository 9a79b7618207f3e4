"""Device buffers for the inputs and outputs of a model, and the copies between them and host arrays.

A buffer belongs to one tensor and only grows. For models of fixed shapes the addresses therefore never change once the
largest batch has been seen, which is what CUDA graphs and fixed bindings need: ``reserve`` sees it at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from forebay.engine.backends.base import Array
from forebay.engine.devices.base import Device, DeviceBroken, DeviceError, Memory, Pin, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.memory_limit import PINNED_KEY
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

#: ``optimization.priority`` to a stream's (spec C-051).
_STREAM_PRIORITIES = {"MAX": -1, "DEFAULT": 0, "MIN": 1}


def stream_priority(spec: InstanceSpec) -> int:
    """Return the priority of an instance's stream."""
    return _STREAM_PRIORITIES.get(str(spec.optimization.get("priority", "DEFAULT")), 0)


class Staging:
    """The buffers of one instance. Copies are asynchronous, in the order of the stream."""

    def __init__(self, device: Device, stream: Stream, *, rows_max: int = 0) -> None:
        """Hold nothing yet.

        Args:
            rows_max: make buffers for so many rows at once; 0: as they are needed.
        """
        self.device = device
        self._rows_max = rows_max
        self.stream = stream
        self._buffers: dict[str, Memory] = {}
        #: Counts the buffers that had to move: what was captured or bound before is stale afterwards.
        self.generation = 0

    def reserve(self, name: str, byte_size: int) -> int:
        """Return the address of the tensor's buffer, which has room for at least ``byte_size`` bytes.

        Raises:
            DeviceMemoryFull: there is no room; the old buffer is still there.
        """
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.byte_size >= byte_size:
            return buffer.address
        larger = self.device.allocate(byte_size)
        if buffer is not None:
            # Work that is under way may still use it.
            self.stream.synchronize()
            buffer.close()
        self._buffers[name] = larger
        self.generation += 1
        return larger.address

    def copy_in(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """Copy host arrays to their buffers, one copy each; return the buffers' addresses by name.

        Args:
            arrays: C-contiguous; they must stay as they are until the stream has passed this point.
        """
        addresses: dict[str, int] = {}
        for name, array in arrays.items():
            addresses[name] = address = self.reserve(name, array.nbytes)
            if array.nbytes:
                self.stream.copy_in(address, array.ctypes.data, array.nbytes)
        return addresses

    def place(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceArray:
        """Return the tensor's buffer as an array.

        Raises:
            DeviceMemoryFull: there is no room.
        """
        array = DeviceArray(0, shape, dtype)
        size = array.nbytes
        if self._rows_max and shape and 0 < shape[0] < self._rows_max:
            size = size // shape[0] * self._rows_max
        return replace(array, address=self.reserve(name, size))

    def gather(self, batch: Sequence[Mapping[str, Array | DeviceArray]]) -> dict[str, DeviceArray]:
        """Copy the requests' tensors to their buffers one behind the other, each with one copy; return the buffers.

        Args:
            batch: by name, of the same shapes but for the first dimension, C-contiguous, in host memory or on the
                device; they must stay as they are until the stream has passed this point.
        """
        whole: dict[str, DeviceArray] = {}
        for name, first in batch[0].items():
            parts = [tensors[name] for tensors in batch if tensors[name].nbytes]
            shape = first.shape if len(batch) == 1 else (sum(each[name].shape[0] for each in batch), *first.shape[1:])
            whole[name] = self.place(name, shape, first.dtype)
            address = whole[name].address
            for part in parts:
                if isinstance(part, DeviceArray):
                    self.stream.copy_within(address, part.address, part.nbytes)
                else:
                    self.stream.copy_in(address, part.ctypes.data, part.nbytes)
                address += part.nbytes
        return whole

    def copy_out(self, arrays: Mapping[str, Array]) -> None:
        """Copy the buffers to host arrays, one copy each; they hold it once the stream has passed this point."""
        for name, array in arrays.items():
            if array.nbytes:
                self.stream.copy_out(array.ctypes.data, self._buffers[name].address, array.nbytes)

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()


class PinnedArenas:
    """The arenas that this worker has mapped, page-locked while they are: then copies from them are asynchronous.

    Locking is an optimisation: where it fails (a limit of the container, say), copies go through the driver's own
    staging memory and are slower.
    """

    def __init__(self, device: Device, spec: InstanceSpec) -> None:
        self._device = device
        self._bytes_max: int | None = spec.extra.get(PINNED_KEY)
        self._pins: dict[int, Pin] = {}

    def attach(self, address: int, byte_size: int) -> bool:
        """Lock a mapping; whether that was possible."""
        if self._bytes_max is not None and byte_size > self._bytes_max:
            log.verbose(
                1, f"an arena of {byte_size} bytes is not page-locked: more than --pinned-memory-pool-byte-size"
            )
            return False
        try:
            self._pins[address] = self._device.pin(address, byte_size)
        except DeviceBroken:
            raise
        except DeviceError as error:
            log.warning(f"an arena cannot be page-locked, copies from and to it are slower: {error.text}")
            return False
        return True

    def detach(self, address: int) -> None:
        """Unlock a mapping that is about to go; nothing if it was not locked."""
        pin = self._pins.pop(address, None)
        if pin is not None:
            pin.close()

    def close(self) -> None:
        for address in list(self._pins):
            self.detach(address)
