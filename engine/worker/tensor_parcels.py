"""Runs parcels on a model that maps arrays to arrays: alone where they lie, joined, or ragged."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from forebay.engine.backends.base import Array, Arrays, TensorInstance
from forebay.engine.backends.device_instance import DeviceInstance
from forebay.engine.worker.device_parcels import DeviceParcels, can_be_joined, uses_device
from forebay.engine.worker.parcel_counting import count_gathered
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.places import Producers, backend_shape
from forebay.engine.worker.promised_outputs import PromisedOutputs
from forebay.engine.worker.ragged import RaggedPolicy, RaggedRequest
from forebay.engine.worker.reply_batch import ReplyBatch
from forebay.engine.worker.shape_tensors import ShapeTensors
from forebay.ipc.arena import align
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParcelHead, TensorPlace
from forebay.ipc.tensor import byte_size
from forebay.ipc.worker_messages import InstanceSpec

#: Input bytes of a request on a CPU, on average over a batch, up to which requests are joined.
JOINED_BYTES_MAX = 128 * 1024

#: Bindings kept for single requests at known places; at the limit all are dropped.
BINDINGS_MAX = 256


class TensorParcels:
    """Runs batches of parcels on one tensor instance."""

    def __init__(
        self,
        spec: InstanceSpec,
        instance: TensorInstance,
        producers: Producers,
        promised: PromisedOutputs,
        counters: memoryview,
    ) -> None:
        self._instance = instance
        self._producers = producers
        self._promised = promised
        #: uint64, this instance's block
        self._counters = counters
        self._is_gpu = spec.kind == "GPU"
        self._max_batch_size = spec.max_batch_size
        self._instance_number = spec.instance
        self._ragged = RaggedPolicy(spec)
        self._shape_tensors = ShapeTensors(spec)
        self._on_device = DeviceParcels(spec, instance, promised) if isinstance(instance, DeviceInstance) else None
        self._bound: dict[tuple[object, ...], Callable[[], None]] = {}

    def forget_bindings(self) -> None:
        """Drop what looks into arenas, one of which is about to be unmapped."""
        self._bound.clear()

    def run(self, requests: Sequence[ParcelRequest], stamps: list[int]) -> None:
        """Run one batch and answer its requests.

        Args:
            stamps: the second and third of (start, input end, output start, end) are set.
        """
        if self._on_device is not None and any(map(uses_device, requests)):
            self._on_device.run(requests, stamps)
            return
        if len(requests) == 1 and not self._ragged.is_needed:
            self._run_single(requests[0], stamps)
            return
        # One client's broken tensor is its own error, not its neighbours'.
        separate: list[tuple[ParcelRequest, Arrays]] = []
        for request in requests:
            try:
                separate.append((request, request.input_arrays()))
            except ServingError as error:
                request.fail(error)
        if self._ragged.is_needed:
            self._run_ragged(separate, stamps)
            return
        arrays_of_all = [arrays for _request, arrays in separate]
        if (
            self._max_batch_size > 0
            and self.is_worth_joining(arrays_of_all)
            and can_be_joined(arrays_of_all)
            and self._shape_tensors.agree(arrays_of_all)
        ):
            self._run_joined(separate, stamps)
            return
        for request, _arrays in separate:
            try:
                self._run_single(request, stamps)
            except ServingError as error:
                request.fail(error)

    def is_worth_joining(self, separate: Sequence[Arrays]) -> bool:
        """Tell whether requests should be copied together rather than run where they lie, one after the other.

        On a CPU, joining large tensors costs more than a call of the framework (`bench/large_body.py`).
        """
        if self._is_gpu:
            return True
        total = sum(array.nbytes for arrays in separate for array in arrays.values())
        return total < JOINED_BYTES_MAX * len(separate)

    def _run_single(self, request: ParcelRequest, stamps: list[int]) -> None:
        head = request.head
        wanted = self._promised.wanted([request])
        places = self._fixed_places(head, wanted, request.rows)
        if places is not None:
            key = (request.key[0], head.inputs, places)
            bound = self._bound.get(key)
            if bound is None:
                bound = self._instance.bind(request.input_arrays(), self._output_arrays(request, places))
                if len(self._bound) >= BINDINGS_MAX:
                    self._bound.clear()
                self._bound[key] = bound
            stamps[1] = time.monotonic_ns()
            bound()
            stamps[2] = time.monotonic_ns()
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            request.reply_in_place(places)
            return
        inputs = self._shape_tensors.joined([request.input_arrays()], request.rows)
        stamps[1] = time.monotonic_ns()
        results = self._instance.run(inputs, wanted)
        stamps[2] = time.monotonic_ns()
        request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
        request.reply({name: self._promised.checked(name, results, request.rows) for name in wanted})

    def _fixed_places(self, head: ParcelHead, wanted: tuple[str, ...], rows: int) -> tuple[TensorPlace, ...] | None:
        """Return where the outputs go in the lent block if their shapes are known beforehand and fit, else None."""
        if self._shape_tensors.names or any(place.datatype == "BYTES" for place in head.inputs):
            return None  # What the model reads is not where the client wrote it.
        offset, end = head.reply_offset, head.reply_offset + head.reply_bytes
        places: list[TensorPlace] = []
        for name in wanted:
            spec = self._promised.specs[name]
            if not spec.is_fixed:
                return None
            shape = (rows, *spec.dims) if self._max_batch_size > 0 else spec.dims
            size = byte_size(spec.datatype, shape)
            if offset + size > end:
                return None
            places.append(TensorPlace(name, spec.datatype, shape, offset, size))
            offset += align(size)
        return tuple(places)

    def _output_arrays(self, request: ParcelRequest, places: tuple[TensorPlace, ...]) -> Arrays:
        producer = self._producers.get(request.key[0])
        return {
            place.name: producer.array(
                place.datatype,
                backend_shape(self._promised.specs[place.name], place.shape, self._max_batch_size),
                place.offset,
            )
            for place in places
        }

    def _run_joined(self, separate: list[tuple[ParcelRequest, Arrays]], stamps: list[int]) -> None:
        requests = [request for request, _arrays in separate]
        total = sum(request.rows for request in requests)
        joined = self._shape_tensors.joined([arrays for _request, arrays in separate], total)
        count_gathered(self._counters, requests)
        wanted = self._promised.wanted(requests)
        stamps[1] = time.monotonic_ns()
        results = self._instance.run(joined, wanted)
        stamps[2] = time.monotonic_ns()
        checked = {name: self._promised.checked(name, results, total) for name in wanted}
        ends = list(itertools.accumulate(request.rows for request in requests))
        parts = [slice(end - request.rows, end) for end, request in zip(ends, requests, strict=True)]
        self._reply_together(
            requests,
            stamps,
            [
                {name: (checked[name][0], checked[name][1][part]) for name in request.requested_outputs}
                for request, part in zip(requests, parts, strict=True)
            ],
        )

    def _reply_together(
        self, requests: Sequence[ParcelRequest], stamps: list[int], outputs: Sequence[Mapping[str, tuple[str, Array]]]
    ) -> None:
        """Answer all requests of one execution, with one message to each frontend."""
        times = (stamps[0], stamps[1], stamps[2], stamps[2])
        together = ReplyBatch(self._producers, self._instance_number, times)
        try:
            for request, own in zip(requests, outputs, strict=True):
                request.times = times
                request.together = together
                request.reply(own)
        finally:
            for request in requests:
                request.together = None
            together.send()

    def _run_ragged(self, separate: list[tuple[ParcelRequest, Arrays]], stamps: list[int]) -> None:
        """Run requests whose shapes may differ, all at once if they fit together."""
        batch = [
            (request, RaggedRequest(request.rows, arrays, {place.name: place.shape for place in request.head.inputs}))
            for request, arrays in separate
        ]
        fit = self._ragged.can_join([entry for _request, entry in batch])
        for group in [batch] if fit else [[single] for single in batch]:
            try:
                self._run_ragged_group(group, stamps)
            except ServingError as error:
                for request, _entry in group:
                    request.fail(error)

    def _run_ragged_group(self, group: Sequence[tuple[ParcelRequest, RaggedRequest]], stamps: list[int]) -> None:
        requests, entries = [request for request, _entry in group], [entry for _request, entry in group]
        joined = self._ragged.join(entries)
        if len(group) > 1:
            count_gathered(self._counters, requests)
        wanted = self._promised.wanted(requests)
        stamps[1] = time.monotonic_ns()
        results = self._instance.run(joined, wanted)
        stamps[2] = time.monotonic_ns()
        total = sum(request.rows for request in requests)
        pieces = {name: self._divided(name, results, entries, total) for name in wanted}
        self._reply_together(
            requests,
            stamps,
            [
                {name: pieces[name][index] for name in request.requested_outputs}
                for index, request in enumerate(requests)
            ],
        )

    def _divided(
        self, name: str, results: Mapping[str, Array], entries: Sequence[RaggedRequest], total: int
    ) -> list[tuple[str, Array]]:
        """Return each request's part of an output, as :meth:`PromisedOutputs.checked` does the whole."""
        if self._ragged.is_scattered(name):
            datatype = self._promised.specs[name].datatype
            return [(datatype, part) for part in self._ragged.scatter(name, results.get(name), entries)]
        datatype, array = self._promised.checked(name, results, total)
        if self._max_batch_size == 0:
            return [(datatype, array)]
        ends = itertools.accumulate(entry.rows for entry in entries)
        return [(datatype, array[end - entry.rows : end]) for end, entry in zip(ends, entries, strict=True)]
