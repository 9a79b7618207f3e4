"""A model whose tensors live on a device: what the worker asks of it beyond host arrays in, host arrays out."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Array, Arrays, SegmentsInstance
from forebay.engine.devices.base import Device, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.staging import PinnedArenas
from forebay.ipc.messages import InstanceSpec

#: A tensor of a request: where its client has put it.
PlacedTensor = Array | DeviceArray


class DeviceInstance(SegmentsInstance):
    """Runs on one device, all of its work on one stream."""

    def __init__(self, spec: InstanceSpec, device: Device, stream: Stream) -> None:
        """Take ownership of the stream."""
        self.device = device
        self.stream = stream
        self._arenas = PinnedArenas(device, spec)

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

    def fetch(self, results: Mapping[str, DeviceArray]) -> Arrays:
        """Return tensors of :meth:`compute` as host arrays; waits for the stream."""
        arrays: Arrays = {}
        for name, tensor in results.items():
            arrays[name] = array = np.empty(tensor.shape, tensor.dtype)
            if array.nbytes:
                self.stream.copy_out(array.ctypes.data, tensor.address, array.nbytes)
        self.stream.synchronize()
        return arrays

    def attach_memory(self, address: int, byte_size: int) -> None:
        """An arena has been mapped here: page-lock it."""
        self._arenas.attach(address, byte_size)

    def detach_memory(self, address: int) -> None:
        """An arena is about to be unmapped."""
        self._arenas.detach(address)
