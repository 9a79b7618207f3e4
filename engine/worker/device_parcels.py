"""Runs parcels on a model that lives on a device, where any tensor may lie on that device already.

Each input is copied once to where the model reads it, from host or device memory; each output once to where its client
wants it. Nothing that is on the device comes to the host on the way. An output for which its client has lent too little
room, because nobody knew how large it would be, is copied aside until there is room.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from forebay.engine.backends.base import Array
from forebay.engine.backends.device_instance import DeviceInstance, PlacedTensor
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.poisoning import DeviceBatch, DeviceGuard
from forebay.engine.worker.kept_outputs import Copies, KeptOutput, KeptOutputs
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.promised_outputs import PromisedOutputs
from forebay.engine.worker.shape_tensors import ShapeTensors
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import TensorPlace
from forebay.ipc.worker_messages import InstanceSpec

_Placed = tuple[ParcelRequest, dict[str, PlacedTensor]]


def uses_device(request: ParcelRequest) -> bool:
    """Whether any tensor of the request lies, or shall lie, in device memory."""
    return bool(request.head.memories or request.head.targets)


class DeviceParcels:
    """Runs batches of parcels on one instance."""

    def __init__(self, spec: InstanceSpec, instance: DeviceInstance, promised: PromisedOutputs) -> None:
        self._instance = instance
        self._is_batching = spec.max_batch_size > 0
        self._stream = instance.stream
        self._promised = promised
        self._kept = KeptOutputs(instance.device, self._run_copies)
        self._shape_tensors = ShapeTensors(spec)

    def run(self, requests: Sequence[ParcelRequest], stamps: list[int]) -> None:
        """Run one batch and answer its requests.

        Args:
            stamps: the second and third of (start, input end, output start, end) are set.
        """
        batch: list[_Placed] = []
        for request in requests:
            # One client's broken tensor is its own error, not its neighbours'.
            try:
                batch.append((request, self._inputs(request)))
            except ServingError as error:
                request.fail(error)
        separate = [tensors for _request, tensors in batch]
        fit = self._is_batching and can_be_joined(separate) and self._shape_tensors.agree(separate)
        for group in [batch] if fit else [[single] for single in batch]:
            try:
                self._run_group(group, stamps)
            except ServingError as error:
                for request, _tensors in group:
                    request.fail(error)

    def _inputs(self, request: ParcelRequest) -> dict[str, PlacedTensor]:
        inputs: dict[str, PlacedTensor] = {
            place.name: request.input_on_device(place) if place.memory else request.input_array(place)
            for place in request.head.inputs
        }
        on_device = {
            name: tensor
            for name, tensor in inputs.items()
            if name in self._shape_tensors.names and isinstance(tensor, DeviceArray)
        }
        if on_device:
            # Shapes are read on the host.
            with DeviceGuard():
                inputs.update(self._instance.fetch(on_device))
        return inputs

    def _run_group(self, group: Sequence[_Placed], stamps: list[int]) -> None:
        requests = [request for request, _tensors in group]
        wanted = self._promised.wanted(requests)
        answers: list[tuple[ParcelRequest, dict[str, tuple[str, Array]]]] = []
        total = sum(request.rows for request in requests)
        inputs = [{**tensors, **self._shape_tensors.with_batch_size(tensors, total)} for _request, tensors in group]
        stamps[1] = time.monotonic_ns()
        with DeviceBatch(self._instance.device, self._stream):
            results = self._instance.compute(inputs, wanted)
            shapes = {name: self._promised.client_shape(name, results.get(name), total) for name in wanted}
            first = 0
            for request in requests:
                own = {
                    name: results[name] if len(requests) == 1 else results[name].rows(first, request.rows)
                    for name in request.requested_outputs
                }
                first += request.rows
                try:
                    answers.append((request, self._hand_over(request, own, shapes)))
                except ServingError as error:
                    request.fail(error)
        stamps[2] = time.monotonic_ns()
        for request, arrays in answers:
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            request.reply(arrays)

    def _run_copies(self, copies: Copies) -> None:
        with DeviceBatch(self._instance.device, self._stream):
            copies(self._stream)

    def _hand_over(
        self, request: ParcelRequest, outputs: Mapping[str, DeviceArray], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[str, Array]]:
        """Begin to copy a request's outputs to where it wants them, or aside; return those that go to the host.

        Raises:
            Internal: one has less room than it needs (spec H-198).
        """
        hosts: dict[str, tuple[str, Array]] = {}
        placed: list[TensorPlace] = []
        kept: list[KeptOutput] = []
        for name, tensor in outputs.items():
            datatype = self._promised.specs[name].datatype
            shape = (request.rows, *shapes[name][1:]) if self._is_batching else shapes[name]
            target = request.target(name, tensor.nbytes)
            if target is None:
                aside = self._aside(request, name, tensor)
                if aside is not None:
                    kept.append(KeptOutput(name, datatype, shape, aside, self._kept))
                    continue
                array = request.lend_array(datatype, shape)
                if tensor.nbytes:
                    self._stream.copy_out(array.ctypes.data, tensor.address, tensor.nbytes)
                hosts[name] = (datatype, array)
                continue
            address = request.target_address(target, tensor.nbytes)
            if tensor.nbytes:
                self._stream.copy_within(address, tensor.address, tensor.nbytes)
            placed.append(TensorPlace(name, datatype, shape, target.offset, tensor.nbytes, memory=target.memory))
        request.placed, request.kept = tuple(placed), tuple(kept)
        return hosts

    def _aside(self, request: ParcelRequest, name: str, tensor: DeviceArray) -> DeviceArray | None:
        """Begin to copy an output that waits for room; None: it does not wait, or there is no room for that either."""
        if not request.awaits_room(name, tensor.nbytes):
            return None
        aside = self._kept.take(tensor.shape, tensor.dtype)
        if aside is not None:
            self._stream.copy_within(aside.address, tensor.address, tensor.nbytes)
        return aside


def can_be_joined(separate: Sequence[Mapping[str, PlacedTensor]]) -> bool:
    """Tell whether requests have the same inputs with the same shapes but for the batch dimension."""
    if not separate:
        return False
    shapes = {name: tensor.shape[1:] for name, tensor in separate[0].items()}
    return all(
        len(tensors) == len(shapes)
        and all(
            name in shapes and tensor.ndim > 0 and tensor.shape[1:] == shapes[name] for name, tensor in tensors.items()
        )
        for tensors in separate
    )
