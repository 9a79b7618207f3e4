"""Doorbells: SEQPACKET socket pairs between processes, one struct per message, and who waits how.

Both ends are plain descriptors that the supervisor creates and hands out, so a doorbell outlives the process at either
end: what a dead worker had sent is still delivered, and a restarted scheduler takes over the same receiving end.
Measured beside ZeroMQ and eventfd in DESIGN; a message here needs no ring in shared memory that would have to be
trusted.
"""

from __future__ import annotations

import contextlib
import socket
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
    """A sending end that never blocks its owner: what the kernel does not take waits here, in order."""

    __slots__ = ("_backlog", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        """Take ownership of ``sock``."""
        sock.setblocking(False)
        self._sock = sock
        self._backlog: deque[bytes] = deque()

    @property
    def backlog_count(self) -> int:
        return len(self._backlog)

    def fileno(self) -> int:
        return self._sock.fileno()

    def ring(self, message: bytes) -> bool:
        """Send one message; False if the receiver is gone for good."""
        if self._backlog:
            self._backlog.append(message)
            return self.flush()
        try:
            self._sock.send(message)
        except BlockingIOError:
            self._backlog.append(message)
        except OSError:
            return False
        return True

    def flush(self) -> bool:
        """Send what waits, as far as the kernel takes it; False if the receiver is gone for good."""
        backlog = self._backlog
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
