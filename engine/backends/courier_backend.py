"""Carries tensors between device memory and shared memory, for those who may not open device memory themselves.

The server starts one courier on each GPU that clients have registered memory of. A frontend asks it like any model,
with one tensor in and the same bytes out: from a client's region to a place in the frontend's arena, for a model on the
CPU or on several GPUs, and back. No process without a model on that GPU ever opens CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forebay.engine.backends.base import Backend, RequestInstance
from forebay.engine.devices.base import Device
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.poisoning import DeviceBatch
from forebay.engine.devices.staging import PinnedArenas
from forebay.engine.worker.pending_response import address_of
from forebay.ipc.errors import Internal, ServingError
from forebay.ipc.messages import TensorPlace
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.worker.parcel_request import ParcelRequest


class CourierInstance(RequestInstance):
    """One stream on one device."""

    def __init__(self, spec: InstanceSpec, device: Device) -> None:
        self._device = device
        self._stream = device.make_stream()
        self._arenas = PinnedArenas(device, spec)

    @property
    def device(self) -> Device:
        return self._device

    def attach_memory(self, address: int, byte_size: int) -> None:
        self._arenas.attach(address, byte_size)

    def detach_memory(self, address: int) -> None:
        self._arenas.detach(address)

    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        for request in requests:
            try:
                with DeviceBatch(self.device, self._stream):
                    place = self._carry(request)
                request.reply_in_place((place,))
            except ServingError as error:
                request.fail(error)

    def _carry(self, request: ParcelRequest) -> TensorPlace:
        """Begin to carry a request's tensor; return where it goes."""
        [source], targets = request.head.inputs, request.head.targets
        size = source.byte_size
        if source.memory:
            place = TensorPlace("Y", source.datatype, source.shape, request.head.reply_offset, size)
            if size > request.head.reply_bytes:
                raise Internal("a courier was lent less room than the tensor takes")
            if size:
                self._stream.copy_out(self._host_address(request, place), self._address(request, source), size)
        else:
            [target] = targets
            place = TensorPlace("Y", source.datatype, source.shape, target.offset, size, memory=target.memory)
            if size:
                self._stream.copy_in(self._address(request, place), self._host_address(request, source), size)
        return place

    @staticmethod
    def _address(request: ParcelRequest, place: TensorPlace) -> int:
        return request.device_address(place, place.byte_size)

    @staticmethod
    def _host_address(request: ParcelRequest, place: TensorPlace) -> int:
        return address_of(request.input_buffer(place))

    def close(self) -> None:
        self._arenas.close()
        self._stream.close()


class CourierBackend(Backend):
    """``forebay_courier``: the server's own, on a GPU."""

    def load(self, spec: InstanceSpec) -> CourierInstance:
        return CourierInstance(spec, open_device("cuda", spec.device_id))


BACKEND = CourierBackend
