"""A client's requests in flight, and what becomes of them: answers, workers that died, models that moved.

The connection's lock is held in every call.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections import deque
from collections.abc import Sequence

import msgspec

from forebay.client.errors import EngineGone, ModelChanged, changed_text
from forebay.client.grants import Grants
from forebay.client.memory import Memory
from forebay.client.models import Models
from forebay.client.pending import Pending, PendingParcel, RowsLease
from forebay.client.submissions import Submissions
from forebay.client.traced import trace_end, trace_response, trace_rows, trace_start
from forebay.ipc.arena import Arena
from forebay.ipc.ensemble.device_rooms import bytes_without_room, lent_rooms
from forebay.ipc.errors import ArenaFull, Cancelled, Internal, Moved, ServingError, WorkerDied, from_wire, moved_text
from forebay.ipc.messages import ReplyHead, RowRemark
from forebay.ipc.trace import TraceSpan
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_GONE,
    FLAG_HUNG,
    FLAG_MOVED,
    FLAG_REMARKS,
    GRANT,
    HEADER,
    RUN,
    TIMES,
    TIMES_END,
    TOKEN,
    Kind,
    Times,
    unpack_runs,
)

#: Times a request is handed to another worker after its worker died.
ATTEMPTS_MAX = 1

#: What is acted on when nothing is.
NO_REPLY = bytes(TIMES_END)

#: Times of a request that no worker had.
NOT_RUN = Times(0, 0, 0, 0)
#: Messages that tell when an execution passed its stages.
_TIMED = (Kind.PARCEL_REPLY, Kind.RUNS_DONE, Kind.RUNS_FAILED)

#: Where the tokens of a REVOKE begin.
_REVOKE_END = HEADER.size + GRANT.size

#: Larger reply blocks are not lent to begin with.
_REPLY_GUESS_MAX = 1 << 20

_encode = msgspec.msgpack.Encoder().encode


class InFlight:
    """Every request that was handed over and is not answered."""

    def __init__(
        self,
        arena: Arena,
        memory: Memory,
        grants: Grants,
        submissions: Submissions,
        models: Models,
        count_max: int,
    ) -> None:
        """Begin with none.

        Args:
            count_max: how many there may be.
        """
        #: How many there are.
        self.count = 0
        #: What ended the connection.
        self.failure: EngineGone | None = None
        self._arena = arena
        self._memory = memory
        self._grants = grants
        self._submissions = submissions
        self._models = models
        self.count_max = count_max
        self._parcels: dict[int, PendingParcel] = {}
        #: Steps of ensembles that have to wait until there are fewer.
        self._waiting_steps: deque[PendingParcel] = deque()
        self._tokens = itertools.count(1)
        #: The message that is acted on.
        self._message = memoryview(NO_REPLY)
        self._decode_reply = msgspec.msgpack.Decoder(ReplyHead).decode
        self._decode_remarks = msgspec.msgpack.Decoder(list[RowRemark]).decode

    def next_token(self) -> int:
        """Return a number that no parcel has had."""
        return next(self._tokens)

    def submit(self, pending: Pending) -> None:
        """Hand over a request that is filled.

        Raises:
            EngineGone: the server is gone.
        """
        if isinstance(pending, PendingParcel):
            self._parcels[pending.token] = pending
        elif pending.lease is not None:
            pending.lease.slab.owners[pending.lease.first] = pending
        self.count += 1
        self._submissions.is_alone = self.count == 1
        if pending.trace is not None:
            trace_start(pending.trace, pending, self._arena.view)
        try:
            self._submissions.submit(pending)
        except EngineGone as error:
            raise self.broken(error.text) from None

    def submit_group(self, pendings: Sequence[Pending], whole: RowsLease) -> None:
        """Hand over requests of equal form that fill the rows of a lease, with one message.

        Raises:
            EngineGone: the server is gone.
        """
        owners = whole.slab.owners
        for pending in pendings:
            assert pending.lease is not None
            owners[pending.lease.first] = pending
        self.count += len(pendings)
        try:
            self._submissions.submit_group(pendings, whole)
        except EngineGone as error:
            raise self.broken(error.text) from None

    @property
    def waits_for_our_core(self) -> bool:
        """True if one request is in flight, and the worker that has it runs on the core of the thread that waits."""
        return self.count == 1 and self._submissions.shared_place > 0

    def cancel(self, pending: Pending) -> None:
        """Nobody waits for the request any more."""
        if not pending.is_done:
            pending.is_cancelled = True
            try:
                self._submissions.cancel(pending)
            except EngineGone as error:
                raise self.broken(error.text) from None

    def submit_step(self, pending: PendingParcel) -> None:
        """Hand over a step of an ensemble, as soon as there is room for another request.

        Raises:
            EngineGone: the server is gone.
        """
        if self.failure is not None:
            raise EngineGone(self.failure.text)
        if self.count < self.count_max:
            self.submit(pending)
        else:
            self._waiting_steps.append(pending)

    def cancel_step(self, pending: PendingParcel) -> None:
        """The run of the ensemble is over; a server that is gone is told to nobody."""
        with contextlib.suppress(EngineGone):
            if pending in self._waiting_steps:
                self._waiting_steps.remove(pending)
            else:
                self.cancel(pending)

    def _submit_waiting_steps(self) -> None:
        while self._waiting_steps and self.count < self.count_max:
            self.submit(self._waiting_steps.popleft())

    def take(self, message: memoryview) -> None:
        """Act on a message of the completion doorbell.

        Raises:
            EngineGone: it is the end of file, or makes no sense.
        """
        if len(message) < HEADER.size:
            raise self.broken(
                "the engine is gone: the server has ended, or has ended this connection because its answers were "
                "not read"
            )
        kind, flags, count, instance, batch = HEADER.unpack_from(message)
        self._message = message
        try:
            self._act(kind, flags, count, instance, batch, message)
            if self._waiting_steps:
                self._submit_waiting_steps()
        except EngineGone as error:
            raise self.broken(error.text) from None
        except (struct.error, msgspec.DecodeError):
            raise self.broken("the engine sent a message that cannot be read") from None

    def _act(self, kind: int, flags: int, count: int, instance: int, batch: int, message: memoryview) -> None:
        if kind == Kind.RUNS_DONE:
            self._grants.set_idle(instance)
            if flags & FLAG_REMARKS:
                self._take_remarks(message, count)
            for index in range(count):
                _producer, _requests, base, _capacity, first, rows, _attempt, _sum_ns = RUN.unpack_from(
                    message, TIMES_END + index * RUN.size
                )
                self._finish_rows(base, first, rows, None, ran=True)
        elif kind == Kind.PARCEL_REPLY:
            self._parcel_reply(message, flags, instance)
        elif kind == Kind.RUNS_FAILED:
            self._runs_failed(message, flags, count, instance)
        elif kind == Kind.GRANT:
            self._granted(message, batch)
        elif kind == Kind.REVOKE:
            self._revoked(message, flags, count, batch)
        elif kind == Kind.RUNS_LOST:
            for run in unpack_runs(message, count, TIMES_END):
                for pending in self._owners(run.base, run.first, run.rows):
                    self._retry(pending, flags)
        elif kind == Kind.PARCEL_LOST:
            for index in range(count):
                (token,) = TOKEN.unpack_from(message, TIMES_END + index * TOKEN.size)
                self._grants.set_idle(instance, token)
                if (parcel := self._parcels.get(token)) is not None:
                    self._retry(parcel, flags)
        elif kind == Kind.RESYNC:
            self._resync(batch, _tokens(message, HEADER.size, count))

    # --- answers ---

    @property
    def reply_ran(self) -> bool:
        """Whether a worker had the request whose answer is acted on."""
        instance: int = HEADER.unpack_from(self._message)[3]
        return instance != 0

    def reply_times(self) -> Times:
        """Return when the execution whose answer is acted on passed its stages; zeros: there was none."""
        if self._message[0] not in _TIMED:
            return NOT_RUN
        return Times._make(TIMES.unpack_from(self._message, HEADER.size))

    def _owners(self, base: int, first: int, rows: int) -> list[Pending]:
        """Return the requests in flight that begin in these rows."""
        slab = self._memory.slab(base)
        if slab is None:
            return []
        return [pending for pending in slab.owners[first : first + rows] if pending is not None]

    def _finish_rows(self, base: int, first: int, rows: int, error: ServingError | None, *, ran: bool) -> None:
        slab = self._memory.slab(base)
        if slab is None:
            return
        owners = slab.owners
        for row, pending in enumerate(owners[first : first + rows], first):
            if pending is not None:
                owners[row] = None
                if pending.trace is not None and error is None:
                    trace_rows(pending.trace, pending, self._arena.view)
                self._end(pending, error, ran=ran)

    def _take_remarks(self, message: memoryview, count: int) -> None:
        """Act on what a RUNS_DONE says of single requests: those that failed are over."""
        for remark in self._decode_remarks(message[TIMES_END + count * RUN.size :]):
            if not 0 <= remark.run < count:
                continue
            base: int = RUN.unpack_from(message, TIMES_END + remark.run * RUN.size)[2]
            for pending in self._owners(base, remark.first, 1):
                if remark.text:
                    self._finish_rows(base, remark.first, 1, from_wire(remark.code, remark.text), ran=True)
                else:
                    pending.parameters = remark.parameters

    def _end(self, pending: Pending, error: ServingError | None, *, ran: bool, spans: Sequence[TraceSpan] = ()) -> None:
        """It is in flight no more.

        Args:
            ran: a worker had it, and its answer is acted on.
            spans: of a traced request: what its model has asked others.
        """
        self.count -= 1
        counts = pending.model.counts
        if counts is not None:
            counts.ended(pending.enqueue_ns, error, ran=ran)
        pending.has_run = ran
        if pending.trace is not None:
            trace_end(pending.trace, self.reply_times() if ran else NOT_RUN, spans)
        pending.finish(error)

    def _finish(self, pending: Pending, error: ServingError) -> None:
        """End a request without an answer of a worker."""
        if isinstance(pending, PendingParcel):
            if self._parcels.pop(pending.token, None) is None:
                return
        elif pending.lease is not None:
            pending.lease.slab.owners[pending.lease.first] = None
        self._end(pending, error, ran=isinstance(error, WorkerDied))

    def _runs_failed(self, message: memoryview, flags: int, count: int, instance: int) -> None:
        self._grants.set_idle(instance)
        runs = unpack_runs(message, count, TIMES_END)
        end = TIMES_END + count * RUN.size
        error = from_wire(message[end], bytes(message[end + 1 :]).decode(errors="replace"))
        for run in runs:
            if flags & FLAG_MOVED:
                for pending in self._owners(run.base, run.first, run.rows):
                    self._follow_model(pending, error)
            else:
                self._finish_rows(run.base, run.first, run.rows, error, ran=instance != 0)

    def _parcel_reply(self, message: memoryview, flags: int, instance: int) -> None:
        (token,) = TOKEN.unpack_from(message, TIMES_END)
        pending = self._parcels.get(token)
        is_final = bool(flags & FLAG_FINAL)
        if is_final:
            self._grants.set_idle(instance, token)
        if pending is None:
            return
        try:
            reply = self._decode_reply(message[TIMES_END + TOKEN.size :])
            for place in reply.outputs:
                if not place.memory:
                    self._arena.check(place.offset, place.byte_size)
        except (msgspec.DecodeError, msgspec.ValidationError, Internal):
            reply, is_final = ReplyHead(code=Internal.code, text="the model's answer could not be read"), True
        if flags & FLAG_MOVED:
            self._follow_model(pending, from_wire(reply.code, reply.text))
        elif reply.needs_bytes:
            self._lend(pending, reply, instance)
        else:
            self._note_response(pending, reply, is_final=is_final)

    def _note_response(self, pending: PendingParcel, reply: ReplyHead, *, is_final: bool) -> None:
        error = from_wire(reply.code, reply.text) if reply.text or reply.code else None
        if (error is None and reply.index >= 0) or (error is not None and not is_final):
            # An answer lies in the block that was lent for it; the first one, else, in that of the request.
            held = (pending.lent.popleft(),) if pending.lent else tuple(pending.blocks)
            pending.respond(reply, held)
            if pending.targets:
                _note_passed(pending, reply)
            if pending.trace is not None:
                trace_response(pending.trace, reply, self._arena.view)
        elif error is None and is_final:
            pending.ends_empty = True
        if is_final:
            del self._parcels[pending.token]
            self._end(pending, error, ran=self.reply_ran, spans=reply.spans)
        else:
            pending.wake()

    def _lend(self, pending: PendingParcel, reply: ReplyHead, instance: int) -> None:
        byte_size, lent = reply.needs_bytes, b""
        if reply.needs_rooms:
            rooms = pending.lend_rooms(reply.needs_rooms)
            byte_size += bytes_without_room(reply.needs_rooms, rooms)
            lent = _encode(lent_rooms(rooms))
        try:
            lease = self._memory.loan_block(byte_size)
        except ArenaFull as error:
            self._finish(pending, error)
            self._submissions.collect(instance, pending.token, 0, 0)
        else:
            pending.lent.append(lease)
            pending.model.reply_guess_bytes = max(pending.model.reply_guess_bytes, min(byte_size, _REPLY_GUESS_MAX))
            self._submissions.collect(instance, pending.token, lease.offset, byte_size, lent)

    # --- workers that died, models that moved, schedulers that were restarted ---

    def _retry(self, pending: Pending, flags: int) -> None:
        """The worker is gone: hand the request in once more, unless that would do harm."""
        name = pending.model.name
        if flags & FLAG_HUNG:
            text = f"the request ran longer than model '{name}' may (--worker-timeout-secs, or its parameter "
            self._finish(pending, WorkerDied(text + "worker_timeout_secs) and was ended"))
        elif isinstance(pending, PendingParcel) and pending.response_count:
            # Its first responses are with the caller already.
            text = f"an instance of model '{name}' ended unexpectedly before its last response"
            self._finish(pending, WorkerDied(text))
        elif pending.attempt >= ATTEMPTS_MAX:
            self._finish(
                pending,
                WorkerDied(
                    f"an instance of model '{name}' ended unexpectedly while it ran the request, "
                    "and so did the one that tried it again"
                ),
            )
        else:
            pending.attempt += 1
            self._send_again(pending)

    def _send_again(self, pending: Pending) -> None:
        if pending.is_cancelled:
            self._finish(pending, Cancelled("request was cancelled"))
        else:
            self._submissions.submit(pending)

    def _follow_model(self, pending: Pending, error: ServingError) -> None:
        """The server has loaded the model anew: hand in again, to the new route, what the old one did not take."""
        model = pending.model
        try:
            if model.route == pending.route:
                self._models.reopen(model, error)
            if model.edition != pending.edition:
                raise ModelChanged(changed_text(model.name))
            if isinstance(pending, PendingParcel) and pending.device_id not in (-1, model.entry.device_id):
                raise Moved(moved_text(model.name, pending.device_id))
        except ServingError as reason:
            self._finish(pending, reason)
        else:
            self._send_again(pending)

    def _resync(self, epoch: int, running: set[int]) -> None:
        """A new scheduler is up and nothing else of what the old one had sent runs: hand in again what is left.

        Args:
            running: parcels that workers run, or have run and not answered for good, which is no loss.
        """
        if epoch == self._submissions.epoch:
            return  # Nothing of ours went to an earlier one.
        self._submissions.epoch = epoch
        for model in self._models:
            self._grants.drop_all(model)
            self._submissions.announce_rings(model.rings)
        left: list[Pending] = [parcel for token, parcel in self._parcels.items() if token not in running]
        left += self._memory.owners()
        for pending in left:
            self._send_again(pending)

    # --- grants ---

    def _granted(self, message: memoryview, ticket: int) -> None:
        route, instance, _generation, _rows_max = GRANT.unpack_from(message, HEADER.size)
        model = self._models.on_route(route)
        if model is not None:
            self._grants.open(model, instance, ticket)

    def _revoked(self, message: memoryview, flags: int, count: int, ticket: int) -> None:
        _route, instance, _generation, _rows_max = GRANT.unpack_from(message, HEADER.size)
        is_gone = bool(flags & FLAG_GONE)
        pending = self._grants.close(instance, ticket, is_gone=is_gone)
        if pending is None:
            return
        if is_gone:
            self._retry(pending, flags)
        elif not isinstance(pending, PendingParcel) or pending.token not in _tokens(message, _REVOKE_END, count):
            # What the worker has run is answered before this message, or named in it: this has not run.
            self._send_again(pending)

    # --- the end ---

    def broken(self, text: str) -> EngineGone:
        """Fail everything in flight, and every later request; return the error to raise."""
        if self.failure is None:
            self.failure = EngineGone(text)
            left: list[Pending] = [*self._parcels.values(), *self._waiting_steps, *self._memory.owners()]
            self._memory.forget_owners()
            self._parcels.clear()
            self._waiting_steps.clear()
            self.count = 0
            for pending in left:
                pending.finish(EngineGone(text))
        return EngineGone(self.failure.text)


def _note_passed(pending: PendingParcel, reply: ReplyHead) -> None:
    """Count outputs that stay on a device, remember how large they are, and give back what they do not use."""
    passed_bytes = 0
    for place in reply.outputs:
        lease = pending.device_lease(place, ()) if place.memory else None
        if lease is not None:
            passed_bytes += place.byte_size
            pending.model.output_sizes.learn(place.name, pending.rows, place.byte_size)
            lease.shrink(place.byte_size)
    if pending.model.counts is not None:
        pending.model.counts.passed(passed_bytes)


def _tokens(message: memoryview, begin: int, count: int) -> set[int]:
    """Return the tokens of a message that begin there."""
    return {token for (token,) in TOKEN.iter_unpack(message[begin : begin + count * TOKEN.size])}
