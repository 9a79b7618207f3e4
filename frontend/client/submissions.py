"""The sending side of a client: requests and notes to the scheduler, and requests straight to a granted worker.

The connection's lock is held in every call. What cannot be sent raises ``EngineGone``.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterable, Sequence

from forebay.client.errors import EngineGone
from forebay.client.grants import Grants
from forebay.client.opened import Grant
from forebay.client.pending import Pending, PendingParcel, Rows, RowsLease
from forebay.ipc.client_wire import CANCEL_RUN, CANCEL_RUNG, NUMBER, SUBMIT_PARCEL, SUBMIT_RUN, SubmitKind
from forebay.ipc.wire import FLAG_GRANTED, GROW, HEADER, PARCEL, RUN, TOKEN, Kind

#: How long the scheduler may leave the submission socket full, s.
_SUBMIT_PATIENCE_S = 10.0

#: What the field of a submission holds.
_PATIENCE_US_MAX = 0xFFFFFFFF
#: Requests of a thread between two looks at whether it is bound to a core, and how long that is at most, ns.
_REQUESTS_PER_LOOK = 32
_LOOK_PERIOD_NS = 10_000_000


class Submissions:
    """The submission socket, and the rings of the workers that are granted."""

    def __init__(
        self, sock: socket.socket, producer: int, epoch: int, grants: Grants, *, shares_core: bool = True
    ) -> None:
        """Take over ``sock``.

        Args:
            epoch: that of the scheduler that reads it.
            shares_core: have a worker that is rung run on the core of a thread that has only one.
        """
        self._sock = sock
        self._sock.setblocking(False)
        self._producer = producer
        #: Of the scheduler; messages of another one are dropped.
        self.epoch = epoch
        self._grants = grants
        self._shares_core = shares_core
        #: The request that is handed over is the only one in flight.
        self.is_alone = False
        #: The core of this thread, plus one, if the worker that was rung last was called to it; 0: it was not.
        self.shared_place = 0
        #: The same of the thread that looked last, and for how many further requests, and until when, it counts.
        self._own_place = 0
        self._looked_thread = 0
        self._looks_left = 0
        self._look_again_ns = 0

    def close(self) -> None:
        self._sock.close()

    # --- requests ---

    def submit(self, pending: Pending) -> None:
        """Hand a request over, for the first time or again."""
        if isinstance(pending, PendingParcel):
            self._submit_parcel(pending)
        elif pending.lease is not None:
            self.submit_rows(pending, pending.lease)

    def submit_rows(self, pending: Pending, lease: Rows) -> None:
        """Hand over a request whose rows are filled."""
        model, slab = pending.model, lease.slab
        pending.route = model.route
        if model.grants and (grant := model.idle_grant()) is not None:
            message = HEADER.pack(Kind.RUNS, FLAG_GRANTED, 1, self._choose_place(), grant.ticket) + RUN.pack(
                self._producer,
                1,
                slab.base,
                slab.capacity,
                lease.first,
                lease.rows,
                pending.attempt,
                pending.enqueue_ns,
            )
            if self._ring(grant, pending, message):
                return
        self._submit_run(pending, lease, 1)

    def submit_group(self, pendings: Sequence[Pending], whole: RowsLease) -> None:
        """Hand over requests of equal form that fill the rows of a lease, with one message."""
        for pending in pendings:
            pending.route = pending.model.route
        self._submit_run(pendings[0], whole, len(pendings))

    def _submit_run(self, pending: Pending, rows: Rows, requests: int) -> None:
        slab = rows.slab
        self.shared_place = 0
        self._send(
            HEADER.pack(SubmitKind.RUNS, 0, 1, 0, self.epoch)
            + SUBMIT_RUN.pack(
                pending.route,
                requests,
                slab.base,
                slab.capacity,
                rows.first,
                pending.rows,
                pending.attempt,
                pending.priority,
                _patience_us(pending),
                pending.timeout_us,
                pending.enqueue_ns,
            )
        )

    def _submit_parcel(self, pending: PendingParcel) -> None:
        model, head = pending.model, pending.head
        pending.route = model.route
        if model.grants and (grant := model.idle_grant()) is not None:
            message = HEADER.pack(Kind.PARCELS, FLAG_GRANTED, 1, self._choose_place(), grant.ticket) + PARCEL.pack(
                self._producer, pending.rows, pending.token, pending.enqueue_ns, len(head)
            )
            if self._ring(grant, pending, message + head):
                return
        self.shared_place = 0
        correlation, number, flags = pending.sequence
        text = correlation.encode()
        self._send(
            HEADER.pack(SubmitKind.PARCEL, 0, 1, 0, self.epoch)
            + SUBMIT_PARCEL.pack(
                model.route,
                pending.rows,
                pending.token,
                pending.shape_key,
                pending.timeout_us,
                pending.deadline_ns,
                pending.enqueue_ns,
                number,
                pending.priority,
                pending.attempt,
                len(head),
                len(text),
                flags,
                0,
            )
            + head
            + text
        )

    def _choose_place(self) -> int:
        """Return which core the worker is to run on, plus one; 0: any.

        A thread that has one core, and sleeps while it waits, runs by turns with the worker: on one core, waking each
        other is a context switch. It is so pinned by its owner, or in a worker that shares a core with a frontend.
        """
        if not self._shares_core or not self.is_alone:
            self.shared_place = 0
            return 0
        thread, now_ns = threading.get_ident(), time.monotonic_ns()
        self._looks_left -= 1
        if self._looks_left < 0 or thread != self._looked_thread or now_ns >= self._look_again_ns:
            cores = os.sched_getaffinity(0)
            self._own_place = next(iter(cores)) + 1 if len(cores) == 1 else 0
            self._looked_thread = thread
            self._looks_left = _REQUESTS_PER_LOOK
            self._look_again_ns = now_ns + _LOOK_PERIOD_NS
        self.shared_place = self._own_place
        return self.shared_place

    def _ring(self, grant: Grant, pending: Pending, message: bytes) -> bool:
        """Hand a request to a worker directly; False if it does not take it."""
        try:
            grant.ring.send(message, socket.MSG_DONTWAIT)
        except OSError:
            # The worker is gone, or has thrown us out; whichever it is, the completion doorbell will say.
            self._grants.drop(grant)
            return False
        grant.outstanding = pending
        return True

    # --- notes ---

    def cancel(self, pending: Pending) -> None:
        """Nobody waits for the request any more."""
        if isinstance(pending, PendingParcel):
            self._send(HEADER.pack(SubmitKind.CANCEL, 0, 1, 0, self.epoch) + TOKEN.pack(pending.token))
        elif pending.lease is not None:
            self._cancel_rows(pending, pending.lease)

    def _cancel_rows(self, pending: Pending, lease: Rows) -> None:
        grant = self._grants.running(pending)
        if grant is None:
            header = HEADER.pack(SubmitKind.CANCEL_RUNS, 0, 1, 0, self.epoch)
            self._send(header + CANCEL_RUN.pack(pending.route, lease.first, lease.slab.base))
        else:
            # It names rows, and goes a longer way than a ring: it must not meet the next request in them.
            self._grants.retire(grant)
            header = HEADER.pack(SubmitKind.CANCEL_RUNG, 0, 1, grant.instance, self.epoch)
            self._send(header + CANCEL_RUNG.pack(grant.ticket, lease.slab.base, lease.first, 0))

    def collect(self, instance: int, token: int, offset: int, byte_size: int, rooms: bytes = b"") -> None:
        """Lend a block for a response that did not fit; 0 bytes: there is no room.

        Args:
            rooms: an encoded ``Rooms``, or empty.
        """
        header = HEADER.pack(SubmitKind.COLLECT, 0, 1, instance, self.epoch)
        self._send(header + GROW.pack(token, offset, byte_size) + rooms)

    def announce_rings(self, instances: Iterable[int]) -> None:
        """Tell the scheduler which workers a grant would let us ring."""
        numbers = [NUMBER.pack(instance) for instance in instances]
        if numbers:
            self._send(HEADER.pack(SubmitKind.RINGS, 0, len(numbers), 0, self.epoch) + b"".join(numbers))

    # --- the socket ---

    def _send(self, message: bytes) -> None:
        try:
            self._sock.send(message)
        except BlockingIOError:
            self._send_patiently(message)
        except OSError as error:
            raise EngineGone(f"the engine is gone: {error.strerror or error}") from None

    def _send_patiently(self, message: bytes) -> None:
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLOUT)
        give_up_s = time.monotonic() + _SUBMIT_PATIENCE_S
        while time.monotonic() < give_up_s:
            poll.poll(100)
            try:
                self._sock.send(message)
            except BlockingIOError:
                continue
            except OSError as error:
                raise EngineGone(f"the engine is gone: {error.strerror or error}") from None
            return
        raise EngineGone(f"the scheduler has not read anything for {_SUBMIT_PATIENCE_S:g} s")


def _patience_us(pending: Pending) -> int:
    """Return how long after it was made somebody waits for a request in rows, µs; 0: for ever, or nearly so."""
    if not pending.deadline_ns:
        return 0
    patience_us = max((pending.deadline_ns - pending.enqueue_ns) // 1000, 1)
    return patience_us if patience_us <= _PATIENCE_US_MAX else 0
