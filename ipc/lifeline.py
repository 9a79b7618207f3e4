"""The lifeline: one socket pair between the supervisor and each child, for typed messages that carry descriptors.

End of file on it means that the other side is gone; a child then exits at once. Messages are length-prefixed on a
stream socket (a load command may be larger than a datagram)::

    length u32 | descriptor count u8 | MessagePack
"""

from __future__ import annotations

import array
import contextlib
import errno
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
#: What says that there is no room at the moment, for bytes or for descriptors on their way.
_BUSY = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
#: Seconds that a peer may leave a message unread before it counts as gone.
_SEND_SECS_MAX = 10.0


class PeerClosed(Internal):
    """The process at the other end is gone."""


class DescriptorsLost(PeerClosed):
    """This process had no room for descriptors that were sent to it: it cannot know any more what it was told."""


class Lifeline(Generic[Received]):
    """One end. ``receive`` returns messages of the union given at construction, with their descriptors."""

    def __init__(self, sock: socket.socket, union: object) -> None:
        """Take ownership of ``sock``; ``union`` is the type of what arrives here."""
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()
        self._received = bytearray()
        self._fds: deque[int] = deque()
        #: Some were sent that did not arrive.
        self._has_lost_fds = False

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message; the caller keeps ownership of ``fds``.

        Raises:
            PeerClosed: the other side is gone.
        """
        data = self._packed(message, fds)
        try:
            # The descriptors go with the first bytes, and never again.
            self._send_rest(data[self._send_some(data, fds) :])
        except OSError as error:
            raise PeerClosed(f"peer is gone: {error}") from None

    def send_nowait(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        """Send one message, and descriptors, unless the peer has so much unread that this would have to wait.

        Returns:
            whether it is sent; the caller keeps ownership of ``fds`` in any case.

        Raises:
            PeerClosed: the other side is gone.
        """
        data = self._packed(message, fds)
        try:
            # socket.send_fds takes flags, and ignores them.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = self.sock.sendmsg([data], rights, socket.MSG_DONTWAIT)
            self._send_rest(data[sent:])
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise PeerClosed(f"peer is gone: {error}") from None
        return True

    def _packed(self, message: Message, fds: tuple[int, ...]) -> memoryview:
        payload = self._encoder.encode(message)
        return memoryview(_PREFIX.pack(len(payload), len(fds)) + payload)

    def _send_rest(self, data: memoryview) -> None:
        while data:
            data = data[self._send_some(data, ()) :]

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
            data, ancillary, flags, _address = self.sock.recvmsg(
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
        if flags & socket.MSG_CTRUNC:
            self._has_lost_fds = True
        if not data:
            raise PeerClosed("peer closed its end")
        self._received += data

    def _take(self) -> tuple[Received, list[int]] | None:
        if len(self._received) < _PREFIX.size:
            return None
        length, fd_count = _PREFIX.unpack_from(self._received)
        end = _PREFIX.size + length
        if len(self._received) < end or (len(self._fds) < fd_count and not self._has_lost_fds):
            return None
        message = self._decoder.decode(bytes(memoryview(self._received)[_PREFIX.size : end]))
        del self._received[:end]
        if len(self._fds) < fd_count:
            # One read returns the descriptors of one message at most, so these are this one's.
            self._has_lost_fds = False
            self._close_fds()
            if not isinstance(message, Message) or not message.may_lose_descriptors:
                raise DescriptorsLost("no room for the descriptors of a message")
            return message, []
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
        self._close_fds()

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.popleft())
