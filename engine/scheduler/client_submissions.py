"""What shared-memory clients hand in: read from their sockets, checked number by number, then like any other request.

A client may send anything at any time. Whatever does not hold true of its arena, of the model and of the limits is
answered with an error, or ends the connection if it cannot even be read; nothing of it reaches a queue or a worker.
Each turn takes a bounded number of messages of a client, so that a flood of them keeps nobody else waiting.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Protocol

import msgspec

from forebay.engine.scheduler.instances import Instance
from forebay.engine.scheduler.route import Route
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.arena import align
from forebay.ipc.client_wire import (
    CANCEL_RUN,
    CANCEL_RUNG,
    FLAG_SEQUENCE_END,
    FLAG_SEQUENCE_START,
    NUMBER,
    OUTSTANDING_MAX,
    SLAB_CAPACITY_MAX,
    SUBMIT_BYTES_MAX,
    SUBMIT_PARCEL,
    SUBMIT_RUN,
    SubmitKind,
)
from forebay.ipc.errors import InvalidArgument, NotReady, ServingError, Unavailable
from forebay.ipc.messages import Cancel, FrontendToScheduler, ParcelSubmit, ReplyHead, RowsCancel, RunSubmit, Submit
from forebay.ipc.scheduler_messages import ProducerUp, RouteUp
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_MOVED,
    GRANTED_BATCH,
    GROW,
    HEAD_BYTES_MAX,
    HEADER,
    NO_TIMES,
    TOKEN,
    Kind,
    Run,
    pack_rows_cancel,
    pack_runs,
)

#: Messages of one client per turn of the scheduler's loop.
_MESSAGES_PER_TURN = 64

#: Requests of a client in the scheduler's hands at most; above what clients are told, for answers under way.
_OUTSTANDING_LIMIT = 2 * OUTSTANDING_MAX

#: How often the requests of a client at its limit are counted anew, ns.
_RECOUNT_NS = 1_000_000

#: Claims about when a request was made count if they are at most so old, ns.
_ENQUEUE_AGE_NS = 1_000_000_000

#: Times a request may have been handed in again.
_ATTEMPTS_MAX = 1_000

_MOVED_TEXT = "the model version was unloaded before the request could run"

_END = HEADER.size


class Engine(Protocol):
    """What the scheduler's loop does for clients' requests."""

    def accept(self, message: FrontendToScheduler) -> None: ...

    def ring_producer(self, producer_id: int, message: bytes) -> None: ...

    def route_of(self, number: int) -> Route | None: ...

    def instance_of(self, number: int) -> Instance | None: ...

    def count_waiting(self, producer_id: int) -> int: ...


class _Moved(NotReady):
    """The route is gone or going; the client opens the model again."""


class _Broken(Exception):
    """The client's message cannot be read."""


class _RouteShape:
    """What a route's slabs and batches look like."""

    __slots__ = ("row_bytes", "rows_max")

    def __init__(self, up: RouteUp) -> None:
        self.rows_max = max(up.batching.max_batch_size, 1)
        self.row_bytes = up.row_bytes

    def slab_bytes(self, capacity: int) -> int:
        return sum(align(size * capacity) for size in self.row_bytes)


class _Client:
    __slots__ = ("accepted", "arena_bytes", "counted_ns", "number", "rings", "sock")

    def __init__(self, up: ProducerUp, sock: socket.socket) -> None:
        self.number = up.producer
        self.arena_bytes = up.arena_bytes
        self.sock = sock
        #: Instances that it can ring itself.
        self.rings: set[int] = set()
        #: Requests accepted and, when last counted, not done.
        self.accepted = 0
        self.counted_ns = 0


class ClientSubmissions:
    """The submission sockets of all clients, in the scheduler's epoll."""

    def __init__(self, engine: Engine, epoll: select.epoll) -> None:
        self._engine = engine
        self._epoll = epoll
        self._epoch = 0
        self._clients: dict[int, _Client] = {}
        #: By descriptor of their sockets; the loop looks here for what it does not know.
        self._by_fd: dict[int, _Client] = {}
        self._shapes: dict[int, _RouteShape] = {}

    def start(self, epoch: int) -> None:
        """Accept what is meant for this scheduler only."""
        self._epoch = epoch

    # --- who is there ---

    def add_route(self, up: RouteUp) -> None:
        self._shapes[up.route] = _RouteShape(up)

    def remove_route(self, route: int) -> None:
        self._shapes.pop(route, None)

    def add(self, up: ProducerUp, fd: int) -> None:
        """Take ownership of the receiving end of a client's submission socket."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        client = self._clients[up.producer] = _Client(up, sock)
        self._by_fd[sock.fileno()] = client
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def remove(self, number: int) -> None:
        """The client is gone, or cannot be listened to any more; what it had handed in is not touched."""
        client = self._clients.pop(number, None)
        if client is not None:
            self._epoll.unregister(client.sock.fileno())
            del self._by_fd[client.sock.fileno()]
            with contextlib.suppress(OSError):
                # The supervisor holds a duplicate for the next scheduler; the client is to notice all the same.
                client.sock.shutdown(socket.SHUT_RDWR)
            client.sock.close()

    def close(self) -> None:
        """Close our ends; the clients stay connected to the next scheduler."""
        for client in self._clients.values():
            client.sock.close()

    def can_ring(self, number: int, instance: int) -> bool:
        """True if the client holds a ring to the instance, so that a grant would be of use to it."""
        client = self._clients.get(number)
        return client is not None and instance in client.rings

    def forget_instance(self, instance: int) -> None:
        for client in self._clients.values():
            client.rings.discard(instance)

    # --- what arrives ---

    def read(self, fd: int) -> None:
        """Take what is there on a descriptor that the loop does not know itself."""
        client = self._by_fd.get(fd)
        if client is None:
            return
        for _ in range(_MESSAGES_PER_TURN):
            try:
                message = client.sock.recv(SUBMIT_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                # Its end is closed; the supervisor notices the same at the door and tells everybody.
                self.remove(client.number)
                return
            try:
                self._take(client, message)
            except (_Broken, struct.error, UnicodeDecodeError) as error:
                print(
                    f"forebay scheduler: client {client.number} sent a message that cannot be read ({error}); "
                    "it is not listened to any more",
                    file=sys.stderr,
                )
                self.remove(client.number)
                return

    def _take(self, client: _Client, message: bytes) -> None:
        kind, _flags, count, sender, batch = HEADER.unpack_from(message)
        if batch != self._epoch:
            return  # Meant for an earlier scheduler: handed in again after RESYNC.
        match kind:
            case SubmitKind.RUNS:
                self._take_runs(client, message, count)
            case SubmitKind.PARCEL:
                self._take_parcel(client, message)
            case SubmitKind.CANCEL:
                tokens = tuple(token for (token,) in TOKEN.iter_unpack(self._exactly(message, count * TOKEN.size)))
                self._engine.accept(Cancel(producer=client.number, tokens=tokens))
            case SubmitKind.CANCEL_RUNS:
                fields = CANCEL_RUN.iter_unpack(self._exactly(message, count * CANCEL_RUN.size))
                rows = tuple(RowsCancel(route=route, base=base, firsts=(first,)) for route, first, base in fields)
                self._engine.accept(Cancel(producer=client.number, rows=rows))
            case SubmitKind.CANCEL_RUNG:
                self._cancel_rung(client, sender, self._exactly(message, CANCEL_RUNG.size))
            case SubmitKind.COLLECT:
                self._collect(client, sender, message[_END:])
            case SubmitKind.RINGS:
                numbers = NUMBER.iter_unpack(self._exactly(message, count * NUMBER.size))
                client.rings.update(n for (n,) in numbers if self._engine.instance_of(n) is not None)
            case _:
                raise _Broken(f"unknown kind {kind}")

    @staticmethod
    def _exactly(message: bytes, byte_size: int) -> bytes:
        if len(message) != _END + byte_size:
            raise _Broken(f"{len(message)} bytes where {_END + byte_size} belong")
        return message[_END:]

    # --- rows ---

    def _take_runs(self, client: _Client, message: bytes, count: int) -> None:
        now_ns = time.monotonic_ns()
        runs: list[RunSubmit] = []
        for fields in SUBMIT_RUN.iter_unpack(self._exactly(message, count * SUBMIT_RUN.size)):
            (
                route, requests, base, capacity, first, rows_each, attempt, priority, patience_us, timeout_us, made_ns,
            ) = fields  # fmt: skip
            enqueue_ns = believable_ns(made_ns, now_ns)
            run = RunSubmit(
                route=route, base=base, capacity=capacity, first=first, requests=requests, rows_each=rows_each,
                enqueue_ns=enqueue_ns, attempt=min(attempt, _ATTEMPTS_MAX), priority=priority,
                timeout_us=min(timeout_us, 1 << 50),
                deadline_ns=enqueue_ns + patience_us * 1000 if patience_us else 0,
            )  # fmt: skip
            try:
                self._check_run(client, run)
                self._admit(client, requests, now_ns)
            except ServingError as error:
                self._refuse_run(client, run, error)
            else:
                runs.append(run)
        if runs:
            self._engine.accept(Submit(producer=client.number, epoch=self._epoch, runs=tuple(runs)))

    def _check_run(self, client: _Client, run: RunSubmit) -> None:
        shape = self._live_shape(run.route)
        if not shape.row_bytes:
            raise InvalidArgument("the model does not take requests in slab rows")
        if not 1 <= run.rows_each <= shape.rows_max:
            raise InvalidArgument(f"a request must have 1 to {shape.rows_max} rows, this one has {run.rows_each}")
        if not 1 <= run.capacity <= SLAB_CAPACITY_MAX or run.requests < 1:
            raise InvalidArgument("the message names an impossible slab")
        if run.first + run.requests * run.rows_each > run.capacity:
            raise InvalidArgument("the message names rows outside their slab")
        if run.base + shape.slab_bytes(run.capacity) > client.arena_bytes:
            raise InvalidArgument("the message names a slab outside the client's arena")

    def _live_shape(self, number: int) -> _RouteShape:
        route = self._engine.route_of(number)
        shape = self._shapes.get(number)
        if route is None or shape is None or route.is_draining:
            # Frontends learn of a new version before the old one is drained; clients learn of it here.
            raise _Moved(_MOVED_TEXT)
        return shape

    def _refuse_run(self, client: _Client, run: RunSubmit, error: ServingError) -> None:
        requests = min(run.requests, 0xFFFFFFFF)
        rows = min(run.requests * run.rows_each, 0xFFFFFFFF)
        wire = Run(client.number, requests, run.base, run.capacity, run.first, rows, run.attempt, 0)
        self._engine.ring_producer(
            client.number,
            pack_runs(Kind.RUNS_FAILED, _flags_of(error), 0, 0, [wire], NO_TIMES)
            + bytes((error.code,))
            + error.text.encode(),
        )

    def _cancel_rung(self, client: _Client, instance_number: int, body: bytes) -> None:
        ticket, base, first, _zero = CANCEL_RUNG.unpack(body)
        instance = self._engine.instance_of(instance_number)
        if instance is not None and client.number in instance.ringers:
            # The worker knows what it runs for this client under this ticket.
            instance.hint(pack_rows_cancel(ticket, client.number, base, (first,)))

    # --- parcels ---

    def _take_parcel(self, client: _Client, message: bytes) -> None:
        (
            route, rows, token, shape_key, timeout_us, deadline_ns, enqueue_ns, correlation, priority, attempt,
            head_bytes, correlation_bytes, flags, _zero,
        ) = SUBMIT_PARCEL.unpack_from(message, _END)  # fmt: skip
        body = message[_END + SUBMIT_PARCEL.size :]
        if len(body) != head_bytes + correlation_bytes:
            raise _Broken("a parcel's lengths do not add up")
        now_ns = time.monotonic_ns()
        try:
            shape = self._live_shape(route)
            if head_bytes > HEAD_BYTES_MAX:
                raise InvalidArgument(f"a request's names and parameters may take {HEAD_BYTES_MAX} bytes")
            if not 1 <= rows <= shape.rows_max:
                raise InvalidArgument(f"a request must have 1 to {shape.rows_max} rows, this one has {rows}")
            self._admit(client, 1, now_ns)
        except ServingError as error:
            self._refuse_parcel(client, token, error)
            return
        parcel = ParcelSubmit(
            route=route, token=token, rows=rows, enqueue_ns=believable_ns(enqueue_ns, now_ns), head=body[:head_bytes],
            shape_key=shape_key, priority=priority, timeout_us=min(timeout_us, 1 << 50), deadline_ns=deadline_ns,
            correlation_id=body[head_bytes:].decode() if correlation_bytes else correlation,
            sequence_start=bool(flags & FLAG_SEQUENCE_START), sequence_end=bool(flags & FLAG_SEQUENCE_END),
            attempt=min(attempt, _ATTEMPTS_MAX),
        )  # fmt: skip
        self._engine.accept(Submit(producer=client.number, epoch=self._epoch, parcels=(parcel,)))

    def _refuse_parcel(self, client: _Client, token: int, error: ServingError) -> None:
        reply = msgspec.msgpack.encode(ReplyHead(code=error.code, text=error.text))
        header = HEADER.pack(Kind.PARCEL_REPLY, FLAG_FINAL | _flags_of(error), 1, 0, 0)
        self._engine.ring_producer(client.number, header + NO_TIMES + TOKEN.pack(token) + reply)

    def _collect(self, client: _Client, instance_number: int, lent: bytes) -> None:
        if not GROW.size <= len(lent) <= GROW.size + HEAD_BYTES_MAX:
            raise _Broken(f"{len(lent)} bytes where {GROW.size} and rooms belong")
        _token, offset, byte_size = GROW.unpack_from(lent)
        instance = self._engine.instance_of(instance_number)
        if offset + byte_size > client.arena_bytes:
            raise _Broken("a reply block lies outside the arena")
        if instance is not None:
            # The worker knows which requests of this client wait for room, and no others; it checks what is lent on a
            # device when it opens that.
            instance.hint(HEADER.pack(Kind.COLLECT, 0, 1, client.number, 0) + lent)

    # --- limits ---

    def _admit(self, client: _Client, requests: int, now_ns: int) -> None:
        """Count requests in; the count is put right only when it reaches the limit, so that ends need not be counted.

        Raises:
            Unavailable: the client has too many requests in flight.
        """
        if client.accepted + requests > _OUTSTANDING_LIMIT:
            if now_ns - client.counted_ns >= _RECOUNT_NS:
                client.counted_ns = now_ns
                client.accepted = self._engine.count_waiting(client.number)
            if client.accepted + requests > _OUTSTANDING_LIMIT:
                raise Unavailable(f"a client may have {OUTSTANDING_MAX} requests in flight")
        client.accepted += requests


def _flags_of(error: ServingError) -> int:
    return FLAG_MOVED if isinstance(error, _Moved) else 0


def believable_ns(claimed_ns: int, now_ns: int) -> int:
    """Return when a request was made: as its client says if that can be, else now."""
    return claimed_ns if 0 <= now_ns - claimed_ns <= _ENQUEUE_AGE_NS else now_ns


def count_requests(producer: int, sets: Iterable[Iterable[Waiting]]) -> int:
    """Return how many requests of a producer are in queues or running."""
    return sum(item.requests for items in sets for item in items if item.producer == producer)


def ticket_of(epoch: int, instance: Instance) -> int:
    """Return the number of an instance's current grant; unique as long as its worker lives."""
    return GRANTED_BATCH | epoch << 32 | instance.generation
