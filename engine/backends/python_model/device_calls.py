"""Nested requests (BLS) some of whose tensors lie in the memory of a GPU, and are not carried over the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from forebay.client.connection import Connection
from forebay.client.device_placement import DevicePlacement
from forebay.client.device_pools import DeviceLease, DevicePools
from forebay.client.errors import ModelChanged
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.pending import BlockLease
from forebay.client.places import full_shape
from forebay.engine.backends.python_model.engine_access import ANYWHERE, NestedCall, NestedRequest, NestedResponse
from forebay.engine.backends.python_model.gpus import Gpu, gpus
from forebay.engine.backends.python_model.shm_calls import BlockCall, Link
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.engine.devices.base import DeviceError
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.worker.pending_response import byte_view
from forebay.ipc.errors import Internal, Moved, ServingError
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


def _has_input_on(request: NestedRequest, index: int) -> bool:
    return any(tensor.gpu is not None and tensor.gpu.index == index for tensor in request.inputs)


def device_call(
    link: Link, model: Opened, rows: int, request: NestedRequest, options: Options, output_gpu: Gpu | None
) -> NestedCall | None:
    """Hand a request over some of whose tensors need not leave their GPU; None: all of them are best on the host.

    Args:
        output_gpu: in whose memory the caller gets the outputs.

    Raises:
        ServingError: there is no room, or no server any more.
    """
    if request.trace is not None and request.trace.shows_tensors:
        # What a trace shows must be on the host.
        return None
    if model.ensemble is not None:
        return _call_of_ensemble(link, model, request, options)
    index = model.entry.device_id
    gpu = gpus.find(index) if index >= 0 and (request.output_device == index or _has_input_on(request, index)) else None
    if gpu is None:
        return None
    placement = DevicePlacement(link.connection, model)
    placement.take_rooms_by(functools.partial(_take_room, link.connection.device_pools, gpu))
    if output_gpu is gpu:
        _want_outputs(placement, link.connection, rows, request.outputs, gpu)
    return DeviceCall(link, placement, request, options, dict.fromkeys((t.name() for t in request.inputs), gpu))


def _want_outputs(
    placement: DevicePlacement, connection: Connection, rows: int, wanted: tuple[str, ...], gpu: Gpu
) -> None:
    """Take room on the GPU for outputs of known size, or as large as they were lately; others get it when they exist.

    Args:
        wanted: outputs that the caller asks for; empty: all.
    """
    model = placement.model
    for spec in model.signature.outputs:
        if spec.datatype == "BYTES" or (wanted and spec.name not in wanted):
            continue
        if spec.is_fixed:
            size = byte_size(spec.datatype, full_shape(spec, rows, model.signature.max_batch_size))
        else:
            size = model.output_sizes.expected(spec.name, rows)
        room = _loan(connection, gpu, size) if size else None
        if room is not None or not spec.is_fixed:
            placement.want_leased(spec.name, None if room is None else room.lease)


def _call_of_ensemble(link: Link, model: Opened, request: NestedRequest, options: Options) -> NestedCall | None:
    """Hand a request to an ensemble over whose steps take, or leave, tensors on the caller's GPUs."""
    connection = link.connection
    readers = connection.device_inputs(model, options)
    inputs: dict[str, Gpu] = {}
    for tensor in request.inputs:
        gpu = tensor.gpu
        if gpu is not None and readers.get(tensor.name()) == gpu.index:
            inputs[tensor.name()] = gpu
    # The steps' own room is taken from the same memory, which this process must be able to open.
    devices = [gpu.index for gpu in _output_gpus(request) if _loan(connection, gpu, 1) is not None]
    if not (inputs or devices):
        return None
    placement = DevicePlacement(connection, model)
    placement.take_outputs_on(devices)
    try:
        return DeviceCall(link, placement, request, options, inputs)
    except (ModelChanged, Moved):
        # A step has moved in this moment: the host is always right.
        return None


def _output_gpus(request: NestedRequest) -> set[Gpu]:
    """Return the GPUs in whose memory the caller takes the outputs of an ensemble; all others come to the host."""
    if request.output_device == ANYWHERE:
        return {tensor.gpu for tensor in request.inputs if tensor.gpu is not None}
    gpu = gpus.find(request.output_device) if request.output_device >= 0 else None
    return set() if gpu is None else {gpu}


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
    """One some of whose tensors are handed over on a GPU."""

    __slots__ = ("_device_placement", "_input_gpus")

    def __init__(
        self,
        link: Link,
        placement: DevicePlacement,
        request: NestedRequest,
        options: Options,
        input_gpus: Mapping[str, Gpu],
    ) -> None:
        """Place the inputs, which fit the model, and hand them over.

        Args:
            input_gpus: where inputs may stay that are there, by name.

        Raises:
            ServingError: there is no room, or no server any more.
        """
        self._device_placement = placement
        self._input_gpus = input_gpus
        super().__init__(link, placement, request, options)

    def _put(self, tensor: Tensor) -> None:
        device, gpu, placement = tensor.device, tensor.gpu, self._device_placement
        if device is None or gpu is None or self._input_gpus.get(tensor.name()) is not gpu:
            super()._put(tensor)
            return
        lease = gpu.leases.get(device.address)
        if lease is None or lease.byte_size < device.nbytes:
            room = _loan(self._link.connection, gpu, device.nbytes)
            if room is None:
                super()._put(tensor)
                return
            gpu.move(room.address, device)
            lease = room.lease
        spec = placement.model.entry.input_named(tensor.name())
        assert spec is not None
        placement.put_leased(spec, device.shape, device.nbytes, lease)

    def _response(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> NestedResponse:
        try:
            return super()._response(reply, held)
        except ServingError as error:
            return NestedResponse((), {}, error, True, False)

    def _tensors(self, reply: ReplyHead, held: tuple[BlockLease, ...]) -> Iterator[Tensor]:
        on_host = {tensor.name(): tensor for tensor in super()._tensors(reply, held)}
        for place in reply.outputs:
            yield self._on_gpu(place, held) if place.memory else on_host.pop(place.name)
        yield from on_host.values()

    def _on_gpu(self, place: TensorPlace, held: tuple[BlockLease, ...]) -> Tensor:
        lease = self._responses.device_lease(place, held)
        gpu = None if lease is None else gpus.find(lease.memory.device_id)
        if lease is None or gpu is None:
            raise Internal("the model's answer could not be read")
        address = gpu.address(lease.memory, lease.offset, place.byte_size)
        array = DeviceArray(address, place.shape, DATATYPES[place.datatype].numpy_dtype, lease)
        gpu.leases[array.address] = lease
        return Tensor.on_gpu(place.name, place.datatype, array, gpu)


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
            return msgspec.structs.replace(response, outputs=tuple(map(self._brought, response.outputs)))
        except ServingError as error:
            return msgspec.structs.replace(response, outputs=(), error=error)

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
