"""Answers of one execution that reach each frontend as one message: the cost is per batch, not per request (I-3)."""

from __future__ import annotations

from collections.abc import Sequence

from forebay.engine.worker.places import Producer, Producers
from forebay.ipc.wire import HEADER, MESSAGE_BYTES_MAX, REPLY, TIMES, Kind


class ReplyBatch:
    """Collects answers until :meth:`send`. Shared-memory clients take them one by one: they are not collected."""

    def __init__(self, producers: Producers, instance: int, times: Sequence[int]) -> None:
        """Begin with none.

        Args:
            times: of the execution: start, input end, output start, end, monotonic ns.
        """
        self._producers = producers
        self._instance = instance
        self._times = TIMES.pack(*times)
        self._packed: dict[int, list[bytes]] = {}

    def add(self, producer: Producer, token: int, flags: int, head: bytes) -> None:
        """Add one answer.

        Args:
            head: a ``ReplyHead``, encoded.
        """
        self._packed.setdefault(producer.id, []).append(REPLY.pack(token, flags, len(head)) + head)

    def send(self) -> None:
        """Send what was collected."""
        room = MESSAGE_BYTES_MAX - HEADER.size - len(self._times)
        with self._producers.lock:
            for producer, packed in self._packed.items():
                first = size = 0
                for index, reply in enumerate(packed):
                    if size + len(reply) > room:
                        self._ring(producer, packed[first:index])
                        first, size = index, 0
                    size += len(reply)
                self._ring(producer, packed[first:])
        self._packed = {}

    def _ring(self, producer: int, packed: Sequence[bytes]) -> None:
        if producer in self._producers:
            header = HEADER.pack(Kind.PARCEL_REPLIES, 0, len(packed), self._instance, 0)
            self._producers.get(producer).bell.ring(b"".join((header, self._times, *packed)))
