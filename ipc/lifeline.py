"""The lifeline: one socket pair between the supervisor and each child, for typed messages that carry descriptors.

End of file on it means that the other side is gone; a child then exits at once. Messages are length-prefixed on a
stream socket (a load command may be larger than a datagram)::

    length u32 | descriptor count u8 | MessagePack
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections import deque
from typing import Generic, TypeVar

import msgspec

from forebay.ipc.errors import Internal
from forebay.ipc.messages import Message

Received = TypeVar("Received")

_PREFIX = struct.Struct("<IB")
#: Descriptors in one message at most.
_FDS_MAX = 8
_CHUNK_BYTES = 64 * 1024
#: Seconds that a peer may leave a message unread before it counts as gone.
_SEND_SECS_MAX = 10.0


class PeerClosed(Internal):
    """The process at the other end is gone."""


class Lifeline(Generic[Received]):
    """One end. ``receive`` returns messages of the union given at construction, with their descriptors."""

    def __init__(self, sock: socket.socket, union: object) -> None:
        """Take ownership of ``sock``; ``union`` is the type of what arrives here."""
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()
        self._received = bytearray()
        self._fds: deque[int] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message; the caller keeps ownership of ``fds``.

        Raises:
            PeerClosed: the other side is gone.
        """
        payload = self._encoder.encode(message)
        data = memoryview(_PREFIX.pack(len(payload), len(fds)) + payload)
        try:
            # The descriptors go with the first bytes, and never again.
            data = data[self._send_some(data, fds) :]
            while data:
                data = data[self._send_some(data, ()) :]
        except OSError as error:
            raise PeerClosed(f"peer is gone: {error}") from None

    def _send_some(self, data: memoryview, fds: tuple[int, ...]) -> int:
        """Send what the kernel takes, at least one byte."""
        while True:
            try:
                return socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
            except BlockingIOError:
                # A lifeline of an asyncio process is non-blocking; its messages are rare and its peers read promptly.
                poll = select.poll()
                poll.register(self.sock, select.POLLOUT)
                if not poll.poll(_SEND_SECS_MAX * 1000):
                    raise TimeoutError("it does not read its lifeline") from None

    def _read(self) -> None:
        try:
            data, ancillary, _flags, _address = self.sock.recvmsg(
                _CHUNK_BYTES, socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise
        except OSError as error:
            raise PeerClosed(f"peer is gone: {error}") from None
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            raise PeerClosed("peer closed its end")
        self._received += data

    def _take(self) -> tuple[Received, list[int]] | None:
        if len(self._received) < _PREFIX.size:
            return None
        length, fd_count = _PREFIX.unpack_from(self._received)
        end = _PREFIX.size + length
        if len(self._received) < end or len(self._fds) < fd_count:
            return None
        message = self._decoder.decode(bytes(memoryview(self._received)[_PREFIX.size : end]))
        del self._received[:end]
        return message, [self._fds.popleft() for _ in range(fd_count)]

    def receive(self) -> tuple[Received, list[int]]:
        """Wait for one message; the caller owns the descriptors that came with it.

        Raises:
            PeerClosed: the other side is gone.
            BlockingIOError: the socket is non-blocking and nothing complete is there.
        """
        while True:
            taken = self._take()
            if taken is not None:
                return taken
            self._read()

    def receive_nowait(self) -> list[tuple[Received, list[int]]]:
        """Return every complete message that has arrived; call when the socket is readable.

        Raises:
            PeerClosed: the other side is gone and everything it sent has been returned before.
        """
        messages: list[tuple[Received, list[int]]] = []
        self.sock.setblocking(False)
        try:
            self._read()
        except BlockingIOError:
            pass
        while (taken := self._take()) is not None:
            messages.append(taken)
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()
        while self._fds:
            os.close(self._fds.popleft())
