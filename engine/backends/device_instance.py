"""A model whose tensors live on a device: what the worker asks of it beyond host arrays in, host arrays out."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Array, Arrays, SegmentsInstance
from forebay.engine.devices.base import Device, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.poisoning import DeviceBatch
from forebay.engine.devices.staging import PinnedArenas
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec

#: A tensor of a request: where its client has put it.
PlacedTensor = Array | DeviceArray


class DeviceInstance(SegmentsInstance):
    """Runs on one device, all of its work on one stream. ``compute`` is all there is to write."""

    takes_device_tensors = True

    def __init__(self, spec: InstanceSpec, device: Device, stream: Stream) -> None:
        """Take ownership of the stream."""
        self._device = device
        self.stream = stream
        self._arenas = PinnedArenas(device, spec)

    @property
    def device(self) -> Device:
        """The device that it runs on."""
        return self._device

    @abc.abstractmethod
    def compute(self, batch: Sequence[Mapping[str, PlacedTensor]], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        """Run once on the requests' inputs, joined along the first dimension, in the order of the stream.

        Args:
            batch: inputs of each request by name, all of the same shapes but for the first dimension; wherever they
                lie, each is copied once. They must stay as they are until the stream has passed this point.
            outputs: names that somebody wants.

        Returns:
            At least these, in memory of the model that stays as it is until the next call.

        Raises:
            ServingError: with the text for the client.
            DeviceError: the device refused.
        """

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        with DeviceBatch(self.device, self.stream):
            arrays = self.fetch(self.compute([inputs], outputs))
        return {name: arrays[name] for name in outputs if name in arrays}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        return functools.partial(self.run_segments, ((inputs, outputs),))

    def run_segments(self, segments: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> None:
        with DeviceBatch(self.device, self.stream):
            results = self.compute([inputs for inputs, _outputs in segments], tuple(segments[0][1]))
            first = 0
            for inputs, outputs in segments:
                rows = next(iter(inputs.values())).shape[0] if len(segments) > 1 else 0
                for name, target in outputs.items():
                    whole = results[name]
                    self._copy_out(name, whole.rows(first, rows) if len(segments) > 1 else whole, target)
                first += rows

    def _copy_out(self, name: str, result: DeviceArray, target: Array) -> None:
        if result.shape != target.shape or result.dtype != target.dtype:
            raise InvalidArgument(
                f"the model produced output '{name}' as {result.dtype}{list(result.shape)}, "
                f"but the model configuration promises {target.dtype}{list(target.shape)}"
            )
        if target.nbytes:
            self.stream.copy_out(target.ctypes.data, result.address, target.nbytes)

    def fetch(self, results: Mapping[str, DeviceArray]) -> Arrays:
        """Return tensors of :meth:`compute` as host arrays, which hold them when the batch is over."""
        arrays: Arrays = {}
        for name, tensor in results.items():
            arrays[name] = array = np.empty(tensor.shape, tensor.dtype)
            if array.nbytes:
                self.stream.copy_out(array.ctypes.data, tensor.address, array.nbytes)
        # What owns the results' memory may go with them.
        self.stream.synchronize()
        return arrays

    def attach_memory(self, address: int, byte_size: int) -> None:
        """An arena has been mapped here: page-lock it."""
        self._arenas.attach(address, byte_size)

    def detach_memory(self, address: int) -> None:
        """An arena is about to be unmapped."""
        self._arenas.detach(address)
