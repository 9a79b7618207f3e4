"""Warm-up: sample requests that a model runs after it has loaded and before it is READY (spec C-110..C-116).

The samples take the same way as clients' requests (:class:`ParcelsRunner`: joining, binding, checks of the answers),
from a producer that exists in this process only: a small arena of its own, answers that go nowhere, counters that
nobody reads. So models get hot and statistics stay at zero.

A sequence model gets each sample as a sequence of one request, START and END at once, unless the sample names its
control tensors itself: stateful models accept it, and nothing is left behind (ours; Triton only runs what the sample
lists, spec L-054).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, Arrays, RequestInstance, TensorInstance
from forebay.engine.repository.model_spec import SequenceBatchingSpec, WarmupInputSpec, WarmupSpec
from forebay.engine.worker.head_check import check_head
from forebay.engine.worker.model_data import TENSOR_BYTES_MAX, read_model_data
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.parcels import ParcelsRunner
from forebay.engine.worker.pending_response import RawTensor
from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.sequences import SequenceControls, control_value, initial_state, sequence_policy
from forebay.ipc.arena import align, create_memory_file
from forebay.ipc.counters import instance_words
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.errors import InvalidArgument, ServingError, from_wire
from forebay.ipc.messages import ParameterValue, ParcelHead, TensorPlace
from forebay.ipc.tensor import DATATYPES, TensorSpec, decode_bytes, element_count, view_tensor
from forebay.ipc.validation import id_prefix
from forebay.ipc.worker_messages import InstanceSpec

#: The producer of samples; real ones count from 1.
_PRODUCER = 0

#: The same data at each load: a model that fails on it fails again, and can be looked into.
_SEED = 0


def warm_up(spec: InstanceSpec, instance: TensorInstance | RequestInstance) -> int:
    """Run every sample of the model's configuration.

    Returns:
        How long it took, ns.

    Raises:
        ServingError: a sample cannot be made, or the model failed on it (spec C-114).
    """
    start_ns = time.monotonic_ns()
    for sample in (msgspec.convert(plain, WarmupSpec) for plain in spec.warmup):
        if sample.batch_size == 0:
            continue
        _Warmup(spec, instance, sample).run()
    return time.monotonic_ns() - start_ns


class WarmupRequest(ParcelRequest):
    """A request of a sample. Keeps the first error, and says when it has its last answer."""

    def __init__(
        self, runner: ParcelsRunner, producer: Producer, token: int, head: ParcelHead, added_inputs: Arrays
    ) -> None:
        super().__init__(runner, producer, token, 1, time.monotonic_ns(), head)
        #: Controls and states of a sequence model that maps arrays, by name.
        self._added_inputs = added_inputs
        self._ended = threading.Event()
        self._error: ServingError | None = None

    def wait(self) -> None:
        """Wait for the last answer; models may answer from threads of their own.

        Raises:
            ServingError: any of the answers is an error.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def input_arrays(self) -> Arrays:
        return {**self._added_inputs, **super().input_arrays()}

    def reply_raw(
        self,
        tensors: Sequence[RawTensor],
        parameters: Mapping[str, ParameterValue] | None = None,
        *,
        final: bool = True,
    ) -> None:
        self._take_answer(final)

    def reply_in_place(self, places: tuple[TensorPlace, ...]) -> None:
        self._take_answer(True)

    def finish(self) -> None:
        self._take_answer(True)

    def reschedule(self) -> None:
        # An iterative sequence may go on for long; one execution has warmed the model up.
        self._take_answer(True)

    def fail(self, error: ServingError, *, final: bool = True, by_model: bool = False) -> None:
        if not self.is_final and self._error is None:
            self._error = error
        self._take_answer(final)

    def _take_answer(self, final: bool) -> None:
        if final:
            self.is_final = True
            self._ended.set()


class _Warmup:
    """One sample on its way through one instance."""

    def __init__(self, spec: InstanceSpec, instance: TensorInstance | RequestInstance, sample: WarmupSpec) -> None:
        self._spec = spec
        self._sample = sample
        self._is_batching = spec.max_batch_size > 0
        self._policy = sequence_policy(spec)
        self._takes_arrays = isinstance(instance, TensorInstance)
        self._producers = Producers()
        counters = memoryview(bytearray(instance_words(spec.max_batch_size) * 8)).cast("Q")
        self._runner = ParcelsRunner(spec, instance, self._producers, counters)
        self._tokens = itertools.count(1)

    def run(self) -> None:
        """Run the sample as often as it says.

        Raises:
            ServingError: why it could not be run to the end, as Triton says it (spec C-114).
        """
        contents = {given.name: tensor_bytes(given, self._spec.model_path) for given in self._sample.inputs}
        input_bytes = sum(align(_byte_count(given, contents[given.name])) for given in self._sample.inputs)
        reply_bytes = sum(align(tensor.row_bytes) for tensor in self._spec.outputs if tensor.is_fixed)
        producer = self._attach_producer(max(input_bytes + self._sample.batch_size * reply_bytes, 1))
        try:
            head = self._head(producer, contents)
            for _ in range(self._sample.count):
                try:
                    self._run_once(producer, head, input_bytes, reply_bytes)
                except ServingError as error:
                    raise sample_failed(self._sample, error) from None
        finally:
            self._runner.forget_producer(_PRODUCER)
            self._producers.detach(_PRODUCER)

    def _attach_producer(self, arena_bytes: int) -> Producer:
        sender, receiver = create_doorbell()
        receiver.close()  # Answers go nowhere.
        try:
            arena_fd = create_memory_file("warmup", arena_bytes)
        except OSError as error:
            sender.close()
            raise InvalidArgument(f"no memory for {arena_bytes} bytes of tensors: {error.strerror}") from None
        producer = Producer(_PRODUCER, arena_fd, arena_bytes, sender.detach())
        self._producers.attach(producer)
        return producer

    def _head(self, producer: Producer, contents: Mapping[str, bytes | None]) -> ParcelHead:
        """Write the inputs into the arena, once for all requests, and return what they have in common."""
        places: list[TensorPlace] = []
        offset = 0
        for given in self._sample.inputs:
            data = contents[given.name]
            size = _byte_count(given, data)
            if data is not None:
                producer.arena.slice(offset, size)[:] = data
            spec = self._runner.inputs.get(given.name)
            is_batched = self._is_batching and not (spec is not None and spec.is_shape_tensor)
            shape = (1, *given.dims) if is_batched else given.dims
            places.append(TensorPlace(given.name, given.datatype, shape, offset, size))
            offset += align(size)
        # The identifier is ours: a model can tell a sample from a client's request.
        head = ParcelHead(inputs=tuple(places), reply_offset=0, reply_bytes=0, id=self._sample.name)
        inputs = self._runner.inputs | self._sequence_tensors()
        limit = self._spec.max_batch_size
        try:
            check_head(head, 1, inputs, producer.arena, model=self._spec.model, max_batch_size=limit)
        except ServingError as error:
            raise from_wire(error.code, id_prefix("") + error.text) from None
        return head

    def _run_once(self, producer: Producer, head: ParcelHead, reply_offset: int, reply_bytes: int) -> None:
        requests = [
            self._request(
                producer,
                msgspec.structs.replace(head, reply_offset=reply_offset + index * reply_bytes, reply_bytes=reply_bytes),
                index + 1,
            )
            for index in range(self._sample.batch_size)
        ]
        self._runner.run_batch(requests, time.monotonic_ns(), lambda stamps: self._runner.run(requests, stamps))
        for request in requests:
            request.wait()

    def _request(self, producer: Producer, head: ParcelHead, correlation_id: int) -> WarmupRequest:
        if self._policy is None:
            return WarmupRequest(self._runner, producer, next(self._tokens), head, {})
        head = msgspec.structs.replace(head, correlation_id=correlation_id, sequence_start=True, sequence_end=True)
        listed = {place.name for place in head.inputs}
        controls = {
            name: (datatype, self._as_row(value))
            for name, datatype, value in _controls(self._policy, correlation_id)
            if name not in listed
        }
        added: Arrays = {}
        if self._takes_arrays:
            added.update((name, value) for name, (_datatype, value) in controls.items())
            added.update(
                (state.input_name, self._as_row(initial_state(state, self._spec.model_path)))
                for state in self._policy.states
                if state.input_name not in listed
            )
        request = WarmupRequest(self._runner, producer, next(self._tokens), head, added)
        request.control_inputs = controls
        return request

    def _as_row(self, value: Array) -> Array:
        return value[np.newaxis] if self._is_batching else value

    def _sequence_tensors(self) -> dict[str, TensorSpec]:
        """Return what a sample may list beside the model's inputs."""
        if self._policy is None:
            return {}
        tensors = [TensorSpec(control.name, control.datatype, (1,), optional=True) for control in self._policy.controls]
        if self._takes_arrays:
            tensors += [
                TensorSpec(state.input_name, state.datatype, state.dims, optional=True) for state in self._policy.states
            ]
        return {tensor.name: tensor for tensor in tensors}


def _controls(policy: SequenceBatchingSpec, correlation_id: int) -> Iterator[tuple[str, str, Array]]:
    """Yield name, datatype and value of each control tensor for a sequence of one request."""
    values = SequenceControls(is_start=True, is_end=True, is_ready=True, correlation_id=correlation_id)
    for control in policy.controls:
        yield control.name, control.datatype, control_value(control, values)


def sample_failed(sample: WarmupSpec, error: ServingError) -> InvalidArgument:
    """Return what a load fails with when a sample does (spec C-114); Triton lists the errors of all requests."""
    return InvalidArgument(f"failed to run warmup sample '{sample.name}': {error.text}; ")


def tensor_array(given: WarmupInputSpec, model_path: str) -> Array:
    """Return one input of one request of a sample: the datatype's numpy dtype, its dims; raises as for its bytes."""
    data = tensor_bytes(given, model_path)
    buffer = memoryview(bytes(_zero_byte_count(given)) if data is None else data)
    return view_tensor(buffer, given.datatype, given.dims)


def tensor_bytes(given: WarmupInputSpec, model_path: str) -> bytes | None:
    """Return the bytes of one input of one request of a sample; None: all of them zero.

    Random data are numbers in [0, 1) for floating point, anything for integers; for strings there are zero bytes, that
    is empty strings, as with zero data (spec C-113).

    Raises:
        InvalidArgument: dims are not all given (spec C-112), the tensor is too large, or its file has not its bytes.
        Internal: there is no such file in the model's directory ``warmup``.
    """
    if any(dim < 0 for dim in given.dims):
        raise InvalidArgument(
            f"warmup setting expects all variable-size dimensions are specified for input '{given.name}'"
        )
    size = _zero_byte_count(given)
    if size > TENSOR_BYTES_MAX:
        raise InvalidArgument(f"input '{given.name}' has {size} bytes, at most {TENSOR_BYTES_MAX} are possible")
    if given.source == "file":
        return _file_bytes(given, model_path, size)
    if given.source == "random" and given.datatype != "BYTES":
        return _random_bytes(given)
    return None


def _zero_byte_count(given: WarmupInputSpec) -> int:
    # An empty string is its length of four bytes.
    item_bytes = 4 if given.datatype == "BYTES" else DATATYPES[given.datatype].item_bytes
    return element_count(given.dims) * item_bytes


def _byte_count(given: WarmupInputSpec, data: bytes | None) -> int:
    return _zero_byte_count(given) if data is None else len(data)


def _file_bytes(given: WarmupInputSpec, model_path: str, size: int) -> bytes:
    data = read_model_data(model_path, "warmup", given.filename)
    if given.datatype == "BYTES":
        decode_bytes(memoryview(data), given.dims)
    elif len(data) != size:
        raise InvalidArgument(
            f"{id_prefix('')}warmup setting expects {size} bytes, but the data provided from {given.filename} is "
            f"{len(data)} bytes"
        )
    return data


def _random_bytes(given: WarmupInputSpec) -> bytes:
    generator = np.random.default_rng(_SEED)
    count = element_count(given.dims)
    datatype = given.datatype
    if datatype == "BOOL":
        return generator.integers(0, 2, count, np.uint8).tobytes()
    if datatype == "BF16":
        # The upper half of a float32.
        return (generator.random(count, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    if datatype.startswith("FP"):
        return generator.random(count, np.float32).astype(DATATYPES[datatype].numpy_dtype).tobytes()
    return generator.bytes(_zero_byte_count(given))
