"""Requests outside slabs: their tensors in blocks of an arena, their answers in a block that the producer lends.

This is the books of a worker: which requests are open, and what is said about them. Running them on arrays is
``tensor_parcels.py``; what one request can be asked and answered is ``parcel_request.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from forebay.engine.backends.base import RequestInstance, TensorInstance
from forebay.engine.worker.device_memories import DeviceMemories
from forebay.engine.worker.head_check import check_head
from forebay.engine.worker.parcel_counting import count_batch
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.places import Producers
from forebay.engine.worker.promised_outputs import PromisedOutputs
from forebay.engine.worker.tensor_parcels import TensorParcels
from forebay.ipc.errors import BackendFailed, Internal, InvalidArgument, ServingError
from forebay.ipc.messages import NO_ROOMS, ParcelHead, Rooms
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import FLAG_RESCHEDULE, GROW, HEADER, OPEN, PARCEL, TIMES, TOKEN
from forebay.ipc.worker_messages import InstanceSpec

_decode_head = msgspec.msgpack.Decoder(ParcelHead).decode
_decode_rooms = msgspec.msgpack.Decoder(Rooms).decode


class ParcelsRunner:
    """Runs PARCELS messages on either kind of instance."""

    def __init__(
        self, spec: InstanceSpec, instance: TensorInstance | RequestInstance, producers: Producers, counters: memoryview
    ) -> None:
        self.spec = spec
        self.producers = producers
        #: Runs the batches; every other thread is a model's.
        self.loop_thread = threading.current_thread()
        #: uint64, this instance's block
        self.counters = counters
        #: The same for requests that statistics are not to know of.
        self.uncounted = memoryview(bytearray(counters.nbytes)).cast("Q")
        self.max_batch_size = spec.max_batch_size
        self.inputs: dict[str, TensorSpec] = {tensor.name: tensor for tensor in spec.inputs}
        self.promised = PromisedOutputs(spec)
        self.outputs = self.promised.specs
        self._instance = instance
        #: What it has open on its device; None: it has none.
        self.memories = None if instance.device is None else DeviceMemories(instance.device)
        self._tensors = (
            None
            if isinstance(instance, RequestInstance)
            else TensorParcels(spec, instance, producers, self.promised, counters)
        )
        #: Requests without a final response, or with responses that wait for room.
        self._open: dict[tuple[int, int], ParcelRequest] = {}
        #: Handles COLLECT and CANCEL messages that have arrived, without waiting; set by the loop. Called whenever a
        #: running model asks whether its request is cancelled, by the thread that asks.
        self.take_signals: Callable[[], None] = _nothing
        #: Sends a packed OPEN to the scheduler; set by the loop.
        self.tell_closed: Callable[[bytes], None] = _ignore
        #: Called, with the doorbells' lock held, when a request has ended; set by the loop.
        self.note_end: Callable[[], None] = _nothing
        #: Keys of the last batch, and of requests that the scheduler was told are still open.
        self._batch_keys: list[tuple[int, int]] = []
        self._reported: set[tuple[int, int]] = set()
        #: Requests that the model wants again (iterative sequences); with the scheduler until then.
        self._again: dict[tuple[int, int], ParcelRequest] = {}

    @property
    def has_signals(self) -> bool:
        """True if somebody who waits here can hear of lent blocks."""
        return self.take_signals is not _nothing

    def forget_producer(self, producer: int) -> None:
        """Its requests have no reader any more."""
        if self._tensors is not None:
            self._tensors.forget_bindings()
        if self.memories is not None:
            self.memories.forget_owner(producer)
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
        """A larger reply block has been lent, and maybe room on the device."""
        if len(message) < HEADER.size + GROW.size:
            return
        token, offset, size = GROW.unpack_from(message, HEADER.size)
        request = self._open.get((producer, token))
        if request is None:
            return
        lent = message[HEADER.size + GROW.size :]
        try:
            request.collect(offset, size, _decode_rooms(lent) if lent else NO_ROOMS)
        except (Internal, msgspec.DecodeError):
            # Unreadable, or the place is outside the producer's own arena: it will hear no more of this request.
            request.orphan()
            self.forget(request)

    def answered(self, request: ParcelRequest) -> None:
        """The final response of a request is known; it may still wait for room."""
        if not request.is_waiting:
            self.forget(request)
        else:
            with self.producers.lock:
                self.note_end()

    def oldest_open_ns(self) -> int:
        """Return when the execution began that has gone on longest without a final answer, monotonic ns; 0: none has.

        Decoupled models have no limit: their requests may be open for ever.
        """
        if self.spec.decoupled:
            return 0
        # Copied in one step: a model's own threads end requests too.
        open_ns = (request.times[0] for request in list(self._open.values()) if not request.is_final)
        return next(open_ns, 0)

    def open_tokens(self, producer: int) -> list[int]:
        """Return the requests of a producer that are not answered for good; the doorbells' lock is held."""
        return [token for owner, token in list(self._open) if owner == producer]

    def forget(self, request: ParcelRequest) -> None:
        """The last waiting response has been sent."""
        self._open.pop(request.key, None)
        with self.producers.lock:
            self._close(request.key)

    def report_all_open(self) -> list[bytes]:
        """As :meth:`report_open`, of all requests: for a scheduler that knows of none."""
        # Copied in one step: a model's own threads end requests too.
        keys = list(self._open)
        self._reported.update(keys)
        return [OPEN.pack(producer, 0, token) for producer, token in keys]

    @property
    def open_count(self) -> int:
        """Requests that are not answered for good."""
        return len(self._open)

    def open_producers(self) -> set[int]:
        """Return whose requests are not answered for good."""
        return {producer for producer, _token in list(self._open)}

    def reschedule(self, request: ParcelRequest) -> None:
        """The model wants the request again in a later batch (spec S-060); what was answered stays answered."""
        key = request.key
        self._open.pop(key, None)
        with self.producers.lock:
            self._again[key] = request
            self._close(key, FLAG_RESCHEDULE)

    def _close(self, key: tuple[int, int], flags: int = 0) -> None:
        self.note_end()
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
        if self._tensors is not None:
            self._tensors.run(requests, stamps)
        elif isinstance(self._instance, RequestInstance):
            self.run_requests(self._instance, requests, stamps)

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
        stamps = [start_ns, start_ns, start_ns, start_ns]
        try:
            run(stamps)
        except ServingError as error:
            self._fail_all(requests, error)
        except Exception as error:  # a model's own code may raise anything
            self._fail_all(requests, BackendFailed(f"{type(error).__name__}: {error}"))
        stamps[3] = time.monotonic_ns()
        stamps[2] = max(stamps[2], stamps[1])
        self._count(requests, stamps)
        return TIMES.pack(*stamps)

    def _count(self, requests: Sequence[ParcelRequest], stamps: Sequence[int]) -> None:
        if self.producers.has_uncounted:
            requests = [request for request in requests if request.is_counted]
        if requests:
            rows = sum(max(request.rows, 1) for request in requests)
            with self.producers.lock:  # A model's own threads count too.
                count_batch(self.counters, requests, rows, stamps, self.max_batch_size)

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
            if producer_id not in self.producers:
                continue  # It died; nobody waits.
            head = self._read_head(producer_id, rows, token, enqueue_ns, raw)
            if head is None:
                continue
            request = self._again.pop((producer_id, token), None) or ParcelRequest(
                self, self.producers.get(producer_id), token, rows, enqueue_ns, head
            )
            request.times = (start_ns, start_ns, 0, 0)
            self._open[request.key] = request
            requests.append(request)
            places.append(place)
        return requests, places

    def _read_head(
        self, producer_id: int, rows: int, token: int, enqueue_ns: int, raw: memoryview
    ) -> ParcelHead | None:
        """Return a request's head after checking it; None: it cannot be used, and the request is answered."""
        producer = self.producers.get(producer_id)
        try:
            head = _decode_head(raw)
            producer.arena.check(head.reply_offset, head.reply_bytes)
            if head.memories and self.memories is None:
                raise InvalidArgument(
                    f"model '{self.spec.model}' does not live on a GPU: its tensors cannot lie in device memory"
                )
            if not producer.is_trusted:
                check_head(
                    head, rows, self.inputs, producer.arena, model=self.spec.model, max_batch_size=self.max_batch_size
                )
        except InvalidArgument as error:
            refusal: ServingError = error
        except (Internal, msgspec.DecodeError, msgspec.ValidationError) as error:
            refusal = Internal(f"the worker cannot read the request: {error}")
        else:
            return head
        ParcelRequest(self, producer, token, rows, enqueue_ns, _EMPTY_HEAD).fail(refusal)
        return None

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


#: Stands for a head that could not be decoded.
_EMPTY_HEAD = ParcelHead(inputs=(), reply_offset=0, reply_bytes=0)


def _nothing() -> None:
    pass


def _ignore(_packed: bytes) -> None:
    pass
