"""Doorbells: SEQPACKET socket pairs between processes, one struct per message, and who waits how.

Both ends are plain descriptors that the supervisor creates and hands out, so a doorbell outlives the process at either
end: what a dead worker had sent is still delivered, and a restarted scheduler takes over the same receiving end.
Measured beside ZeroMQ and eventfd in DESIGN; a message here needs no ring in shared memory that would have to be
trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque

#: Kernel buffer asked for per doorbell; limits how many messages may wait unread.
BUFFER_BYTES = 4 * 1024 * 1024

_SO_SNDBUFFORCE = 32


def create_doorbell() -> tuple[socket.socket, socket.socket]:
    """Return (sending end, receiving end)."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sender.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER_BYTES)
    except OSError:
        # Without CAP_NET_ADMIN the kernel clamps to net.core.wmem_max; still some hundred messages.
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return sender, receiver


class Bell:
    """A sending end that never blocks its owner: what the kernel does not take waits here, in order.

    Somebody has to flush it then: who reads may have read everything else before, and sleep.
    """

    __slots__ = ("_sock", "backlog", "fileno")

    def __init__(self, sock: socket.socket) -> None:
        """Take ownership of ``sock``."""
        sock.setblocking(False)
        self._sock = sock
        #: What waits, in order; the same object for life.
        self.backlog: deque[bytes] = deque()
        #: Returns the descriptor. The socket's own method: workers ask for it with every batch.
        self.fileno = sock.fileno

    @property
    def backlog_count(self) -> int:
        return len(self.backlog)

    def ring(self, message: bytes) -> bool:
        """Send one message; False if the receiver is gone for good."""
        if self.backlog:
            self.backlog.append(message)
            return self.flush()
        try:
            self._sock.send(message)
        except BlockingIOError:
            self.backlog.append(message)
            self._lag()
        except OSError:
            return False
        return True

    def _lag(self) -> None:
        """The first message waits here."""

    def flush(self) -> bool:
        """Send what waits, as far as the kernel takes it; False if the receiver is gone for good."""
        backlog = self.backlog
        try:
            while backlog:
                self._sock.send(backlog[0])
                backlog.popleft()
        except BlockingIOError:
            pass
        except OSError:
            backlog.clear()
            return False
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()


class WatchedBell(Bell):
    """One that is among those that lag as long as it does."""

    __slots__ = ("_lagging",)

    def __init__(self, sock: socket.socket, lagging: set[Bell]) -> None:
        """Take ownership of ``sock``."""
        super().__init__(sock)
        self._lagging = lagging

    def _lag(self) -> None:
        self._lagging.add(self)


def flush_lagging(lagging: set[Bell]) -> None:
    """Try again what these did not get rid of; those that did, or whose receivers are gone, leave the set."""
    for bell in tuple(lagging):
        bell.flush()
        if not bell.backlog_count:
            lagging.remove(bell)


#: How long an event loop waits before it tries a full doorbell again, s.
RETRY_S = 0.01


class LoopBell(Bell):
    """One that is rung in an event loop, which tries again by itself."""

    __slots__ = ()

    def _lag(self) -> None:
        asyncio.get_running_loop().call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self.flush()
        if self.backlog:
            self._lag()


#: How long a shared-memory client may leave its completion doorbell full, s.
CLIENT_PATIENCE_S = 0.25
#: Messages that wait for such a client at most.
CLIENT_BACKLOG_MAX = 1024


class ClientBell(Bell):
    """A sending end to a client that nobody waits for: one that does not read is cut off, from all senders at once.

    Without an end to patience, a stopped client would hold messages in every process that answers it (I-6).
    """

    __slots__ = ("_full_since_s", "_is_cut_off")

    def __init__(self, sock: socket.socket) -> None:
        """Take ownership of ``sock``."""
        super().__init__(sock)
        self._full_since_s = 0.0
        self._is_cut_off = False

    def ring(self, message: bytes) -> bool:
        return not self._is_cut_off and super().ring(message) and self._is_read()

    def flush(self) -> bool:
        waiting = len(self.backlog)
        if self._is_cut_off or not super().flush():
            return False
        if len(self.backlog) < waiting:
            self._full_since_s = 0.0
        return self._is_read()

    def _is_read(self) -> bool:
        if not self.backlog:
            self._full_since_s = 0.0
            return True
        now_s = time.monotonic()
        self._full_since_s = self._full_since_s or now_s
        if len(self.backlog) <= CLIENT_BACKLOG_MAX and now_s - self._full_since_s <= CLIENT_PATIENCE_S:
            return True
        self._is_cut_off = True
        self.backlog.clear()
        with contextlib.suppress(OSError):
            # Every sender has a duplicate of this one socket: the client reads what is there, then end of file.
            self._sock.shutdown(socket.SHUT_WR)
        return False
