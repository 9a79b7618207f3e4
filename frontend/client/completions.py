"""The receiving side of a client: the completion doorbell, read by whichever thread waits.

Whoever waits for an answer and finds nobody reading reads, for everybody, until its own answer is there; then it wakes
one of the others to go on. So a client needs no thread of its own, and one that waits alone makes one system call per
answer.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from forebay.client.errors import DeadlineExceeded
from forebay.client.in_flight import InFlight
from forebay.client.pending import Pending
from forebay.ipc.wire import MESSAGE_BYTES_MAX

#: A client that parks looks for an answer for so long before it sleeps, as long as answers have been that quick: to
#: wake a process on an idle core takes longer than many a model (measured: 25 to 30 us of 75), ns. In turns with 50 us
#: and a pause of 512 answers (below), `bench.shm_latency` showed for alpha_model 54 and 53 us above the model's own p50
#: instead of 129 and 111; which of the two numbers did it was not looked into.
_GLANCE_NS = 120_000
#: After so many answers in a row that took longer, it goes to sleep at once ...
_GLANCE_MISSES = 8
#: ... for so many answers.
_GLANCE_PAUSE = 64
#: If between two looks so much time has passed, others want this core, and whoever keeps it busy is made to wait for
#: milliseconds (measured beside other load: p99 1.7 ms instead of 0.09), ns: it sleeps at once ...
_GLANCE_LOST_NS = 200_000
#: ... for so many answers.
_GLANCE_LOST_PAUSE = 64


def _python_glance(sock: socket.socket, buffer: bytearray, glance_ns: int, /) -> tuple[int, int]:
    """Do what ``glance_loop.c`` does, where the package was built without a C compiler."""
    receive, now_ns = sock.recv_into, time.monotonic_ns
    size, looked_ns = -1, now_ns()
    end_ns = looked_ns + glance_ns
    while True:
        try:
            size = receive(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:
            end_ns = 0
        last_ns, looked_ns = looked_ns, now_ns()
        if size >= 0 or looked_ns >= end_ns:
            return size, looked_ns - last_ns


try:
    from forebay.client.glance_loop import glance as _glance
except ImportError:
    _glance = _python_glance

#: How often to look whether the thread that reads has made room, s.
_OTHER_READER_S = 0.0002

#: How long who never sleeps looks before it looks up: that is when it sees a deadline, ns.
_SPIN_NS = 20_000

_DEADLINE_TEXT = "the deadline passed before the answer came"


class Completions:
    """The completion doorbell. Thread-safe."""

    def __init__(self, sock: socket.socket, lock: threading.Lock, in_flight: InFlight, *, spins: bool) -> None:
        """Take over ``sock``.

        Args:
            lock: guards the books, ``in_flight`` too.
            spins: wait without sleeping.
        """
        self._sock = sock
        self._lock = lock
        self._in_flight = in_flight
        self._receive_flags = socket.MSG_DONTWAIT if spins else 0
        self._spins = spins
        # With one core, whoever looks keeps the worker from running.
        self._can_glance = not spins and len(os.sched_getaffinity(0)) > 1
        #: Answers that were not there at a glance, in a row; below 0: so many answers without a glance.
        self._glance_misses = 0
        self._buffer = bytearray(MESSAGE_BYTES_MAX)
        self._buffer_view = memoryview(self._buffer)
        #: Held by the thread that reads.
        self._reader = threading.Lock()
        #: Requests that threads wait for while another one reads.
        self._followers: deque[Pending] = deque()

    def fileno(self) -> int:
        """Return the doorbell, for event loops."""
        return self._sock.fileno()

    def look_up_every(self, period_s: float) -> None:
        """Have the thread that reads look so often (every ``period_s`` < 1) whether its request was abandoned.

        Without, it sleeps until there is a message, and abandoning does not wake it.
        """
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, int(period_s * 1e6)))

    def shutdown(self) -> None:
        """Have a thread that reads wake up with end of file."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

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
                break
            self._follow(pending, deadline_ns)
        if pending.is_abandoned:
            # We may have been woken to read on; those that wait behind us must not sleep for ever.
            self._wake_follower()

    def wait_any(self) -> None:
        """Return when something has happened, or may have; there must be requests in flight."""
        if self._reader.acquire(blocking=False):
            try:
                self._read(0)
            finally:
                self._reader.release()
                self._wake_follower()
        else:
            time.sleep(_OTHER_READER_S)

    def read_nowait(self, limit: int = 64) -> None:
        """Take answers that have arrived.

        Raises:
            EngineGone: the server is gone.
        """
        if not self._reader.acquire(blocking=False):
            return
        try:
            for _ in range(limit):
                try:
                    size = self._sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return
                self._take(size)
        finally:
            self._reader.release()
            self._wake_follower()

    def notify(self, pending: Pending, waiter: Callable[[], None]) -> bool:
        """Have ``waiter`` called once, by the thread that reads, with the books locked; False if there is news now."""
        with self._lock:
            if pending.has_news:
                return False
            pending.waiter = waiter
        return True

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
                was_woken = pending.waiter is None
                pending.waiter = None
            if pending.has_news:
                return
            if was_woken:
                # Too late for us to read on, but those that wait behind us must not sleep for ever.
                self._wake_follower()
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
        """Wait for one message and have it acted on, or until it is time to look up. The reader's lock is held."""
        in_flight = self._in_flight
        if self._can_glance and in_flight.count == 1 and not in_flight.waits_for_our_core and self._glance():
            return
        if deadline_ns:
            self._wait_readable(deadline_ns)
        while True:
            if self._spins and self._spin():
                return
            try:
                size = self._sock.recv_into(self._buffer, 0, self._receive_flags)
            except BlockingIOError:
                if deadline_ns and time.monotonic_ns() >= deadline_ns:
                    raise DeadlineExceeded(_DEADLINE_TEXT) from None
                if not self._spins:
                    return
                continue
            except OSError as error:
                with self._lock:
                    raise self._in_flight.broken(f"the engine is gone: {error.strerror or error}") from None
            self._take(size)
            return

    def _take(self, size: int) -> None:
        with self._lock:
            self._in_flight.take(self._buffer_view[:size])

    def _spin(self) -> bool:
        """Look for an answer until it is time to look up; True if there was one."""
        size, _away_ns = _glance(self._sock, self._buffer, _SPIN_NS)
        if size < 0:
            return False
        self._take(size)
        return True

    def _glance(self) -> bool:
        """Look for an answer for a moment before going to sleep; True if there was one."""
        if self._glance_misses < 0:
            self._glance_misses += 1
            return False
        size, away_ns = _glance(self._sock, self._buffer, _GLANCE_NS)
        if size < 0:
            # Of a broken socket, whoever reads in earnest says what it is.
            self._missed(away_ns)
            return False
        self._glance_misses = -_GLANCE_LOST_PAUSE if away_ns > _GLANCE_LOST_NS else 0
        self._take(size)
        return True

    def _missed(self, away_ns: int) -> None:
        """A glance has found nothing; its last look took so long."""
        self._glance_misses += 1
        if away_ns > _GLANCE_LOST_NS:
            self._glance_misses = -_GLANCE_LOST_PAUSE
        elif self._glance_misses >= _GLANCE_MISSES:
            self._glance_misses = -_GLANCE_PAUSE

    def _wait_readable(self, deadline_ns: int) -> None:
        if self._spins:
            return
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        left_ms = (deadline_ns - time.monotonic_ns()) / 1e6
        if not poll.poll(max(left_ms, 0)):
            raise DeadlineExceeded(_DEADLINE_TEXT)
