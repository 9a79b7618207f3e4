"""Requests outside slabs: their tensors in blocks of an arena, their answers in a block that the producer lends.

One request lives as: received -> (answered | failed)* -> final. A response whose outputs do not fit the lent block
waits here, in this process, until the producer has lent a larger one (COLLECT), so nobody has to know sizes beforehand.
"""

from __future__ import annotations

import itertools
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, Arrays, RequestInstance, TensorInstance
from forebay.engine.worker.head_check import check_head
from forebay.engine.worker.places import Producer, Producers, backend_shape, client_shape
from forebay.engine.worker.ragged import RaggedPolicy, RaggedRequest
from forebay.ipc.arena import align
from forebay.ipc.counters import LAST_BUCKET
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.errors import ArenaFull, BackendFailed, Cancelled, Internal, InvalidArgument, ServingError
from forebay.ipc.messages import InlineTensor, InstanceSpec, ParameterValue, ParcelHead, ReplyHead, TensorPlace
from forebay.ipc.tensor import DATATYPES, TensorSpec, byte_size, decode_bytes, encode_bytes
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_RESCHEDULE,
    GROW,
    HEADER,
    MESSAGE_BYTES_MAX,
    OPEN,
    PARCEL,
    TIMES,
    TOKEN,
    Kind,
)

#: Input bytes of a request on a CPU, on average over a batch, up to which requests are joined.
JOINED_BYTES_MAX = 128 * 1024
#: Bytes of outputs that travel in the message itself when no reply block is at hand (responses of decoupled models).
INLINE_BYTES_MAX = 16 * 1024

#: ``ReplyHead.index`` of the message that ends a request without being a response itself (decoupled models).
NO_RESPONSE_INDEX = -1

#: Bindings kept for single requests at known places; at the limit all are dropped.
BINDINGS_MAX = 256

#: Messages that may wait for a producer that does not read, before the model that sends them has to wait too.
BACKLOG_MAX = 64

#: Responses of one request that may wait for reply blocks, before the model that sends them has to wait too.
WAITING_MAX = 8

#: How long a model's thread waits for such a producer before the request counts as abandoned.
BACKLOG_WAIT_S = 10.0

_decode_head = msgspec.msgpack.Decoder(ParcelHead).decode
_encode_reply = msgspec.msgpack.Encoder().encode


class RawTensor(NamedTuple):
    """An output as the bytes that the client gets."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Full shape as the client sees it."""
    data: memoryview
    """uint8, C order; BYTES serialised (spec D-004)"""


class PendingResponse:
    """A response that waits for a reply block, or behind one that does."""

    __slots__ = ("final", "index", "parameters", "tensors", "total_bytes")

    def __init__(
        self, tensors: Sequence[RawTensor], parameters: dict[str, ParameterValue], index: int, final: bool
    ) -> None:
        self.tensors: Sequence[RawTensor] = tensors
        self.parameters = parameters
        self.index = index
        self.final = final
        self.total_bytes = sum(align(len(tensor.data)) for tensor in tensors)

    def keep(self) -> None:
        """Copy the tensors: the model may write into its arrays again while they wait."""
        self.tensors = [tensor._replace(data=memoryview(bytes(tensor.data))) for tensor in self.tensors]


class ParcelRequest:
    """One request as a :class:`RequestInstance` sees it. Thread-safe: models may answer from their own threads."""

    def __init__(
        self, runner: ParcelsRunner, producer: Producer, token: int, rows: int, enqueue_ns: int, head: ParcelHead
    ) -> None:
        self.head = head
        self.rows = rows
        self.token = token
        self.enqueue_ns = enqueue_ns
        self.is_final = False
        #: start, input end, output start, end: monotonic ns; an end of 0 means: the moment of the response.
        self.times: tuple[int, int, int, int] = (0, 0, 0, 0)
        #: When the execution that it was part of had returned; 0: not yet.
        self.executed_ns = 0
        self._runner = runner
        self._producer = producer
        self._responses = 0
        self._waiting: deque[PendingResponse] = deque()
        self._is_cancelled = False
        # The lent block serves one response: the producer frees it when it has been read.
        self._block_free = head.reply_bytes > 0
        self._block_used_bytes = 0
        #: Control tensors of a sequence model, by name: (datatype, array in the model's shape).
        self.control_inputs: dict[str, tuple[str, Array]] = {}

    def reschedule(self) -> None:
        """Have the request come again in a later batch; only for models with iterative sequences."""
        self._runner.reschedule(self)

    def copy_as(self, kind: type[ParcelRequest]) -> ParcelRequest:
        """Return another request with the same inputs, which nobody has sent."""
        return kind(self._runner, self._producer, 0, self.rows, self.enqueue_ns, self.head)

    # --- what the model asks ---

    @property
    def key(self) -> tuple[int, int]:
        """Unique among the requests of this worker."""
        return self._producer.id, self.token

    @property
    def response_count(self) -> int:
        return self._responses

    @property
    def is_cancelled(self) -> bool:
        """True once the client has left or the deadline has passed; the model may stop early."""
        if not self._is_cancelled and not self.is_final:
            self._runner.take_signals()
            deadline_ns = self.head.deadline_ns
            if (deadline_ns and time.monotonic_ns() >= deadline_ns) or self._producer.is_gone:
                self._is_cancelled = True
        return self._is_cancelled

    @property
    def requested_outputs(self) -> tuple[str, ...]:
        """Configured outputs that the client wants: those it listed, else all."""
        known = self._runner.outputs
        listed = self.head.outputs
        return tuple(name for name in listed if name in known) if listed else tuple(known)

    def input_buffer(self, place: TensorPlace) -> memoryview:
        """Return the input's bytes in shared memory; they belong to the request until its final response.

        Raises:
            Internal: the place is outside its arena.
        """
        return self._source(place).arena.slice(place.offset, place.byte_size)

    def _source(self, place: TensorPlace) -> Producer:
        return self._runner.producers.get(place.arena) if place.arena else self._producer

    def input_shape(self, place: TensorPlace) -> tuple[int, ...]:
        """Return an input's full shape as the model sees it (``reshape``)."""
        spec = self._runner.inputs.get(place.name)
        return place.shape if spec is None else backend_shape(spec, place.shape, self._runner.max_batch_size)

    def input_array(self, place: TensorPlace) -> Array:
        """Return one input: fixed-size elements as a view of the arena, BYTES as an object array of ``bytes``.

        Raises:
            Internal, InvalidArgument: the head does not describe a tensor inside the arena.
        """
        shape = self.input_shape(place)
        if place.datatype not in DATATYPES:
            raise Internal(f"input '{place.name}' has the unknown datatype '{place.datatype}'")
        if place.datatype == "BYTES":
            return decode_bytes(self.input_buffer(place), shape)
        if byte_size(place.datatype, shape) != place.byte_size:
            raise Internal(f"input '{place.name}' does not have the bytes of its shape")
        return self._source(place).array(place.datatype, shape, place.offset)

    def input_arrays(self) -> Arrays:
        """Return every input by name; see :meth:`input_array`."""
        return {place.name: self.input_array(place) for place in self.head.inputs}

    def lend_array(self, datatype: str, shape: tuple[int, ...]) -> Array:
        """Return an uninitialised array for an output, in the reply block if it has room.

        An answer made of such arrays is not copied. The block serves the first response only.

        Args:
            datatype: protocol name, not BYTES.
        """
        size = byte_size(datatype, shape)
        with self._runner.producers.lock:
            offset = self._block_used_bytes
            has_room = self._block_free and offset + size <= self.head.reply_bytes and not self._producer.is_gone
            if has_room:
                self._block_used_bytes += align(size)
                return self._producer.array(datatype, shape, self.head.reply_offset + offset)
        return np.empty(shape, DATATYPES[datatype].numpy_dtype)

    # --- how the model answers ---

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

        Raises:
            BackendFailed: the final response was sent before.
        """
        tensors: list[RawTensor] = []
        for name, (datatype, array) in outputs.items():
            if datatype == "BYTES":
                data = memoryview(encode_bytes(array))
            else:
                data = byte_view(array)
            tensors.append(RawTensor(name, datatype, tuple(array.shape), data))
        self.reply_raw(tensors, parameters, final=final)

    def reply_raw(
        self,
        tensors: Sequence[RawTensor],
        parameters: Mapping[str, ParameterValue] | None = None,
        *,
        final: bool = True,
    ) -> None:
        """Send one response whose outputs are bytes already; otherwise as :meth:`reply`."""
        with self._runner.producers.lock:
            if self.is_final:
                raise BackendFailed("a response was sent after the final one")
            self.is_final = final
            if final:
                self._runner.count_answer(self)
            response = PendingResponse(tensors, dict(parameters or {}), self._responses, final)
            self._responses += 1
            self._enqueue(response)
        if final:
            self._runner.answered(self)
        self._wait_for_reader()

    def reply_in_place(self, places: tuple[TensorPlace, ...]) -> None:
        """Send the one response whose outputs already lie in the lent block."""
        with self._runner.producers.lock:
            self.is_final = True
            self._runner.count_answer(self)
            self._send(ReplyHead(outputs=places), final=True)
        self._runner.answered(self)

    def finish(self) -> None:
        """Say that no (further) response follows, without one (decoupled models)."""
        with self._runner.producers.lock:
            if self.is_final:
                return
            self.is_final = True
            self._runner.count_answer(self)
            self._enqueue(PendingResponse((), {}, NO_RESPONSE_INDEX, final=True))
        self._runner.answered(self)

    def fail(self, error: ServingError, *, final: bool = True, by_model: bool = False) -> None:
        """Answer with an error.

        Args:
            final: no further response follows.
            by_model: the model's code made the error, whatever its code says; decides how it is counted.
        """
        with self._runner.producers.lock:
            if self.is_final:
                return
            self.is_final = final
            if final:
                self._runner.count_answer(self, error, by_model=by_model)
            # Behind responses that wait for room, an error would overtake them: they are worth nothing any more.
            self._waiting.clear()
            # An empty text would read as success.
            text = error.text[:60_000] or "the model failed without saying why"
            self._send(ReplyHead(code=error.code, text=text, index=self._responses), final=final)
            self._responses += 1
        if final:
            self._runner.answered(self)

    # --- what the producer says ---

    def collect(self, offset: int, size: int) -> None:
        """The producer has lent ``size`` bytes at ``offset`` for the response that waits first; 0 bytes: it cannot."""
        with self._runner.producers.lock:
            if not self._waiting:
                return
            response = self._waiting[0]
            if size == 0:
                self._abandon(
                    ArenaFull(
                        f"no room for {response.total_bytes} bytes of outputs in shared memory; send fewer requests"
                    )
                )
            elif size < response.total_bytes:
                self._send(ReplyHead(needs_bytes=response.total_bytes, index=response.index), final=False)
                return
            else:
                self._waiting.popleft()
                self._write(response, offset)
                self._pump()
            is_done = self.is_final and not self._waiting
        if is_done:
            self._runner.forget(self)

    def cancel(self) -> None:
        """The client has left. The final word is still said, so that the producer knows when its blocks are free."""
        with self._runner.producers.lock:
            self._is_cancelled = True
            if not self._waiting:
                return
            if self.is_final:
                self._abandon(Cancelled("request was cancelled"))
            else:
                self._waiting.clear()
            is_done = self.is_final
        if is_done:
            self._runner.forget(self)

    def orphan(self) -> None:
        """The producer is gone: nobody reads answers any more."""
        self._is_cancelled = True
        self._waiting.clear()

    def _abandon(self, error: ServingError) -> None:
        self._waiting.clear()
        self.is_final = True
        self._send(ReplyHead(code=error.code, text=error.text, index=self._responses), final=True)

    @property
    def is_waiting(self) -> bool:
        """True while responses wait for room."""
        return bool(self._waiting)

    # --- sending; the doorbells' lock is held ---

    def _enqueue(self, response: PendingResponse) -> None:
        if self._producer.is_gone:
            return
        self._waiting.append(response)
        if len(self._waiting) == 1:
            self._pump()
        if self._waiting and self._waiting[-1] is response:
            response.keep()

    def _pump(self) -> None:
        # Send what can go without new room; stops at the first response that needs a block.
        while self._waiting:
            response = self._waiting[0]
            if self._block_free and response.tensors and self._write_into_block(response):
                self._waiting.popleft()
            elif response.total_bytes <= INLINE_BYTES_MAX:
                self._waiting.popleft()
                inline = tuple(InlineTensor(n, d, s, bytes(data)) for n, d, s, data in response.tensors)
                self._send(
                    ReplyHead(inline=inline, parameters=response.parameters, index=response.index), final=response.final
                )
            else:
                self._send(ReplyHead(needs_bytes=response.total_bytes, index=response.index), final=False)
                return

    def _write_into_block(self, response: PendingResponse) -> bool:
        """Place a response in the block that came with the request; False if it does not fit."""
        first, end = self.head.reply_offset, self.head.reply_offset + self.head.reply_bytes
        base = self._producer.arena.address
        offset = first + self._block_used_bytes
        places: list[TensorPlace] = []
        copies: list[tuple[int, memoryview]] = []
        for name, datatype, shape, data in response.tensors:
            size = len(data)
            if self._block_used_bytes and size:
                # An array of lend_array: its bytes are where the client will read them.
                own = address_of(data) - base
                if first <= own and own + size <= first + self._block_used_bytes:
                    places.append(TensorPlace(name, datatype, shape, own, size))
                    continue
            if offset + size > end:
                return False
            copies.append((offset, data))
            places.append(TensorPlace(name, datatype, shape, offset, size))
            offset += align(size)
        for target, data in copies:
            self._producer.arena.slice(target, len(data))[:] = data
            self._runner.counters[Count.SCATTERED_BYTES] += len(data)
        self._block_free = False
        self._send(
            ReplyHead(outputs=tuple(places), parameters=response.parameters, index=response.index), final=response.final
        )
        return True

    def _write(self, response: PendingResponse, offset: int) -> None:
        places: list[TensorPlace] = []
        for name, datatype, shape, data in response.tensors:
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
        start_ns, input_end_ns, output_start_ns, end_ns = self.times
        if end_ns == 0:
            output_start_ns = end_ns = time.monotonic_ns()
        header = HEADER.pack(Kind.PARCEL_REPLY, FLAG_FINAL if final else 0, 1, self._runner.spec.instance, 0)
        times = TIMES.pack(start_ns, input_end_ns, output_start_ns, end_ns)
        self._producer.bell.ring(header + times + TOKEN.pack(self.token) + payload)

    def _wait_for_reader(self) -> None:
        """Hold up a model that sends responses faster than its producer reads them.

        The worker's own thread tries again between batches; a model's thread has nobody else to do it.
        """
        producer, runner = self._producer, self._runner
        is_own_thread = threading.current_thread() is threading.main_thread()
        allowed = BACKLOG_MAX if is_own_thread else 0
        # Who waits in the worker's own thread must be able to hear of a lent block.
        waiting_allowed = WAITING_MAX if not is_own_thread or runner.take_signals is not _nothing else sys.maxsize
        if self._waiting:
            runner.take_signals()
        if producer.bell.backlog_count <= allowed and len(self._waiting) <= waiting_allowed:
            return
        give_up = time.monotonic() + BACKLOG_WAIT_S
        while not producer.is_gone and not self._is_cancelled:
            backlog_count = producer.bell.backlog_count
            if backlog_count <= allowed and len(self._waiting) <= waiting_allowed:
                return
            if time.monotonic() > give_up:
                self._is_cancelled = True
                return
            if backlog_count:
                poll = select.poll()
                poll.register(producer.bell.fileno(), select.POLLOUT)
                poll.poll(20)
                with runner.producers.lock:
                    if not producer.is_gone:
                        producer.bell.flush()
            else:
                time.sleep(0.001)
            runner.take_signals()


def byte_view(array: Array) -> memoryview:
    """Return an array's bytes in C order; copies only if the array is not contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]  # numpy's stubs claim the buffer protocol from Python 3.12 on


def address_of(data: memoryview) -> int:
    """Return where a non-empty buffer lies in this process."""
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])


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
        self._ragged = RaggedPolicy(spec)
        #: Requests without a final response, or with responses that wait for room.
        self._open: dict[tuple[int, int], ParcelRequest] = {}
        self._bound: dict[tuple[object, ...], Callable[[], None]] = {}
        #: Handles COLLECT and CANCEL messages that have arrived, without waiting; set by the loop. Called whenever a
        #: running model asks whether its request is cancelled, by the thread that asks.
        self.take_signals: Callable[[], None] = _nothing
        #: Sends a packed OPEN to the scheduler; set by the loop.
        self.tell_closed: Callable[[bytes], None] = _ignore
        #: Keys of the last batch, and of requests that the scheduler was told are still open.
        self._batch_keys: list[tuple[int, int]] = []
        self._reported: set[tuple[int, int]] = set()
        #: Requests that the model wants again (iterative sequences); with the scheduler until then.
        self._again: dict[tuple[int, int], ParcelRequest] = {}

    @property
    def open_count(self) -> int:
        return len(self._open)

    def forget_producer(self, producer: int) -> None:
        """Its requests have no reader any more."""
        self._bound.clear()
        for key in [key for key in self._again if key[0] == producer]:
            del self._again[key]
        for key in [key for key in self._open if key[0] == producer]:
            self._open.pop(key).orphan()
            with self.producers.lock:
                self._close(key)

    def cancel(self, producer: int, message: memoryview, count: int) -> None:
        """Mark requests whose clients left."""
        available = (len(message) - HEADER.size) // TOKEN.size
        for index in range(min(count, available)):
            (token,) = TOKEN.unpack_from(message, HEADER.size + index * TOKEN.size)
            # The scheduler has taken it back from its queue, and has answered.
            self._again.pop((producer, token), None)
            request = self._open.get((producer, token))
            if request is not None:
                request.cancel()

    def collect(self, producer: int, message: memoryview) -> None:
        """A larger reply block has been lent."""
        if len(message) < HEADER.size + GROW.size:
            return
        token, offset, size = GROW.unpack_from(message, HEADER.size)
        request = self._open.get((producer, token))
        if request is None:
            return
        try:
            request.collect(offset, size)
        except Internal:
            # The place is outside the producer's own arena: it will hear no more of this request.
            request.orphan()
            self.forget(request)

    def answered(self, request: ParcelRequest) -> None:
        """The final response of a request is known; it may still wait for room."""
        if not request.is_waiting:
            self.forget(request)

    def count_answer(
        self, request: ParcelRequest, failed: ServingError | None = None, *, by_model: bool = False
    ) -> None:
        """Count a request whose final response is about to be sent; the doorbells' lock is held.

        Before, not after: whoever has the answer finds it counted.
        """
        counters = self.counters
        if failed is None:
            counters[Count.SUCCESS] += 1
        elif failed.code == Cancelled.code:
            counters[Count.CANCELED] += 1
        elif by_model or isinstance(failed, BackendFailed):
            counters[Count.FAILED_BACKEND] += 1
        else:
            counters[Count.FAILED_OTHER] += 1
        if request.executed_ns:
            # Answered after its execution had returned: by a thread or a coroutine of the model.
            counters[Count.INFER_NS] += max(time.monotonic_ns() - request.executed_ns, 0)

    def forget(self, request: ParcelRequest) -> None:
        """The last waiting response has been sent."""
        self._open.pop(request.key, None)
        with self.producers.lock:
            self._close(request.key)

    def report_all_open(self) -> list[bytes]:
        """As :meth:`report_open`, of all requests: for a scheduler that knows of none."""
        self._reported.update(self._open)
        return [OPEN.pack(producer, 0, token) for producer, token in self._open]

    def reschedule(self, request: ParcelRequest) -> None:
        """The model wants the request again in a later batch (spec S-060); what was answered stays answered."""
        key = request.key
        self._open.pop(key, None)
        with self.producers.lock:
            self._again[key] = request
            self._close(key, FLAG_RESCHEDULE)

    def _close(self, key: tuple[int, int], flags: int = 0) -> None:
        if key in self._reported:
            self._reported.discard(key)
            self.tell_closed(OPEN.pack(key[0], flags, key[1]))

    def report_open(self) -> list[bytes]:
        """Return the requests of the last batch that are not answered for good, packed; the doorbells' lock is held.

        Each is reported with ``tell_closed`` when it is.
        """
        still_open = [key for key in self._batch_keys if key in self._open]
        again = [key for key in self._batch_keys if key in self._again]
        self._reported.update(still_open)
        return [
            *(OPEN.pack(producer, 0, token) for producer, token in still_open),
            *(OPEN.pack(producer, FLAG_RESCHEDULE, token) for producer, token in again),
        ]

    def execute(self, message: memoryview, start_ns: int) -> bytes:
        """Run one PARCELS message.

        Returns:
            The TIMES of the batch, packed, for the scheduler.
        """
        requests, _places = self.unpack(message, start_ns, HEADER.size)
        return self.run_batch(requests, start_ns, lambda stamps: self.run(requests, stamps))

    def run(self, requests: Sequence[ParcelRequest], stamps: list[int]) -> None:
        """Run unpacked requests as one batch; to be called by :meth:`run_batch`."""
        if isinstance(self._instance, RequestInstance):
            self.run_requests(self._instance, requests, stamps)
        else:
            self._run_tensors(self._instance, requests, stamps)

    def run_batch(self, requests: Sequence[ParcelRequest], start_ns: int, run: Callable[[list[int]], None]) -> bytes:
        """Run unpacked requests, answer what fails, and count.

        Args:
            run: runs them; sets the second and third of (start, input end, output start, end).

        Returns:
            The TIMES of the batch, packed, for the scheduler.
        """
        self._batch_keys = [request.key for request in requests]
        if not requests:
            return TIMES.pack(start_ns, start_ns, start_ns, start_ns)
        rows = sum(max(request.rows, 1) for request in requests)
        stamps = [start_ns, start_ns, start_ns, start_ns]
        try:
            run(stamps)
        except ServingError as error:
            self._fail_all(requests, error)
        except Exception as error:  # a model's own code may raise anything
            self._fail_all(requests, BackendFailed(f"{type(error).__name__}: {error}"))
        stamps[3] = time.monotonic_ns()
        stamps[2] = max(stamps[2], stamps[1])
        self._count(requests, rows, stamps)
        return TIMES.pack(*stamps)

    def unpack(self, message: memoryview, start_ns: int, offset: int) -> tuple[list[ParcelRequest], list[int]]:
        """Return the message's requests from ``offset`` on, and the place of each in the message.

        One whose head cannot be used is answered here.
        """
        _kind, _flags, count, _sender, _batch = HEADER.unpack_from(message)
        requests: list[ParcelRequest] = []
        places: list[int] = []
        for place in range(count):
            if len(message) < offset + PARCEL.size:
                break  # Shorter than its header says.
            producer_id, rows, token, enqueue_ns, head_bytes = PARCEL.unpack_from(message, offset)
            offset += PARCEL.size
            raw = message[offset : offset + head_bytes]
            offset += head_bytes
            try:
                producer = self.producers.get(producer_id)
            except Internal:
                continue  # The producer died; nobody waits.
            try:
                head = _decode_head(raw)
                producer.arena.check(head.reply_offset, head.reply_bytes)
                if not producer.is_trusted:
                    check_head(
                        head,
                        rows,
                        self.inputs,
                        producer.arena,
                        model=self.spec.model,
                        max_batch_size=self.max_batch_size,
                    )
            except InvalidArgument as error:
                ParcelRequest(self, producer, token, rows, enqueue_ns, _EMPTY_HEAD).fail(error)
                continue
            except (Internal, msgspec.DecodeError, msgspec.ValidationError) as error:
                unusable = ParcelRequest(self, producer, token, rows, enqueue_ns, _EMPTY_HEAD)
                unusable.fail(Internal(f"the worker cannot read the request: {error}"))
                continue
            request = self._again.pop((producer_id, token), None) or ParcelRequest(
                self, producer, token, rows, enqueue_ns, head
            )
            request.times = (start_ns, start_ns, 0, 0)
            self._open[request.key] = request
            requests.append(request)
            places.append(place)
        return requests, places

    def run_requests(self, instance: RequestInstance, requests: Sequence[ParcelRequest], stamps: list[int]) -> None:
        stamps[1] = time.monotonic_ns()
        for request in requests:
            request.times = (stamps[0], stamps[1], 0, 0)
        try:
            instance.execute(requests)
        finally:
            stamps[2] = time.monotonic_ns()
            for request in requests:
                request.executed_ns = stamps[2]

    def _fail_all(self, requests: Sequence[ParcelRequest], error: ServingError) -> None:
        for request in requests:
            request.fail(error)

    def _count(self, requests: Sequence[ParcelRequest], rows: int, stamps: list[int]) -> None:
        # A model's own threads count too.
        with self.producers.lock:
            self._add(requests, rows, stamps)

    def _add(self, requests: Sequence[ParcelRequest], rows: int, stamps: list[int]) -> None:
        counters = self.counters
        start_ns, input_end_ns, output_start_ns, end_ns = stamps
        count = len(requests)
        counters[Count.EXECUTIONS] += 1
        counters[Count.INFERENCES] += rows
        queue_ns = max(sum(start_ns - request.enqueue_ns for request in requests), 0)
        counters[Count.QUEUE_NS] += queue_ns
        if count:
            # By the mean of the batch's requests.
            counters[Count.QUEUE_BUCKETS + min((queue_ns // count >> 10).bit_length(), LAST_BUCKET)] += count
            counters[Count.COMPUTE_BUCKETS + min((end_ns - start_ns >> 10).bit_length(), LAST_BUCKET)] += count
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

    def _run_tensors(self, instance: TensorInstance, requests: Sequence[ParcelRequest], stamps: list[int]) -> None:
        if len(requests) == 1 and not self._ragged.is_needed:
            self._run_single(instance, requests[0], stamps)
            return
        # One client's broken tensor is its own error, not its neighbours'.
        separate: list[tuple[ParcelRequest, Arrays]] = []
        for request in requests:
            try:
                separate.append((request, request.input_arrays()))
            except ServingError as error:
                request.fail(error)
        if self._ragged.is_needed:
            self._run_ragged(instance, separate, stamps)
            return
        arrays_of_all = [arrays for _request, arrays in separate]
        if self.max_batch_size > 0 and self._is_worth_joining(arrays_of_all) and _can_be_joined(arrays_of_all):
            self._run_joined(instance, separate, stamps)
            return
        for request, _arrays in separate:
            try:
                self._run_single(instance, request, stamps)
            except ServingError as error:
                request.fail(error)

    def _is_worth_joining(self, separate: Sequence[Arrays]) -> bool:
        """Tell whether requests should be copied together rather than run where they lie, one after the other.

        On a CPU, joining large tensors costs more than a call of the framework (`bench/large_body.py`).
        """
        if self.spec.kind == "GPU":
            return True
        total = sum(array.nbytes for arrays in separate for array in arrays.values())
        return total < JOINED_BYTES_MAX * len(separate)

    def wanted(self, requests: Sequence[ParcelRequest]) -> tuple[str, ...]:
        """Return the outputs that any of the requests wants."""
        wanted = {name for request in requests for name in request.requested_outputs}
        return tuple(name for name in self.outputs if name in wanted)

    def _run_single(self, instance: TensorInstance, request: ParcelRequest, stamps: list[int]) -> None:
        head = request.head
        wanted = self.wanted([request])
        places = self._fixed_places(head, wanted, request.rows)
        if places is not None:
            key = (request.key[0], head.inputs, places)
            bound = self._bound.get(key)
            if bound is None:
                bound = instance.bind(request.input_arrays(), self._output_arrays(request, places))
                if len(self._bound) >= BINDINGS_MAX:
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
        request.reply({name: self.checked(name, results, request.rows) for name in wanted})

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

    def _run_joined(
        self, instance: TensorInstance, separate: list[tuple[ParcelRequest, Arrays]], stamps: list[int]
    ) -> None:
        requests = [request for request, _arrays in separate]
        joined: Arrays = {
            name: np.concatenate([arrays[name] for _request, arrays in separate]) for name in separate[0][1]
        }
        self._count_gathered(requests)
        wanted = self.wanted(requests)
        stamps[1] = time.monotonic_ns()
        results = instance.run(joined, wanted)
        stamps[2] = time.monotonic_ns()
        total = sum(request.rows for request in requests)
        checked = {name: self.checked(name, results, total) for name in wanted}
        first = 0
        for request in requests:
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            own = slice(first, first + request.rows)
            request.reply({name: (checked[name][0], checked[name][1][own]) for name in request.requested_outputs})
            first += request.rows

    def _count_gathered(self, requests: Sequence[ParcelRequest]) -> None:
        self.counters[Count.GATHERED_BYTES] += sum(
            place.byte_size for request in requests for place in request.head.inputs
        )
        self.counters[Count.BATCHES_GATHERED] += 1

    def _run_ragged(
        self, instance: TensorInstance, separate: list[tuple[ParcelRequest, Arrays]], stamps: list[int]
    ) -> None:
        """Run requests whose shapes may differ, all at once if they fit together."""
        batch = [
            (request, RaggedRequest(request.rows, arrays, {place.name: place.shape for place in request.head.inputs}))
            for request, arrays in separate
        ]
        fit = self._ragged.can_join([entry for _request, entry in batch])
        for group in [batch] if fit else [[single] for single in batch]:
            try:
                self._run_ragged_group(instance, group, stamps)
            except ServingError as error:
                for request, _entry in group:
                    request.fail(error)

    def _run_ragged_group(
        self, instance: TensorInstance, group: Sequence[tuple[ParcelRequest, RaggedRequest]], stamps: list[int]
    ) -> None:
        requests, entries = [request for request, _entry in group], [entry for _request, entry in group]
        joined = self._ragged.join(entries)
        if len(group) > 1:
            self._count_gathered(requests)
        wanted = self.wanted(requests)
        stamps[1] = time.monotonic_ns()
        results = instance.run(joined, wanted)
        stamps[2] = time.monotonic_ns()
        total = sum(request.rows for request in requests)
        pieces = {name: self._divided(name, results, entries, total) for name in wanted}
        for index, request in enumerate(requests):
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            request.reply({name: pieces[name][index] for name in request.requested_outputs})

    def _divided(
        self, name: str, results: Mapping[str, Array], entries: Sequence[RaggedRequest], total: int
    ) -> list[tuple[str, Array]]:
        """Return each request's part of an output, as :meth:`checked` does the whole."""
        if self._ragged.is_scattered(name):
            datatype = self.outputs[name].datatype
            return [(datatype, part) for part in self._ragged.scatter(name, results.get(name), entries)]
        datatype, array = self.checked(name, results, total)
        if self.max_batch_size == 0:
            return [(datatype, array)]
        ends = itertools.accumulate(entry.rows for entry in entries)
        return [(datatype, array[end - entry.rows : end]) for end, entry in zip(ends, entries, strict=True)]

    def checked(self, name: str, results: Mapping[str, Array], rows: int) -> tuple[str, Array]:
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


#: Stands for a head that could not be decoded.
_EMPTY_HEAD = ParcelHead(inputs=(), reply_offset=0, reply_bytes=0)


def _nothing() -> None:
    pass


def _ignore(_packed: bytes) -> None:
    pass


def _can_be_joined(separate: Sequence[Arrays]) -> bool:
    """Tell whether requests have the same inputs with the same shapes but for the batch dimension."""
    if not separate:
        return False
    shapes = {name: array.shape[1:] for name, array in separate[0].items()}
    return all(
        len(arrays) == len(shapes)
        and all(name in shapes and array.ndim > 0 and array.shape[1:] == shapes[name] for name, array in arrays.items())
        for arrays in separate
    )
