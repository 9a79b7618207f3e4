"""One request outside slabs, as a model that handles requests sees it, and how it is answered.

A request lives as: received -> (answered | failed)* -> final. A response whose outputs do not fit the lent block
waits here, in this process, until the producer has lent a larger one (COLLECT), so nobody has to know sizes beforehand.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, Arrays
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.worker.kept_outputs import KeptOutput
from forebay.engine.worker.parcel_counting import count_answer
from forebay.engine.worker.pending_response import PendingResponse, RawTensor, address_of, byte_view
from forebay.engine.worker.places import Producer, backend_shape
from forebay.engine.worker.reply_batch import ReplyBatch
from forebay.ipc.arena import align
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.errors import ArenaFull, BackendFailed, Cancelled, Internal, ServingError
from forebay.ipc.messages import (
    NO_ROOMS,
    DeviceMemory,
    InlineTensor,
    ParameterValue,
    ParcelHead,
    ReplyHead,
    Rooms,
    TensorPlace,
)
from forebay.ipc.spans import Trace
from forebay.ipc.tensor import DATATYPES, byte_size, decode_bytes, encode_bytes
from forebay.ipc.wire import FLAG_FINAL, HEADER, MESSAGE_BYTES_MAX, TIMES, TOKEN, Kind

if TYPE_CHECKING:
    from forebay.engine.worker.parcels import ParcelsRunner

#: Bytes of outputs that travel in the message itself when no reply block is at hand (responses of decoupled models).
INLINE_BYTES_MAX = 16 * 1024

#: ``ReplyHead.index`` of the message that ends a request without being a response itself (decoupled models).
NO_RESPONSE_INDEX = -1

#: Messages that may wait for a producer that does not read, before the model that sends them has to wait too.
BACKLOG_MAX = 64

#: Responses of one request that may wait for reply blocks, before the model that sends them has to wait too.
WAITING_MAX = 8

#: How long a model's thread waits for such a producer before the request counts as abandoned.
BACKLOG_WAIT_S = 10.0

#: Bytes of a ``ReplyHead`` at most.
_REPLY_BYTES_MAX = MESSAGE_BYTES_MAX - 256

_encode_reply = msgspec.msgpack.Encoder().encode


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
        #: Takes answers that go out with others of the same execution; None: they go out one by one.
        self.together: ReplyBatch | None = None
        #: When the execution that it was part of had returned; 0: not yet.
        self.executed_ns = 0
        self._runner = runner
        self._producer = producer
        self._counters = runner.counters if producer.is_counted else runner.uncounted
        self._responses = 0
        self._waiting: deque[PendingResponse] = deque()
        self._is_cancelled = False
        # The lent block serves one response: the producer frees it when it has been read.
        self._block_free = head.reply_bytes > 0
        self._block_used_bytes = 0
        #: Outputs that are where their client wants them in device memory, besides those of the (only) reply.
        self.placed: tuple[TensorPlace, ...] = ()
        #: Outputs of the (only) reply that wait on the device until its client has lent room for them there.
        self.kept: tuple[KeptOutput, ...] = ()
        #: What is noted of requests that the model makes for this one; None: it is not traced.
        self.trace: Trace | None = None
        if head.trace_levels:
            self.trace = Trace.of_request(head.trace_levels, head.trace_context, runner.spec.model, runner.spec.version)
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
    def is_counted(self) -> bool:
        """Whether statistics are to know of it."""
        return self._producer.is_counted

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

    def device_address(self, place: TensorPlace, size: int) -> int:
        """Return where ``size`` bytes of a place on the instance's device are, after checking that it has them.

        Raises:
            Internal: the head names no such memory.
            InvalidArgument, DeviceError: see :meth:`DeviceMemories.address`.
        """
        return self._address_in(self.head.memories, place, size)

    def _address_in(self, named: Sequence[DeviceMemory], place: TensorPlace, size: int) -> int:
        memories = self._runner.memories
        if memories is None or not 1 <= place.memory <= len(named):
            raise Internal(f"tensor '{place.name}' lies in a device memory that the request does not name")
        memory = named[place.memory - 1]
        # Whose it is, only those are believed who speak for others.
        owner = memory.owner if self._producer.is_trusted else self._producer.id
        return memories.address((owner, memory.number), memory, place.offset, size)

    def input_on_device(self, place: TensorPlace) -> DeviceArray:
        """Return one input that lies on the instance's device, valid until the request's final response.

        Raises:
            Internal, InvalidArgument, DeviceError: see :meth:`device_address`.
        """
        shape = self.input_shape(place)
        if place.datatype not in DATATYPES or byte_size(place.datatype, shape) != place.byte_size:
            raise Internal(f"input '{place.name}' does not have the bytes of its shape")
        address = self.device_address(place, place.byte_size)
        return DeviceArray(address, shape, DATATYPES[place.datatype].numpy_dtype)

    def target(self, name: str, size: int) -> TensorPlace | None:
        """Return where an output of ``size`` bytes goes on the instance's device; None: it goes to the host."""
        head = self.head
        found = next((target for target in head.targets if target.name == name), None)
        if found is None or (head.may_wait and not found.memory):
            return None
        return None if (head.may_spill or head.may_wait) and size > found.byte_size else found

    def awaits_room(self, name: str, size: int) -> bool:
        """Whether an output of ``size`` bytes that has no target should wait on the device until it has one."""
        return self.head.may_wait and size > 0 and any(target.name == name for target in self.head.targets)

    def target_address(self, target: TensorPlace, size: int) -> int:
        """Return where ``size`` bytes of an output go on the instance's device.

        Raises:
            Internal: there is less room (spec H-198), or see :meth:`device_address`.
        """
        if size > target.byte_size:
            raise Internal(
                f"shared memory size specified with the request for output '{target.name}' ({target.byte_size} bytes) "
                f"should be at least {size} bytes to hold the results"
            )
        return self.device_address(target, size)

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
                count_answer(self._counters, self.executed_ns)
            response = PendingResponse(tensors, dict(parameters or {}), self._responses, final, self.kept)
            self.kept = ()
            self._responses += 1
            self._enqueue(response)
        if final:
            self._runner.answered(self)
        self._wait_for_reader()

    def reply_in_place(self, places: tuple[TensorPlace, ...]) -> None:
        """Send the one response whose outputs already lie in the lent block."""
        with self._runner.producers.lock:
            self.is_final = True
            count_answer(self._counters, self.executed_ns)
            self._send(ReplyHead(outputs=places), final=True)
        self._runner.answered(self)

    def finish(self) -> None:
        """Say that no (further) response follows, without one (decoupled models)."""
        with self._runner.producers.lock:
            if self.is_final:
                return
            self.is_final = True
            count_answer(self._counters, self.executed_ns)
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
                count_answer(self._counters, self.executed_ns, error, by_model=by_model)
            # Behind responses that wait for room, an error would overtake them: they are worth nothing any more.
            self._waiting.clear()
            # An empty text would read as success.
            text = error.text[:60_000] or "the model failed without saying why"
            self._send(ReplyHead(code=error.code, text=text, index=self._responses), final=final)
            self._responses += 1
        if final:
            self._runner.answered(self)

    # --- what the producer says ---

    def collect(self, offset: int, size: int, rooms: Rooms = NO_ROOMS) -> None:
        """The producer has lent ``size`` bytes at ``offset`` for the response that waits first; 0 bytes: it cannot.

        Args:
            rooms: for outputs that wait on the device.
        """
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
            elif size < response.bytes_without(targets := _sufficient(rooms, response.kept)):
                self._send(response.question(), final=False)
                return
            else:
                self._take_room(response, offset, rooms.memories, targets)
            is_done = self.is_final and not self._waiting
        if is_done:
            self._runner.forget(self)

    def _take_room(
        self,
        response: PendingResponse,
        offset: int,
        memories: Sequence[DeviceMemory],
        targets: Mapping[str, TensorPlace],
    ) -> None:
        """Send a response that has room now: in a block, and in places on the device."""
        self._waiting.popleft()
        if response.kept:
            try:
                self._settle(response, memories, targets)
            except ServingError as error:
                self._abandon(error)
                return
        self._write(response, offset)
        self._pump()

    def _settle(
        self, response: PendingResponse, memories: Sequence[DeviceMemory], targets: Mapping[str, TensorPlace]
    ) -> None:
        """Copy what has waited on the device to its places there, and to the host what has none.

        Raises:
            ServingError: a place cannot be used, or the device refused.
        """
        copies: list[tuple[int, DeviceArray]] = []
        placed: list[TensorPlace] = []
        spilled: list[RawTensor] = []
        for name, datatype, shape, array, store in response.kept:
            target = targets.get(name)
            if target is None:
                spilled.append(RawTensor(name, datatype, shape, store.fetch(array)))
                continue
            copies.append((self._address_in(memories, target, array.nbytes), array))
            placed.append(TensorPlace(name, datatype, shape, target.offset, array.nbytes, memory=target.memory))
        if copies:
            response.kept[0].store.hand_over(copies)
        response.tensors = (*response.tensors, *spilled)
        response.kept = ()
        self.placed = (*self.placed, *placed)

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
            if response.kept:
                self._send(response.question(), final=False)
                return
            if self._block_free and response.tensors and self._write_into_block(response):
                self._waiting.popleft()
            elif response.total_bytes <= INLINE_BYTES_MAX:
                self._waiting.popleft()
                inline = tuple(InlineTensor(n, d, s, bytes(data)) for n, d, s, data in response.tensors)
                self._send(
                    ReplyHead(inline=inline, parameters=response.parameters, index=response.index), final=response.final
                )
            else:
                self._send(response.question(), final=False)
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
            self._counters[Count.SCATTERED_BYTES] += len(data)
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
            self._counters[Count.SCATTERED_BYTES] += len(data)
        self._send(
            ReplyHead(outputs=tuple(places), parameters=response.parameters, index=response.index), final=response.final
        )

    def _send(self, reply: ReplyHead, *, final: bool) -> None:
        if self.placed and not reply.text and not reply.needs_bytes:
            reply = msgspec.structs.replace(reply, outputs=(*reply.outputs, *self.placed))
        payload = _encode_reply(reply)
        if final and self.trace is not None:
            spans = self.trace.below(_REPLY_BYTES_MAX - len(payload))
            payload = _encode_reply(msgspec.structs.replace(reply, spans=spans))
        if len(payload) > _REPLY_BYTES_MAX:
            payload = _encode_reply(
                ReplyHead(code=int(Internal.code), text="the response's parameters are too large", index=reply.index)
            )
        flags = FLAG_FINAL if final else 0
        if self.together is not None and self._producer.is_trusted:
            self.together.add(self._producer, self.token, flags, payload)
            return
        start_ns, input_end_ns, output_start_ns, end_ns = self.times
        if end_ns == 0:
            output_start_ns = end_ns = time.monotonic_ns()
        header = HEADER.pack(Kind.PARCEL_REPLY, flags, 1, self._runner.spec.instance, 0)
        times = TIMES.pack(start_ns, input_end_ns, output_start_ns, end_ns)
        self._producer.bell.ring(header + times + TOKEN.pack(self.token) + payload)

    def _wait_for_reader(self) -> None:
        """Hold up a model that sends responses faster than its producer reads them.

        The worker's own thread tries again between batches; a model's thread has nobody else to do it.
        """
        producer, runner = self._producer, self._runner
        is_own_thread = threading.current_thread() is runner.loop_thread
        allowed = BACKLOG_MAX if is_own_thread else 0
        # Who waits in the worker's own thread must be able to hear of a lent block.
        waiting_allowed = WAITING_MAX if not is_own_thread or runner.has_signals else sys.maxsize
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


def _sufficient(rooms: Rooms, kept: Sequence[KeptOutput]) -> dict[str, TensorPlace]:
    """Return the places that are large enough for what waits, by name."""
    sizes = {output.name: output.array.nbytes for output in kept}
    return {target.name: target for target in rooms.targets if target.byte_size >= sizes.get(target.name, sys.maxsize)}
