"""A client's end of the engine: hands requests over and takes the answers. Used by any number of threads.

One lock guards all books. Whoever waits for an answer and finds nobody reading the completion doorbell reads it, for
everybody, until its own answer is there; then it wakes one of the others to go on. So a client needs no thread of its
own, and one that waits alone makes one system call per answer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import msgspec

from forebay.client.door import Door
from forebay.client.errors import DeadlineExceeded, EngineGone, ModelChanged, WrongProcess
from forebay.client.opened import Grant, Opened
from forebay.client.pending import BlockLease, BlockReturns, Pending, PendingParcel, RowsLease, RowsReturns
from forebay.ipc.arena import Arena, BlockAllocator
from forebay.ipc.client_wire import CANCEL_RUN, NUMBER, SUBMIT_PARCEL, SUBMIT_RUN, SubmitKind
from forebay.ipc.errors import ArenaFull, Cancelled, Internal, NotReady, ServingError, WorkerDied, from_wire
from forebay.ipc.messages import ReplyHead
from forebay.ipc.slabs import Slab
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_GONE,
    FLAG_GRANTED,
    FLAG_HUNG,
    FLAG_MOVED,
    GRANT,
    GROW,
    HEADER,
    MESSAGE_BYTES_MAX,
    PARCEL,
    RUN,
    TIMES,
    TOKEN,
    Kind,
    unpack_runs,
)

#: Times a request is handed to another worker after its worker died.
ATTEMPTS_MAX = 1

#: Once in so many requests (a power of two, less one), look for workers that were started since.
_LOOK_MASK = 0xFF

#: A client that parks looks for an answer for so long before it sleeps, as long as answers have been that quick: to
#: wake a process on an idle core takes longer than many a model (measured: 25 to 30 us of 75), ns.
_GLANCE_NS = 50_000
#: After so many answers in a row that took longer, it goes to sleep at once ...
_GLANCE_MISSES = 8
#: ... for so many answers.
_GLANCE_PAUSE = 64

#: How long the scheduler may leave the submission socket full, s.
_SUBMIT_PATIENCE_S = 10.0

#: Large blocks give their pages back to the kernel when they are freed.
_DISCARD_BYTES = 64 * 1024 * 1024

#: How often to look whether the thread that reads has made room, s.
_OTHER_READER_S = 0.0002

_DEADLINE_TEXT = "the deadline passed before the answer came"

_TIMES_END = HEADER.size + TIMES.size

_alive: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection:
    """Everything between :meth:`close` and the door's WELCOME. After :class:`EngineGone` it is of no use any more."""

    def __init__(self, path: str, *, arena_bytes: int = 0, spins: bool = False) -> None:
        """Come in.

        Args:
            path: of the door.
            arena_bytes: 0: as the server likes.
            spins: wait without sleeping.

        Raises:
            NoServer, ServingError: the server is not there or does not let us in.
        """
        self.path = path
        self.pid = os.getpid()
        self._door = Door(path)
        try:
            welcome = self._door.enter(arena_bytes)
        except BaseException:
            self._door.close()
            raise
        self.producer = welcome.producer
        self._epoch = welcome.epoch
        self._outstanding_max = welcome.outstanding_max
        self.arena = Arena(welcome.arena_fd, welcome.arena_bytes)
        os.close(welcome.arena_fd)
        #: uint8 [arena bytes]
        self.view = self.arena.view
        self._completions = welcome.completions
        self._submissions = welcome.submissions
        self._submissions.setblocking(False)
        self._receive_flags = socket.MSG_DONTWAIT if spins else 0
        self._spins = spins
        # With one core, whoever looks keeps the worker from running.
        self._can_glance = not spins and len(os.sched_getaffinity(0)) > 1
        #: Answers that were not there at a glance, in a row; below 0: so many answers without a glance.
        self._glance_misses = 0
        self._blocks = BlockAllocator(welcome.arena_bytes)
        self._blocks.allocate(64)  # Offset 0 is nobody's.
        self._rows_returns: RowsReturns = deque()
        self._block_returns: BlockReturns = deque()
        self._models: dict[tuple[str, int], Opened] = {}
        self._grants: dict[int, Grant] = {}
        self._slabs: dict[int, tuple[Opened, Slab[Pending]]] = {}
        #: Slabs of signatures of the past, by base; freed when nobody has rows in them.
        self._retired: dict[int, Slab[Pending]] = {}
        self._parcels: dict[int, PendingParcel] = {}
        self._tokens = itertools.count(1)
        #: Requests handed over and not answered.
        self.in_flight = 0
        self._buffer = bytearray(MESSAGE_BYTES_MAX)
        self._buffer_view = memoryview(self._buffer)
        self._decode_reply = msgspec.msgpack.Decoder(ReplyHead).decode
        self._failure: ServingError | None = None
        self._is_closed = False
        #: Bytes of tensors copied in user space.
        self.copied_bytes = 0
        self._lock = threading.Lock()
        #: Held by the thread that reads the completion doorbell.
        self._reader = threading.Lock()
        #: Requests that threads wait for while another one reads.
        self._followers: deque[Pending] = deque()
        self._submit_count = 0
        _alive.add(self)

    # --- models ---

    def open_model(self, name: str, version: int = 0) -> Opened:
        """Return a model; asks the server only once.

        Raises:
            ServingError: there is no such model or version.
        """
        self.check_usable()
        with self._lock:
            model = self._models.get((name, version))
        if model is None:
            found = self._door.open_model(name, version)
            with self._lock:
                known = self._models.get((name, version))
                if known is not None:
                    # Another thread was faster; the worker serves the newest ring.
                    known.close_rings()
                    known.rings = dict(found.rings)
                model = self._models.setdefault((name, version), known or Opened(name, version, found))
                self._announce_rings(list(found.rings))
                self._take_news()
        return model

    def list_models(self) -> list[tuple[str, int, str]]:
        """Return (name, version, state) of every version that the server knows."""
        self.check_usable()
        return self._door.list_models()

    def _take_news(self) -> None:
        """Keep the rings to workers that were started since; the lock is held."""
        news = self._door.news
        while news:
            route, instance, ring = news.popleft()
            model = next((model for model in self._models.values() if model.route == route), None)
            if model is None:
                ring.close()
                continue
            if (old := model.rings.pop(instance, None)) is not None:
                old.close()
            model.rings[instance] = ring
            self._announce_rings([instance])

    def _look_at_door(self) -> None:
        self._door.look()
        if self._door.news:
            with self._lock:
                self._take_news()

    def _announce_rings(self, instances: list[int]) -> None:
        """Tell the scheduler which workers a grant would let us ring; the lock is held."""
        if instances:
            numbers = b"".join(NUMBER.pack(instance) for instance in instances)
            self._send(HEADER.pack(SubmitKind.RINGS, 0, len(instances), 0, self._epoch) + numbers)

    # --- memory ---

    def loan_rows(self, model: Opened, rows: int) -> RowsLease:
        """Return free rows; waits for some if every one is in flight.

        Raises:
            ArenaFull: callers hold so many results that there is no room.
        """
        while True:
            with self._lock:
                try:
                    return self._loan_rows(model, rows)
                except ArenaFull:
                    if not self.in_flight:
                        raise
            self.wait_any()

    def _loan_rows(self, model: Opened, rows: int) -> RowsLease:
        self._take_returns()
        for slab in reversed(model.slabs):
            first = slab.loan(rows)
            if first >= 0:
                return RowsLease(self._rows_returns, slab, first, rows)
        layout = model.next_layout(rows)
        slab = Slab[Pending](self._blocks.allocate(layout.byte_size), layout)
        model.slabs.append(slab)
        self._slabs[slab.base] = (model, slab)
        return RowsLease(self._rows_returns, slab, slab.loan(rows), rows)

    def loan_block(self, byte_size: int) -> BlockLease:
        """Return a block; waits for one if requests in flight hold the arena.

        Raises:
            ArenaFull: callers hold so many results that there is no room.
        """
        while True:
            with self._lock:
                try:
                    return self._loan_block(byte_size)
                except ArenaFull:
                    if not self.in_flight:
                        raise
            self.wait_any()

    def _loan_block(self, byte_size: int) -> BlockLease:
        self._take_returns()
        return BlockLease(self._block_returns, self._blocks.allocate(byte_size), byte_size)

    def _take_returns(self) -> None:
        rows_returns, block_returns = self._rows_returns, self._block_returns
        while rows_returns:
            slab, first, rows = rows_returns.popleft()
            slab.release(first, rows)
            if not slab.live and self._retired.pop(slab.base, None) is not None:
                self._free_slab(slab)
        while block_returns:
            offset, byte_size = block_returns.popleft()
            self._blocks.free(offset, byte_size)
            if byte_size >= _DISCARD_BYTES and not self._is_closed:
                self.arena.discard(offset, byte_size)

    def _free_slab(self, slab: Slab[Pending]) -> None:
        self._slabs.pop(slab.base, None)
        self._blocks.free(slab.base, slab.layout.byte_size)

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena in use, slabs as a whole."""
        with self._lock:
            self._take_returns()
            return self._blocks.used_bytes

    # --- handing over ---

    def check_usable(self) -> None:
        """Raise what is wrong with this connection, if anything is."""
        if self.pid != os.getpid():
            raise WrongProcess(
                f"this connection belongs to process {self.pid}, which forked this one; call connect() here"
            )
        if self._failure is not None:
            raise EngineGone(self._failure.text)

    def submit_rows(self, pending: Pending) -> None:
        """Hand over a request whose rows are filled."""
        lease = pending.lease
        assert lease is not None
        self._make_way(pending.model)
        with self._lock:
            self.check_usable()
            pending.enqueue_ns = time.monotonic_ns()
            lease.slab.owners[lease.first] = pending
            self.in_flight += 1
            self._send_rows(pending, lease)

    def submit_parcel(self, pending: PendingParcel) -> None:
        """Hand over a request whose blocks are filled."""
        self._make_way(pending.model)
        with self._lock:
            self.check_usable()
            pending.enqueue_ns = time.monotonic_ns()
            self._parcels[pending.token] = pending
            self.in_flight += 1
            self._send_parcel(pending)

    def _make_way(self, model: Opened) -> None:
        """Wait until one more request may be in flight, and see what has come in the meantime."""
        if not model.grants and model.rings:
            # A grant follows the answer that earned it. Going to the scheduler without having seen it would end it.
            self.read_nowait()
        while self.in_flight >= self._outstanding_max:
            self.wait_any()
        self._submit_count += 1
        if not self._submit_count & _LOOK_MASK:
            self._look_at_door()

    def next_token(self) -> int:
        return next(self._tokens)

    def cancel(self, pending: Pending) -> None:
        """Nobody waits for the request any more; what it lives in comes back when the engine has let go of it."""
        with self._lock:
            if pending.is_done:
                return
            pending.is_cancelled = True
            if isinstance(pending, PendingParcel):
                header = HEADER.pack(SubmitKind.CANCEL, 0, 1, 0, self._epoch)
                self._send(header + TOKEN.pack(pending.token))
            elif pending.lease is not None:
                header = HEADER.pack(SubmitKind.CANCEL_RUNS, 0, 1, 0, self._epoch)
                self._send(header + CANCEL_RUN.pack(pending.route, pending.lease.first, pending.lease.slab.base))

    def _send_rows(self, pending: Pending, lease: RowsLease) -> None:
        model, slab = pending.model, lease.slab
        pending.route = model.route
        if model.grants and (grant := model.idle_grant()) is not None:
            message = HEADER.pack(Kind.RUNS, FLAG_GRANTED, 1, 0, grant.ticket) + RUN.pack(
                self.producer, 1, slab.base, slab.capacity, lease.first, lease.rows, pending.attempt, pending.enqueue_ns
            )
            if self._ring(grant, pending, message):
                return
        self._send(
            HEADER.pack(SubmitKind.RUNS, 0, 1, 0, self._epoch)
            + SUBMIT_RUN.pack(
                model.route,
                1,
                slab.base,
                slab.capacity,
                lease.first,
                lease.rows,
                pending.attempt,
                pending.priority,
                0,
                pending.timeout_us,
                pending.enqueue_ns,
            )
        )

    def _send_parcel(self, pending: PendingParcel) -> None:
        model, head = pending.model, pending.head
        pending.route = model.route
        if model.grants and (grant := model.idle_grant()) is not None:
            message = HEADER.pack(Kind.PARCELS, FLAG_GRANTED, 1, 0, grant.ticket) + PARCEL.pack(
                self.producer, pending.rows, pending.token, pending.enqueue_ns, len(head)
            )
            if self._ring(grant, pending, message + head):
                return
        correlation, number, flags = pending.sequence
        text = correlation.encode()
        self._send(
            HEADER.pack(SubmitKind.PARCEL, 0, 1, 0, self._epoch)
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

    def _ring(self, grant: Grant, pending: Pending, message: bytes) -> bool:
        """Hand a request to a worker directly; False if it does not take it."""
        try:
            grant.ring.send(message, socket.MSG_DONTWAIT)
        except OSError:
            # The worker is gone, or has thrown us out; whichever it is, the completion doorbell will say.
            self._drop_grant(grant)
            return False
        grant.outstanding = pending
        return True

    def _send(self, message: bytes) -> None:
        try:
            self._submissions.send(message)
        except BlockingIOError:
            self._send_patiently(message)
        except OSError as error:
            raise self._broken(f"the engine is gone: {error.strerror or error}") from None

    def _send_patiently(self, message: bytes) -> None:
        poll = select.poll()
        poll.register(self._submissions.fileno(), select.POLLOUT)
        give_up_s = time.monotonic() + _SUBMIT_PATIENCE_S
        while time.monotonic() < give_up_s:
            poll.poll(100)
            try:
                self._submissions.send(message)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._broken(f"the engine is gone: {error.strerror or error}") from None
            return
        raise self._broken(f"the scheduler has not read anything for {_SUBMIT_PATIENCE_S:g} s")

    # --- waiting ---

    def wait(self, pending: Pending, deadline_ns: int = 0) -> None:
        """Return when the request is done, or has a response that nobody has taken.

        Raises:
            DeadlineExceeded: the monotonic time ``deadline_ns`` has come first.
        """
        while not pending.has_news:
            if self._reader.acquire(blocking=False):
                try:
                    while not pending.has_news:
                        self._read(deadline_ns)
                finally:
                    self._reader.release()
                    self._wake_follower()
            else:
                self._follow(pending, deadline_ns)

    def wait_any(self) -> None:
        """Return when something has happened; there must be requests in flight."""
        if self._reader.acquire(blocking=False):
            try:
                self._read(0)
            finally:
                self._reader.release()
                self._wake_follower()
        else:
            time.sleep(_OTHER_READER_S)

    def read_nowait(self, limit: int = 64) -> None:
        """Take answers that have arrived; for event loops.

        Raises:
            EngineGone: the server is gone.
        """
        if not self._reader.acquire(blocking=False):
            return
        try:
            for _ in range(limit):
                try:
                    size = self._completions.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return
                self._take(size)
        finally:
            self._reader.release()
            self._wake_follower()

    def fileno(self) -> int:
        """Return the completion doorbell, for event loops."""
        return self._completions.fileno()

    def _follow(self, pending: Pending, deadline_ns: int) -> None:
        """Sleep until the thread that reads has our answer, or stops reading."""
        baton = threading.Lock()
        baton.acquire()
        with self._lock:
            if pending.has_news:
                return
            pending.waiter = baton.release
            self._followers.append(pending)
        if not self._reader.locked():
            # It stopped before it could see us: we may have to read ourselves.
            with self._lock:
                pending.waiter = None
            return
        timeout_s = max((deadline_ns - time.monotonic_ns()) / 1e9, 0.0) if deadline_ns else -1
        if not baton.acquire(timeout=timeout_s):
            with self._lock:
                pending.waiter = None
            if not pending.has_news:
                raise DeadlineExceeded(_DEADLINE_TEXT)

    def _wake_follower(self) -> None:
        """Let one of those that wait read on."""
        if self._followers:
            with self._lock:
                while self._followers:
                    pending = self._followers.popleft()
                    if pending.waiter is not None:
                        pending.wake()
                        return

    def _read(self, deadline_ns: int) -> None:
        """Wait for one message of the completion doorbell and act on it. The reader's lock is held."""
        if self._can_glance and self.in_flight == 1 and self._glance():
            return
        if deadline_ns:
            self._wait_readable(deadline_ns)
        while True:
            try:
                size = self._completions.recv_into(self._buffer, 0, self._receive_flags)
            except BlockingIOError:
                if deadline_ns and time.monotonic_ns() >= deadline_ns:
                    raise DeadlineExceeded(_DEADLINE_TEXT) from None
                continue
            except OSError as error:
                with self._lock:
                    raise self._broken(f"the engine is gone: {error.strerror or error}") from None
            self._take(size)
            return

    def _glance(self) -> bool:
        """Look for an answer for a moment before going to sleep; True if there was one."""
        if self._glance_misses < 0:
            self._glance_misses += 1
            return False
        receive, buffer = self._completions.recv_into, self._buffer
        end_ns = time.monotonic_ns() + _GLANCE_NS
        while time.monotonic_ns() < end_ns:
            try:
                size = receive(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return False  # Whoever reads in earnest says what it is.
            self._glance_misses = 0
            self._take(size)
            return True
        self._glance_misses += 1
        if self._glance_misses >= _GLANCE_MISSES:
            self._glance_misses = -_GLANCE_PAUSE
        return False

    def _wait_readable(self, deadline_ns: int) -> None:
        if self._spins:
            return
        poll = select.poll()
        poll.register(self._completions.fileno(), select.POLLIN)
        left_ms = (deadline_ns - time.monotonic_ns()) / 1e6
        if not poll.poll(max(left_ms, 0)):
            raise DeadlineExceeded(_DEADLINE_TEXT)

    # --- answers ---

    def _take(self, size: int) -> None:
        with self._lock:
            if size < HEADER.size:
                raise self._broken(
                    "the engine is gone: the server has ended, or has ended this connection because its answers were "
                    "not read"
                )
            message = self._buffer_view[:size]
            kind, flags, count, instance, batch = HEADER.unpack_from(message)
            try:
                self._act(kind, flags, count, instance, batch, message)
            except struct.error:
                raise self._broken("the engine sent a message that cannot be read") from None

    def _act(self, kind: int, flags: int, count: int, instance: int, batch: int, message: memoryview) -> None:
        if kind == Kind.RUNS_DONE:
            self._set_idle(instance)
            for index in range(count):
                _producer, _requests, base, _capacity, first, rows, _attempt, _sum_ns = RUN.unpack_from(
                    message, _TIMES_END + index * RUN.size
                )
                self._finish_rows(base, first, rows, None)
        elif kind == Kind.PARCEL_REPLY:
            self._parcel_reply(message, flags, instance)
        elif kind == Kind.RUNS_FAILED:
            self._runs_failed(message, flags, count, instance)
        elif kind == Kind.GRANT:
            self._granted(message, batch)
        elif kind == Kind.REVOKE:
            self._revoked(message, flags, batch)
        elif kind == Kind.RUNS_LOST:
            for run in unpack_runs(message, count, _TIMES_END):
                for pending in self._owners(run.base, run.first, run.rows):
                    self._retry(pending, flags)
        elif kind == Kind.PARCEL_LOST:
            for index in range(count):
                (token,) = TOKEN.unpack_from(message, _TIMES_END + index * TOKEN.size)
                if (parcel := self._parcels.get(token)) is not None:
                    self._retry(parcel, flags)
        elif kind == Kind.RESYNC:
            end = HEADER.size + count * TOKEN.size
            self._resync(batch, {token for (token,) in TOKEN.iter_unpack(message[HEADER.size : end])})

    def _owners(self, base: int, first: int, rows: int) -> list[Pending]:
        """Return the requests in flight that begin in these rows."""
        found = self._slabs.get(base)
        if found is None:
            return []
        return [pending for pending in found[1].owners[first : first + rows] if pending is not None]

    def _finish_rows(self, base: int, first: int, rows: int, error: ServingError | None) -> None:
        found = self._slabs.get(base)
        if found is None:
            return
        owners = found[1].owners
        for row, pending in enumerate(owners[first : first + rows], first):
            if pending is not None:
                owners[row] = None
                self.in_flight -= 1
                pending.finish(error)

    def _finish(self, pending: Pending, error: ServingError) -> None:
        """End a request without an answer of a worker."""
        if isinstance(pending, PendingParcel):
            if self._parcels.pop(pending.token, None) is None:
                return
        elif pending.lease is not None:
            pending.lease.slab.owners[pending.lease.first] = None
        self.in_flight -= 1
        pending.finish(error)

    def _runs_failed(self, message: memoryview, flags: int, count: int, instance: int) -> None:
        self._set_idle(instance)
        runs = unpack_runs(message, count, _TIMES_END)
        end = _TIMES_END + count * RUN.size
        error = from_wire(message[end], bytes(message[end + 1 :]).decode(errors="replace"))
        for run in runs:
            if flags & FLAG_MOVED:
                for pending in self._owners(run.base, run.first, run.rows):
                    self._follow_model(pending, error)
            else:
                self._finish_rows(run.base, run.first, run.rows, error)

    def _parcel_reply(self, message: memoryview, flags: int, instance: int) -> None:
        (token,) = TOKEN.unpack_from(message, _TIMES_END)
        pending = self._parcels.get(token)
        is_final = bool(flags & FLAG_FINAL)
        if is_final:
            self._set_idle(instance, token)
        if pending is None:
            return
        try:
            reply = self._decode_reply(message[_TIMES_END + TOKEN.size :])
            for place in reply.outputs:
                self.arena.check(place.offset, place.byte_size)
        except (msgspec.DecodeError, msgspec.ValidationError, Internal):
            reply, is_final = ReplyHead(code=Internal.code, text="the model's answer could not be read"), True
        if flags & FLAG_MOVED:
            self._follow_model(pending, from_wire(reply.code, reply.text))
        elif reply.needs_bytes:
            self._lend(pending, reply.needs_bytes, instance)
        else:
            self._note_response(pending, reply, is_final=is_final)

    def _note_response(self, pending: PendingParcel, reply: ReplyHead, *, is_final: bool) -> None:
        error = from_wire(reply.code, reply.text) if reply.text or reply.code else None
        is_response = reply.outputs or reply.inline or not pending.model.signature.is_decoupled
        if (error is None and is_response) or (error is not None and not is_final):
            # An answer lies in the block that was lent for it; the first one, else, in that of the request.
            held = (pending.lent.popleft(),) if pending.lent else tuple(pending.blocks)
            pending.responses.append((reply, held))
            pending.response_count += 1
        if is_final:
            del self._parcels[pending.token]
            self.in_flight -= 1
            pending.finish(error)
        else:
            pending.wake()

    def _lend(self, pending: PendingParcel, byte_size: int, instance: int) -> None:
        try:
            lease = self._loan_block(byte_size)
        except ArenaFull as error:
            offset, byte_size = 0, 0
            self._finish(pending, error)
        else:
            pending.lent.append(lease)
            pending.model.reply_guess_bytes = max(pending.model.reply_guess_bytes, min(byte_size, 1 << 20))
            offset = lease.offset
        header = HEADER.pack(SubmitKind.COLLECT, 0, 1, instance, self._epoch)
        self._send(header + GROW.pack(pending.token, offset, byte_size))

    # --- workers that died, models that moved, schedulers that were restarted ---

    def _retry(self, pending: Pending, flags: int) -> None:
        """The worker is gone: hand the request in once more, unless that would do harm."""
        name = pending.model.name
        if flags & FLAG_HUNG:
            text = f"the request ran longer than model '{name}' may (--worker-timeout-secs, or its parameter "
            self._finish(pending, WorkerDied(text + "worker_timeout_secs) and was ended"))
            return
        if isinstance(pending, PendingParcel) and pending.response_count:
            # Its first responses are with the caller already.
            text = f"an instance of model '{name}' ended unexpectedly before its last response"
            self._finish(pending, WorkerDied(text))
            return
        if pending.attempt >= ATTEMPTS_MAX:
            self._finish(
                pending,
                WorkerDied(
                    f"an instance of model '{name}' ended unexpectedly while it ran the request, "
                    "and so did the one that tried it again"
                ),
            )
            return
        pending.attempt += 1
        self._send_again(pending)

    def _send_again(self, pending: Pending) -> None:
        if pending.is_cancelled:
            self._finish(pending, Cancelled("request was cancelled"))
        elif isinstance(pending, PendingParcel):
            self._send_parcel(pending)
        elif pending.lease is not None:
            self._send_rows(pending, pending.lease)

    def _follow_model(self, pending: Pending, error: ServingError) -> None:
        """The server has loaded the model anew: hand in again, to the new route, what the old one did not take."""
        model = pending.model
        try:
            if model.route == pending.route:
                self._reopen(model, error)
            if model.edition != pending.edition:
                raise ModelChanged(f"model '{model.name}' was loaded anew with other inputs or outputs; open it again")
        except ServingError as reason:
            self._finish(pending, reason)
        else:
            self._send_again(pending)

    def _reopen(self, model: Opened, error: ServingError) -> None:
        found = self._door.open_model(model.name, model.wanted_version)
        if found.route == model.route:
            for ring in found.rings.values():
                ring.close()
            raise NotReady(error.text)
        for grant in model.grants[:]:
            self._drop_grant(grant)
        for slab in model.replace(found):
            if slab.live:
                self._retired[slab.base] = slab
            else:
                self._free_slab(slab)
        self._announce_rings(list(found.rings))

    def _resync(self, epoch: int, running: set[int]) -> None:
        """A new scheduler is up and every worker has finished what the old one had sent: hand in again what is left.

        Args:
            running: parcels that workers have run and not answered for good, which is no loss.
        """
        self._epoch = epoch
        for model in self._models.values():
            for grant in model.grants[:]:
                self._drop_grant(grant)
            self._announce_rings(list(model.rings))
        left: list[Pending] = [parcel for token, parcel in self._parcels.items() if token not in running]
        for _model, slab in self._slabs.values():
            left += [pending for pending in slab.owners if pending is not None]
        for pending in left:
            self._send_again(pending)

    # --- grants ---

    def _granted(self, message: memoryview, ticket: int) -> None:
        route, instance, _generation, _rows_max = GRANT.unpack_from(message, HEADER.size)
        for model in self._models.values():
            ring = model.rings.get(instance) if model.route == route else None
            if ring is not None:
                grant = Grant(model, instance, ticket, ring)
                self._grants[instance] = grant
                model.grants.append(grant)
                return

    def _revoked(self, message: memoryview, flags: int, ticket: int) -> None:
        _route, instance, _generation, _rows_max = GRANT.unpack_from(message, HEADER.size)
        grant = self._grants.get(instance)
        if grant is None or (not flags & FLAG_GONE and grant.ticket != ticket):
            return
        self._drop_grant(grant)
        pending, grant.outstanding = grant.outstanding, None
        if pending is None or pending.is_done:
            return
        if flags & FLAG_GONE:
            self._retry(pending, flags)
        else:
            # Everything that the worker ran was answered before this message: it has not run.
            self._send_again(pending)

    def _set_idle(self, instance: int, token: int = 0) -> None:
        grant = self._grants.get(instance)
        if grant is None:
            return
        running = grant.outstanding
        if not token or (isinstance(running, PendingParcel) and running.token == token):
            grant.outstanding = None

    def _drop_grant(self, grant: Grant) -> None:
        self._grants.pop(grant.instance, None)
        if grant in grant.model.grants:
            grant.model.grants.remove(grant)

    # --- the end ---

    def _broken(self, text: str) -> EngineGone:
        """Fail everything in flight, and every later call; return the error to raise. The lock is held."""
        if self._failure is None:
            self._failure = EngineGone(text)
            left: list[Pending] = list(self._parcels.values())
            for _model, slab in self._slabs.values():
                left += [pending for pending in slab.owners if pending is not None]
                slab.owners[:] = [None] * len(slab.owners)
            self._parcels.clear()
            self.in_flight = 0
            for pending in left:
                pending.finish(EngineGone(text))
        return EngineGone(self._failure.text)

    @property
    def is_broken(self) -> bool:
        return self._failure is not None

    def close(self) -> None:
        """Leave: the server takes everything back. Arrays that still look into the arena stay readable."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._broken("the connection was closed")
            with contextlib.suppress(OSError):
                # A thread that reads wakes up with end of file.
                self._completions.shutdown(socket.SHUT_RDWR)
            self._close_sockets()
            self.arena.close()
        _alive.discard(self)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's sockets."""
        self._close_sockets()

    def notify(self, pending: Pending, waiter: Callable[[], None]) -> bool:
        """Have ``waiter`` called once, by the thread that reads, with the books locked; False if there is news now."""
        with self._lock:
            if pending.has_news:
                return False
            pending.waiter = waiter
        return True

    @property
    def grant_count(self) -> int:
        """How many workers may be rung directly at the moment."""
        return len(self._grants)

    @property
    def is_crowded(self) -> bool:
        """True if submitting would have to wait for answers first."""
        return self.in_flight >= self._outstanding_max

    def _close_sockets(self) -> None:
        self._door.close()
        self._completions.close()
        self._submissions.close()
        for model in self._models.values():
            model.close_rings()


def _leave_to_parent() -> None:
    """In a forked child: the connection is the parent's, which must be able to end it. No locks: they may be held."""
    for connection in list(_alive):
        connection.abandon()


os.register_at_fork(after_in_child=_leave_to_parent)
