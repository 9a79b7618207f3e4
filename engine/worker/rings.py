"""The rings: how a shared-memory client hands a batch to this worker itself, while it is granted.

The client holds the other end of a socket that is its alone, so a grant is kept here and not by the client's good will:
the scheduler opens a ring and closes it again through the worker's own doorbell, in order with its batches. What is not
open is not read. Life of a ring: attached -> (open -> closed)* -> detached. When it closes, what the client had rung
is run first, then REVOKE goes into its completion doorbell: whatever it has rung and not been answered by then was
not run, but for the parcels that it names: those are with a model that answers later than it executes.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from forebay.engine.worker.placement import Placement
from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.wait_styles import Park
from forebay.ipc.errors import ServingError
from forebay.ipc.wire import GRANT, HEADER, PARCEL, RUN, TOKEN, Kind
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.worker.rows_lane import RowsLane

#: Messages that are run when a ring closes; a client is to have one under way.
_DRAIN_MAX = 2

#: Claims about when a request was made count if they are at most so old, ns.
_ENQUEUE_AGE_NS = 1_000_000_000

#: Runs one message from a ring: its kind and the whole of it.
Execute = Callable[[int, memoryview], None]
#: Answers a message that the lane has run and left unanswered.
Fail = Callable[[memoryview, ServingError], object]


class _Ring:
    __slots__ = ("place", "producer", "sock", "stale", "ticket")

    def __init__(self, producer: Producer, sock: socket.socket) -> None:
        self.producer = producer
        self.sock = sock
        #: Of the grant that is open; 0: none.
        self.ticket = 0
        #: Messages of closed grants that may still arrive: one each.
        self.stale = 0
        #: The core that the client shares with us, plus one; 0: none.
        self.place = 0


class Rings:
    """Every ring of this worker, and the wait on those that are open together with the doorbell."""

    def __init__(
        self,
        spec: InstanceSpec,
        producers: Producers,
        doorbell: socket.socket,
        execute: Execute,
        wait: Park,
        placement: Placement,
        open_tokens: Callable[[int], list[int]],
        lane: RowsLane | None,
        fail: Fail,
    ) -> None:
        """Watch the doorbell, which stays the caller's.

        Args:
            open_tokens: returns which parcels of a producer have run and are still to be answered.
            lane: waits instead of us, and runs what it knows.
        """
        self._wait = wait
        self._placement = placement
        self._doorbell_fd = doorbell.fileno()
        self._execute = execute
        self._open_tokens = open_tokens
        self._producers = producers
        self._rows_max = max(spec.max_batch_size, 1)
        self._route = spec.route
        self._instance = spec.instance
        self._rings: dict[int, _Ring] = {}
        self._open: dict[int, _Ring] = {}
        self._poll = select.poll()
        self._poll.register(self._doorbell_fd, select.POLLIN)
        self._lane = lane
        self._fail = fail
        if lane is not None:
            lane.listen(self._doorbell_fd, self._rows_max, wait.spin_ns)
        #: True while any ring is open: then wait with :meth:`wait_doorbell` before reading the doorbell.
        self.is_open = False

    @property
    def open_producers(self) -> set[int]:
        """Who may ring this worker just now."""
        return {ring.producer.id for ring in list(self._open.values())}

    def attach(self, producer: Producer, fd: int) -> None:
        """Take ownership of the receiving end of a client's ring, in place of an earlier one."""
        self.detach(producer.id)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        self._rings[producer.id] = _Ring(producer, sock)

    def detach(self, producer: int) -> None:
        """The client is gone, or broke the rules; nothing of its ring is read any more."""
        ring = self._rings.pop(producer, None)
        if ring is not None:
            self._stop_watching(ring)
            ring.sock.close()

    def open(self, producer: int, ticket: int) -> None:
        """Run what the client rings with this ticket, from now on."""
        ring = self._rings.get(producer)
        if ring is not None and not ring.ticket:
            ring.ticket = ticket
            self._open[ring.sock.fileno()] = ring
            self._poll.register(ring.sock.fileno(), select.POLLIN)
            self._tell_lane(ring)
            self.is_open = True

    def close(self, producer: int, ticket: int, buffer: bytearray) -> None:
        """Run what the client has rung so far, then tell it that the grant is over."""
        ring = self._rings.get(producer)
        if ring is None or ring.ticket != ticket:
            return
        for _ in range(_DRAIN_MAX):
            if not self._take(ring, buffer):
                break
        if ring.ticket != ticket:
            return  # Expelled by what it had rung.
        self._stop_watching(ring)
        ring.stale += 1
        self._send_revoke(ring, ticket)

    def close_all(self, buffer: bytearray) -> None:
        """A new scheduler knows nothing of the grants of the last one."""
        for ring in list(self._open.values()):
            self.close(ring.producer.id, ring.ticket, buffer)

    def wait_doorbell(self, buffer: bytearray, timeout_ms: int | None) -> bool:
        """Wait, run what arrives on open rings, return True if the doorbell can be read."""
        if self._lane is not None:
            return self._wait_in_lane(self._lane, buffer, timeout_ms)
        is_ready = False
        for fd, _events in self._wait.poll(self._poll, timeout_ms):
            ring = self._open.get(fd)
            if ring is not None:
                self._take(ring, buffer)
            elif fd == self._doorbell_fd:
                is_ready = True
        return is_ready

    def _wait_in_lane(self, lane: RowsLane, buffer: bytearray, timeout_ms: int | None) -> bool:
        try:
            fd = lane.wait(buffer, -1 if timeout_ms is None else timeout_ms)
        except ServingError as error:
            self._fail(memoryview(buffer)[: lane.size], error)
            return False
        ring = self._open.get(fd)
        if ring is not None:
            self._handle(ring, buffer, lane.size)
        return fd == self._doorbell_fd

    def _tell_lane(self, ring: _Ring) -> None:
        if self._lane is not None:
            self._lane.watch(ring.sock.fileno(), ring.producer.id, ring.ticket, ring.place)

    def _send_revoke(self, ring: _Ring, ticket: int) -> None:
        body = GRANT.pack(self._route, self._instance, ticket & 0xFFFFFFFF, 0)
        with self._producers.lock:
            tokens = self._open_tokens(ring.producer.id)
            header = HEADER.pack(Kind.REVOKE, 0, len(tokens), self._instance, ticket)
            ring.producer.bell.ring(b"".join((header, body, *map(TOKEN.pack, tokens))))

    def _expel(self, ring: _Ring) -> None:
        """The client broke the rules: it has to go by way of the scheduler from now on."""
        ticket = ring.ticket
        self.detach(ring.producer.id)
        if ticket:
            self._send_revoke(ring, ticket)

    def _stop_watching(self, ring: _Ring) -> None:
        if ring.place:
            self._move(ring, 0)
        if ring.ticket:
            ring.ticket = 0
            self._poll.unregister(ring.sock.fileno())
            if self._lane is not None:
                self._lane.unwatch(ring.sock.fileno())
            del self._open[ring.sock.fileno()]
            self.is_open = bool(self._open)

    def _take(self, ring: _Ring, buffer: bytearray) -> bool:
        """Read and run one message; False if there was none to run."""
        try:
            size = ring.sock.recv_into(buffer)
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        return self._handle(ring, buffer, size)

    def _handle(self, ring: _Ring, buffer: bytearray, size: int) -> bool:
        """Run the message at the start of ``buffer``; False if it is none to run. 0 bytes: the client has hung up."""
        if size < HEADER.size:
            self.detach(ring.producer.id)
            return False
        kind, _flags, count, place, ticket = HEADER.unpack_from(buffer)
        if ticket != ring.ticket:
            # Rung before the client knew that an earlier grant was over. More than that is not an accident.
            ring.stale -= 1
            if ring.stale < 0:
                self._expel(ring)
            return False
        if count != 1 or not self._is_sound(kind, ring.producer.id, buffer, size):
            self._expel(ring)
            return False
        if place != ring.place:
            self._move(ring, place)
        self._execute(kind, memoryview(buffer)[:size])
        return True

    def _move(self, ring: _Ring, place: int) -> None:
        """Run on the client's core, or anywhere; whoever shares a core waits for us and has no use for it meanwhile."""
        ring.place = place
        self._tell_lane(ring)
        if place:
            self._placement.join(ring.producer.id, place - 1)
        else:
            self._placement.leave(ring.producer.id)

    def _is_sound(self, kind: int, producer: int, buffer: bytearray, size: int) -> bool:
        """Check what the worker would otherwise take from a scheduler on trust, and write in who asks."""
        now_ns = time.monotonic_ns()
        if kind == Kind.RUNS and size == HEADER.size + RUN.size:
            _producer, requests, base, capacity, first, rows, attempt, enqueue_sum_ns = RUN.unpack_from(
                buffer, HEADER.size
            )
            if not 1 <= requests <= rows <= self._rows_max:
                return False
            if not 0 <= requests * now_ns - enqueue_sum_ns <= requests * _ENQUEUE_AGE_NS:
                enqueue_sum_ns = requests * now_ns
            RUN.pack_into(buffer, HEADER.size, producer, requests, base, capacity, first, rows, attempt, enqueue_sum_ns)
            return True
        if kind == Kind.PARCELS and size >= HEADER.size + PARCEL.size:
            _producer, rows, token, enqueue_ns, head_bytes = PARCEL.unpack_from(buffer, HEADER.size)
            if not 1 <= rows <= self._rows_max or size != HEADER.size + PARCEL.size + head_bytes:
                return False
            if not 0 <= now_ns - enqueue_ns <= _ENQUEUE_AGE_NS:
                enqueue_ns = now_ns
            PARCEL.pack_into(buffer, HEADER.size, producer, rows, token, enqueue_ns, head_bytes)
            return True
        return False
