"""ZeroMQ sockets that carry the typed messages of :mod:`forebay.ipc.messages`. Only ``ipc://`` in a 0700 directory.

``SubmitSender``/``SubmitReceiver`` are the data path from producers to the scheduler (PUSH/PULL). The control path uses
``zmq.asyncio`` sockets in the supervisor and ``ControlClient`` in its clients.
"""

from __future__ import annotations

import os
from typing import Generic, TypeVar

import msgspec
import zmq

from forebay.ipc.messages import FrontendToScheduler, Message

#: Messages that may wait in one direction before the sender is told to refuse requests.
HIGH_WATER_MARK = 10_000

Received = TypeVar("Received")


def submit_address(runtime_directory: str) -> str:
    """Where the scheduler takes submissions."""
    return f"ipc://{os.path.join(runtime_directory, 'submit.sock')}"


def control_address(runtime_directory: str) -> str:
    """Where the supervisor takes control commands."""
    return f"ipc://{os.path.join(runtime_directory, 'control.sock')}"


class SubmitSender:
    """A producer's end of the submit socket; not thread-safe."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], runtime_directory: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._socket.connect(submit_address(runtime_directory))
        self._encode = msgspec.msgpack.Encoder().encode

    def send_nowait(self, message: Message) -> bool:
        """Queue one message; False if the scheduler has not read for so long that the queue is full."""
        try:
            self._socket.send(self._encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


class SubmitReceiver:
    """The scheduler's end of the submit socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], runtime_directory: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.bind(submit_address(runtime_directory))
        self._decoder: msgspec.msgpack.Decoder[FrontendToScheduler] = msgspec.msgpack.Decoder(FrontendToScheduler)

    def fileno(self) -> int:
        """Return the edge-triggered descriptor: after it signals, receive until nothing is left.

        Only then does it signal again, and it does for every message that comes later: a pipe whose reader found it
        empty wakes the reader. So nothing has to be looked for while it does not signal.
        """
        return int(self._socket.getsockopt(zmq.FD))

    def receive_nowait(self) -> FrontendToScheduler | None:
        """Return the next message, None if there is none.

        Raises:
            msgspec.DecodeError, msgspec.ValidationError: a peer sent something else; the message is consumed.
        """
        try:
            data = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self._decoder.decode(data)

    @property
    def has_more(self) -> bool:
        """Whether there is a message; after one was received this is cheaper than to find none."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def close(self) -> None:
        self._socket.close()


class TypedCodec(Generic[Received]):
    """Encode any message, decode one union."""

    def __init__(self, union: object) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(union)

    def encode(self, message: Message) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> Received:
        return self._decoder.decode(data)
