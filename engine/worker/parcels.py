"""Requests outside slabs: their tensors in blocks of an arena, their answers in a block that the producer lends.

One request lives as: received -> (answered | failed)* -> final. A response whose outputs do not fit the lent block waits
here, in this process, until the producer has lent a larger one (COLLECT), so nobody has to know sizes beforehand.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, Arrays, RequestInstance, TensorInstance
from forebay.engine.worker.places import Producer, Producers, backend_shape, client_shape
from forebay.ipc.arena import align
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.errors import BackendFailed, Internal, ServingError
from forebay.ipc.messages import InlineTensor, InstanceSpec, ParameterValue, ParcelHead, ReplyHead, TensorPlace
from forebay.ipc.tensor import DATATYPES, TensorSpec, byte_size, decode_bytes, encode_bytes
from forebay.ipc.wire import FLAG_FINAL, GROW, HEADER, MESSAGE_BYTES_MAX, PARCEL, TIMES, TOKEN, Kind

#: Bytes of outputs that travel in the message itself when no reply block is at hand (responses of decoupled models).
INLINE_BYTES_MAX = 16 * 1024

_decode_head = msgspec.msgpack.Decoder(ParcelHead).decode
_encode_reply = msgspec.msgpack.Encoder().encode


class PendingResponse:
    """A response that waits for a reply block, or behind one that does."""

    __slots__ = ("encoded", "final", "index", "parameters", "total_bytes")

    def __init__(
        self,
        encoded: list[tuple[str, str, tuple[int, ...], memoryview]],
        parameters: dict[str, ParameterValue],
        index: int,
        final: bool,
        total_bytes: int,
    ) -> None:
        self.encoded = encoded
        self.parameters = parameters
        self.index = index
        self.final = final
        self.total_bytes = total_bytes


class ParcelRequest:
    """One request as a :class:`RequestInstance` sees it. Thread-safe: models may answer from their own threads."""

    def __init__(
        self, runner: ParcelsRunner, producer: Producer, token: int, rows: int, enqueue_ns: int, head: ParcelHead
    ) -> None:
        self.head = head
        self.rows = rows
        self.token = token
        self.enqueue_ns = enqueue_ns
        #: True once the client has left or its deadline has passed; the model may stop early.
        self.is_cancelled = False
        self.is_final = False
        self._runner = runner
        self._producer = producer
        self._responses = 0
        self._waiting: deque[PendingResponse] = deque()
        self._block_free = head.reply_bytes > 0
        self.times = (0, 0, 0, 0)

    @property
    def key(self) -> tuple[int, int]:
        """Unique among the requests of this worker."""
        return self._producer.id, self.token

    @property
    def response_count(self) -> int:
        return self._responses

    def input_buffer(self, place: TensorPlace) -> memoryview:
        """Return the input's bytes in shared memory; they belong to the request until its final response."""
        return self._producer.arena.slice(place.offset, place.byte_size)

    def input_arrays(self) -> Arrays:
        """Return every input: fixed-size elements as read-in-place views, BYTES as object arrays of ``bytes``.

        Raises:
            Internal, InvalidArgument: the head does not describe tensors inside the arena.
        """
        runner = self._runner
        arrays: Arrays = {}
        for place in self.head.inputs:
            spec = runner.inputs.get(place.name)
            shape = place.shape if spec is None else backend_shape(spec, place.shape, runner.max_batch_size)
            if place.datatype == "BYTES":
                arrays[place.name] = decode_bytes(self.input_buffer(place), shape)
                continue
            if byte_size(place.datatype, shape) != place.byte_size:
                raise Internal(f"input '{place.name}' does not have the bytes of its shape")
            arrays[place.name] = self._producer.array(place.datatype, shape, place.offset)
        return arrays

    def reply(
        self,
        outputs: Mapping[str, tuple[str, Array]],
        parameters: Mapping[str, ParameterValue] | None = None,
        *,
        final: bool = True,
    ) -> None:
        """Send one response.

        Args:
            outputs: name to (datatype, array in the client's shape); copied before the call returns.
            parameters: response parameters.
            final: no further response follows.
        """
        encoded: list[tuple[str, str, tuple[int, ...], memoryview]] = []
        total = 0
        for name, (datatype, array) in outputs.items():
            if datatype == "BYTES":
                data = memoryview(encode_bytes(array))
            else:
                data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            encoded.append((name, datatype, tuple(array.shape), data))
            total += align(len(data))
        with self._runner.producers.lock:
            if self.is_final:
                raise BackendFailed("a response was sent after the final one")
            self.is_final = final
            response = PendingResponse(encoded, dict(parameters or {}), self._responses, final, total)
            self._responses += 1
            self._waiting.append(response)
            if len(self._waiting) == 1:
                self._pump()
        if final:
            self._runner.answered(self)

    def reply_in_place(self, places: tuple[TensorPlace, ...]) -> None:
        """Send the one response whose outputs already lie in the lent block."""
        with self._runner.producers.lock:
            self.is_final = True
            self._send(ReplyHead(outputs=places), final=True)
        self._runner.answered(self)

    def finish(self) -> None:
        """Say that no (further) response follows, without one (decoupled models)."""
        self.reply({}, final=True)

    def fail(self, error: ServingError, *, final: bool = True) -> None:
        """Answer with an error."""
        with self._runner.producers.lock:
            if self.is_final:
                return
            self.is_final = final
            # Behind responses that wait for room, an error would overtake them: they are worth nothing any more.
            self._waiting.clear()
            self._send(ReplyHead(code=error.code, text=error.text[:60_000], index=self._responses), final=final)
            self._responses += 1
        if final:
            self._runner.answered(self, failed=error)

    def collect(self, offset: int, size: int) -> None:
        """The producer has lent ``size`` bytes at ``offset`` for the response that waits first."""
        with self._runner.producers.lock:
            if not self._waiting:
                return
            response = self._waiting[0]
            if size < response.total_bytes:
                self._send(ReplyHead(needs_bytes=response.total_bytes, index=response.index), final=False)
                return
            self._waiting.popleft()
            self._write(response, offset)
            self._pump()
        if self.is_final and not self._waiting:
            self._runner.forget(self)

    @property
    def is_waiting(self) -> bool:
        """True while responses wait for room."""
        return bool(self._waiting)

    def _pump(self) -> None:
        # Send what can go without new room; stops at the first response that needs a block.
        while self._waiting:
            response = self._waiting[0]
            if self._block_free and response.total_bytes <= self.head.reply_bytes:
                # The lent block serves one response: the producer frees it when it has been read.
                self._block_free = False
                self._waiting.popleft()
                self._write(response, self.head.reply_offset)
            elif response.total_bytes <= INLINE_BYTES_MAX:
                self._waiting.popleft()
                inline = tuple(InlineTensor(n, d, s, bytes(data)) for n, d, s, data in response.encoded)
                self._send(
                    ReplyHead(inline=inline, parameters=response.parameters, index=response.index), final=response.final
                )
            else:
                self._send(ReplyHead(needs_bytes=response.total_bytes, index=response.index), final=False)
                return

    def _write(self, response: PendingResponse, offset: int) -> None:
        places: list[TensorPlace] = []
        for name, datatype, shape, data in response.encoded:
            self._producer.arena.slice(offset, len(data))[:] = data
            places.append(TensorPlace(name, datatype, shape, offset, len(data)))
            offset += align(len(data))
        self._runner.counters[Count.SCATTERED_BYTES] += response.total_bytes
        self._send(
            ReplyHead(outputs=tuple(places), parameters=response.parameters, index=response.index), final=response.final
        )

    def _send(self, reply: ReplyHead, *, final: bool) -> None:
        payload = _encode_reply(reply)
        if len(payload) > MESSAGE_BYTES_MAX - 256:
            payload = _encode_reply(
                ReplyHead(code=int(Internal.code), text="the response's parameters are too large", index=reply.index)
            )
        header = HEADER.pack(Kind.PARCEL_REPLY, FLAG_FINAL if final else 0, 1, self._runner.spec.instance, 0)
        self._producer.bell.ring(header + TIMES.pack(*self.times) + TOKEN.pack(self.token) + payload)


class ParcelsRunner:
    """Runs PARCELS messages on either kind of instance."""

    def __init__(
        self, spec: InstanceSpec, instance: TensorInstance | RequestInstance, producers: Producers, counters: memoryview
    ) -> None:
        self.spec = spec
        self.producers = producers
        #: uint64, this instance's block
        self.counters = counters
        self.max_batch_size = spec.max_batch_size
        self.inputs: dict[str, TensorSpec] = {tensor.name: tensor for tensor in spec.inputs}
        self.outputs: dict[str, TensorSpec] = {tensor.name: tensor for tensor in spec.outputs}
        self._instance = instance
        #: Requests without a final response, or with responses that wait for room.
        self._open: dict[tuple[int, int], ParcelRequest] = {}
        self._bound: dict[tuple[object, ...], Callable[[], None]] = {}

    @property
    def open_count(self) -> int:
        return len(self._open)

    def forget_producer(self, producer: int) -> None:
        """Its requests have no reader any more."""
        self._bound.clear()
        for key in [key for key in self._open if key[0] == producer]:
            self._open.pop(key).is_cancelled = True

    def cancel(self, producer: int, message: memoryview, count: int) -> None:
        """Mark requests whose clients left."""
        for index in range(count):
            (token,) = TOKEN.unpack_from(message, HEADER.size + index * TOKEN.size)
            request = self._open.get((producer, token))
            if request is not None:
                request.is_cancelled = True

    def collect(self, producer: int, message: memoryview) -> None:
        """A larger reply block has been lent."""
        token, offset, size = GROW.unpack_from(message, HEADER.size)
        request = self._open.get((producer, token))
        if request is not None:
            request.collect(offset, size)

    def answered(self, request: ParcelRequest, failed: ServingError | None = None) -> None:
        """Count a request whose final response is known."""
        if not request.is_waiting:
            self._open.pop(request.key, None)
        if failed is None:
            self.counters[Count.SUCCESS] += 1
        else:
            backend = isinstance(failed, BackendFailed)
            self.counters[Count.FAILED_BACKEND if backend else Count.FAILED_OTHER] += 1

    def forget(self, request: ParcelRequest) -> None:
        """The last waiting response has been sent."""
        self._open.pop(request.key, None)

    def execute(self, message: memoryview, start_ns: int) -> bytes:
        """Run one PARCELS message.

        Returns:
            The TIMES of the batch, packed, for the scheduler.
        """
        requests = self._unpack(message, start_ns)
        if not requests:
            return TIMES.pack(start_ns, start_ns, start_ns, start_ns)
        rows = sum(max(request.rows, 1) for request in requests)
        stamps = [start_ns, start_ns, start_ns, start_ns]
        try:
            if isinstance(self._instance, RequestInstance):
                stamps[1] = time.monotonic_ns()
                self._instance.execute(requests)
                stamps[2] = time.monotonic_ns()
            else:
                self._run_tensors(self._instance, requests, stamps)
        except ServingError as error:
            self._fail_all(requests, error)
        except Exception as error:  # a model's own code may raise anything
            self._fail_all(requests, BackendFailed(f"{type(error).__name__}: {error}"))
        stamps[3] = time.monotonic_ns()
        stamps[2] = max(stamps[2], stamps[1])
        self._count(requests, rows, stamps)
        return TIMES.pack(*stamps)

    def _unpack(self, message: memoryview, start_ns: int) -> list[ParcelRequest]:
        _kind, _flags, count, _sender, _batch = HEADER.unpack_from(message)
        offset = HEADER.size
        requests: list[ParcelRequest] = []
        for _ in range(count):
            producer_id, rows, token, enqueue_ns, head_bytes = PARCEL.unpack_from(message, offset)
            offset += PARCEL.size
            raw = message[offset : offset + head_bytes]
            offset += head_bytes
            try:
                producer = self.producers.get(producer_id)
                head = _decode_head(raw)
            except (Internal, msgspec.DecodeError, msgspec.ValidationError):
                continue  # The producer died, or speaks another protocol; it alone is concerned.
            request = ParcelRequest(self, producer, token, rows, enqueue_ns, head)
            request.times = (start_ns, start_ns, start_ns, start_ns)
            self._open[request.key] = request
            requests.append(request)
        return requests

    def _fail_all(self, requests: Sequence[ParcelRequest], error: ServingError) -> None:
        for request in requests:
            request.fail(error)

    def _count(self, requests: Sequence[ParcelRequest], rows: int, stamps: list[int]) -> None:
        counters = self.counters
        start_ns, input_end_ns, output_start_ns, end_ns = stamps
        count = len(requests)
        counters[Count.EXECUTIONS] += 1
        counters[Count.INFERENCES] += rows
        counters[Count.QUEUE_NS] += max(sum(start_ns - request.enqueue_ns for request in requests), 0)
        counters[Count.INPUT_NS] += count * (input_end_ns - start_ns)
        counters[Count.INFER_NS] += count * (output_start_ns - input_end_ns)
        counters[Count.OUTPUT_NS] += count * (end_ns - output_start_ns)
        counters[Count.LAST_INFERENCE_MS] = time.time_ns() // 1_000_000
        counters[Count.SEGMENTS] += count
        counters[Count.BUSY_NS] += end_ns - start_ns
        if rows <= max(self.max_batch_size, 1):
            word = Count.BATCH_SIZES + 4 * (rows - 1)
            counters[word] += 1
            counters[word + 1] += input_end_ns - start_ns
            counters[word + 2] += output_start_ns - input_end_ns
            counters[word + 3] += end_ns - output_start_ns

    # --- tensor instances ---

    def _run_tensors(self, instance: TensorInstance, requests: list[ParcelRequest], stamps: list[int]) -> None:
        if len(requests) == 1:
            self._run_single(instance, requests[0], stamps)
        else:
            self._run_joined(instance, requests, stamps)

    def _wanted(self, requests: Sequence[ParcelRequest]) -> tuple[str, ...]:
        if any(not request.head.outputs for request in requests):
            return tuple(self.outputs)
        wanted = {name for request in requests for name in request.head.outputs}
        return tuple(name for name in self.outputs if name in wanted)

    def _run_single(self, instance: TensorInstance, request: ParcelRequest, stamps: list[int]) -> None:
        head = request.head
        wanted = self._wanted([request])
        places = self._fixed_places(head, wanted, request.rows)
        if places is not None:
            key = (request.key[0], head.inputs, places)
            bound = self._bound.get(key)
            if bound is None:
                bound = instance.bind(request.input_arrays(), self._output_arrays(request, places))
                if len(self._bound) >= 256:
                    self._bound.clear()
                self._bound[key] = bound
            stamps[1] = time.monotonic_ns()
            bound()
            stamps[2] = time.monotonic_ns()
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            request.reply_in_place(places)
            return
        inputs = request.input_arrays()
        stamps[1] = time.monotonic_ns()
        results = instance.run(inputs, wanted)
        stamps[2] = time.monotonic_ns()
        request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
        request.reply({name: self._checked(name, results, request.rows) for name in wanted})

    def _fixed_places(self, head: ParcelHead, wanted: tuple[str, ...], rows: int) -> tuple[TensorPlace, ...] | None:
        """Return where the outputs go in the lent block if their shapes are known beforehand and fit, else None."""
        if any(place.datatype == "BYTES" for place in head.inputs):
            return None
        offset, end = head.reply_offset, head.reply_offset + head.reply_bytes
        places: list[TensorPlace] = []
        for name in wanted:
            spec = self.outputs[name]
            if not spec.is_fixed:
                return None
            shape = (rows, *spec.dims) if self.max_batch_size > 0 else spec.dims
            size = byte_size(spec.datatype, shape)
            if offset + size > end:
                return None
            places.append(TensorPlace(name, spec.datatype, shape, offset, size))
            offset += align(size)
        return tuple(places)

    def _output_arrays(self, request: ParcelRequest, places: tuple[TensorPlace, ...]) -> Arrays:
        producer = self.producers.get(request.key[0])
        return {
            place.name: producer.array(
                place.datatype, backend_shape(self.outputs[place.name], place.shape, self.max_batch_size), place.offset
            )
            for place in places
        }

    def _run_joined(self, instance: TensorInstance, requests: list[ParcelRequest], stamps: list[int]) -> None:
        separate = [request.input_arrays() for request in requests]
        joined: Arrays = {}
        copied = 0
        for name in separate[0]:
            parts = [arrays[name] for arrays in separate]
            joined[name] = np.concatenate(parts)
            copied += joined[name].nbytes
        self.counters[Count.GATHERED_BYTES] += copied
        self.counters[Count.BATCHES_GATHERED] += 1
        wanted = self._wanted(requests)
        stamps[1] = time.monotonic_ns()
        results = instance.run(joined, wanted)
        stamps[2] = time.monotonic_ns()
        total = sum(request.rows for request in requests)
        checked = {name: self._checked(name, results, total) for name in wanted}
        first = 0
        for request in requests:
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            own = request.head.outputs or wanted
            request.reply({name: (checked[name][0], checked[name][1][first : first + request.rows]) for name in own})
            first += request.rows

    def _checked(self, name: str, results: Mapping[str, Array], rows: int) -> tuple[str, Array]:
        """Return (datatype, array in the client's shape) of an output after comparing it with the configuration."""
        spec = self.outputs[name]
        array = results.get(name)
        if array is None:
            raise BackendFailed(f"model '{self.spec.model}' did not produce output '{name}'")
        shape = client_shape(spec, tuple(array.shape), self.max_batch_size)
        dims = shape[1:] if self.max_batch_size > 0 else shape
        matches = len(dims) == len(spec.dims) and all(
            want in (-1, have) for want, have in zip(spec.dims, dims, strict=True)
        )
        if self.max_batch_size > 0:
            matches = matches and len(shape) > 0 and shape[0] == rows
        is_text = array.dtype.kind in "OSU"
        if (
            not matches
            or is_text != (spec.datatype == "BYTES")
            or (not is_text and array.dtype != DATATYPES[spec.datatype].numpy_dtype)
        ):
            expected = [rows, *spec.dims] if self.max_batch_size > 0 else list(spec.dims)
            raise BackendFailed(
                f"model '{self.spec.model}' produced output '{name}' as {array.dtype} {list(shape)}, "
                f"but its configuration promises {spec.datatype} {expected}"
            )
        return spec.datatype, array.reshape(shape)
