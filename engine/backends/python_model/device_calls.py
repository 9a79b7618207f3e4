"""Nested requests (BLS) some of whose tensors lie in the memory of a GPU, and are not carried over the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from forebay.client.connection import Connection
from forebay.client.device_placement import DevicePlacement
from forebay.client.device_pools import DeviceLease, DevicePools
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import BlockLease, PendingParcel
from forebay.client.places import full_shape
from forebay.engine.backends.python_model.engine_access import ANYWHERE, NestedCall, NestedRequest, NestedResponse
from forebay.engine.backends.python_model.gpus import Gpu, gpus
from forebay.engine.backends.python_model.shm_calls import BlockCall, Link
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.engine.devices.base import DeviceError
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.worker.pending_response import byte_view
from forebay.ipc.errors import Internal, ServingError
from forebay.ipc.log import log
from forebay.ipc.messages import ReplyHead, TensorPlace
from forebay.ipc.tensor import DATATYPES, byte_size


def gpu_of_outputs(model: Opened, request: NestedRequest) -> Gpu | None:
    """Return the GPU in whose memory the caller gets the outputs; None: it gets them on the host.

    Where it has not said, that is the model's GPU if an input came from there.
    """
    index = request.output_device
    if index == ANYWHERE:
        index = model.entry.device_id
        if not _has_input_on(request, index):
            return None
    return None if index < 0 else gpus.find(index)


def gpu_of_call(model: Opened, request: NestedRequest) -> Gpu | None:
    """Return the GPU on which model and caller hand tensors to each other; None: they do that on the host."""
    index = model.entry.device_id
    if index < 0 or (request.trace is not None and request.trace.shows_tensors):
        # What a trace shows must be on the host.
        return None
    return gpus.find(index) if request.output_device == index or _has_input_on(request, index) else None


def _has_input_on(request: NestedRequest, index: int) -> bool:
    return any(tensor.gpu is not None and tensor.gpu.index == index for tensor in request.inputs)


def expected_outputs(model: Opened, rows: int, wanted: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield the outputs that can be on a GPU, and their bytes: known, or guessed from earlier ones; 0: nobody knows."""
    for spec in model.signature.outputs:
        if wanted and spec.name not in wanted:
            continue
        if spec.is_fixed:
            yield spec.name, byte_size(spec.datatype, full_shape(spec, rows, model.signature.max_batch_size))
        elif spec.datatype != "BYTES":
            yield spec.name, model.output_sizes.expected(spec.name, rows)


class _Room(NamedTuple):
    """A block of device memory, and where it is in this process."""

    lease: DeviceLease
    address: int


def _loan(connection: Connection, gpu: Gpu, size: int) -> _Room | None:
    """Return room in memory that other processes on the GPU can open, too; None: there is none now."""
    lease = connection.loan_device_block(gpu.index, size)
    return None if lease is None else _opened(gpu, lease)


def _opened(gpu: Gpu, lease: DeviceLease) -> _Room | None:
    try:
        return _Room(lease, gpu.address(lease.memory, lease.offset, lease.byte_size))
    except DeviceError as error:
        log.verbose(1, f"device memory of the server cannot be used by this model: {error.text}")
        return None


def _take_room(pools: DevicePools, gpu: Gpu, size: int) -> DeviceLease | None:
    """Return room for an output that waits for it, with the connection's lock held; None: there is none now."""
    lease = pools.take(gpu.index, size)
    return lease if lease is not None and _opened(gpu, lease) is not None else None


class DeviceCall(BlockCall):
    """One to a model on a GPU: what is on that GPU is handed over there, and outputs come back there."""

    __slots__ = ("_device_placement", "_gpu")

    def __init__(
        self,
        link: Link,
        placement: DevicePlacement,
        request: NestedRequest,
        options: Options,
        gpu: Gpu,
        outputs: Iterable[tuple[str, int]],
    ) -> None:
        """Place the inputs, which fit the model, and hand them over.

        Args:
            outputs: those that are to come back on the GPU if they have room there, and so much of it; 0: the model
                knows.

        Raises:
            ServingError: there is no room, or no server any more.
        """
        self._device_placement = placement
        self._gpu = gpu
        placement.take_rooms_by(functools.partial(_take_room, link.connection.device_pools, gpu))
        fixed = {spec.name for spec in placement.model.signature.outputs if spec.is_fixed}
        for name, size in outputs:
            room = _loan(link.connection, gpu, size) if size else None
            if room is not None or name not in fixed:
                placement.want_leased(name, None if room is None else room.lease)
        super().__init__(link, placement, request, options)

    def _put(self, tensor: Tensor) -> None:
        device, placement = tensor.device, self._device_placement
        if device is None or tensor.gpu is not self._gpu:
            super()._put(tensor)
            return
        lease = self._gpu.leases.get(device.address)
        if lease is None or lease.byte_size < device.nbytes:
            room = _loan(self._link.connection, self._gpu, device.nbytes)
            if room is None:
                super()._put(tensor)
                return
            self._gpu.move(room.address, device)
            lease = room.lease
        spec = placement.model.entry.input_named(tensor.name())
        assert spec is not None
        placement.put_leased(spec, device.shape, device.nbytes, lease)

    def _tensors(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> Iterator[Tensor]:
        on_host = {tensor.name(): tensor for tensor in super()._tensors(reply, held)}
        for place in reply.outputs:
            yield self._on_gpu(place) if place.memory else on_host.pop(place.name)
        yield from on_host.values()

    def _on_gpu(self, place: TensorPlace) -> Tensor:
        pending = self._responses
        lease = pending.target(place) if isinstance(pending, PendingParcel) else None
        if lease is None:
            raise Internal("the model's answer could not be read")
        address = self._gpu.address(lease.memory, lease.offset, place.byte_size)
        array = DeviceArray(address, place.shape, DATATYPES[place.datatype].numpy_dtype, lease)
        self._gpu.leases[array.address] = lease
        return Tensor.on_gpu(place.name, place.datatype, array, self._gpu)


class OutputsOnGpu:
    """A nested call whose outputs are brought to a GPU, wherever the model has left them: a :class:`NestedCall`."""

    def __init__(self, call: NestedCall, link: Link, gpu: Gpu) -> None:
        self._call = call
        self._connection = link.connection
        self._gpu = gpu

    def take(self) -> list[NestedResponse]:
        return [self._with_outputs_brought(response) for response in self._call.take()]

    def _with_outputs_brought(self, response: NestedResponse) -> NestedResponse:
        try:
            return response._replace(outputs=tuple(map(self._brought, response.outputs)))
        except ServingError as error:
            return response._replace(outputs=(), error=error)

    def wait(self) -> None:
        self._call.wait()

    def notify(self, on_news: Callable[[], None]) -> None:
        self._call.notify(on_news)

    def cancel(self) -> None:
        self._call.cancel()

    def abandon(self) -> None:
        self._call.abandon()

    @property
    def is_over(self) -> bool:
        return self._call.is_over

    def _brought(self, tensor: Tensor) -> Tensor:
        gpu = self._gpu
        if tensor.gpu is gpu or tensor.datatype == "BYTES":
            return tensor
        data = tensor.data
        room = _loan(self._connection, gpu, data.nbytes)
        if room is not None:
            array = DeviceArray(room.address, data.shape, data.dtype, room.lease)
            gpu.leases[array.address] = room.lease
        else:
            array = gpu.allocate(data.shape, data.dtype)
        gpu.bring(array.address, byte_view(data))
        return Tensor.on_gpu(tensor.name(), tensor.datatype, array, gpu)
