"""The frontends and shared-memory clients as the scheduler sees them: whom to ring, and who does not listen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from forebay.engine.scheduler.batch_messages import pack_losses, pack_refusal
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.doorbell import Bell
from forebay.ipc.errors import ServingError
from forebay.ipc.scheduler_messages import ProducerUp


class Producer:
    """One producer. Owns the sending end of its doorbell."""

    __slots__ = ("arena_bytes", "bell", "id", "name", "trusted")

    def __init__(self, up: ProducerUp, bell: Bell) -> None:
        self.id = up.producer
        self.name = up.name
        self.arena_bytes = up.arena_bytes
        self.trusted = up.trusted
        self.bell = bell


class Producers:
    """All of them. What is said to one that is gone is dropped."""

    def __init__(self) -> None:
        self._by_id: dict[int, Producer] = {}
        #: Those with doorbell messages that the kernel did not take.
        self._lagging: set[int] = set()
        #: Told of a shared-memory client that left, or does not read its answers: nothing more of it is to be taken.
        self.on_deaf: Callable[[int], None] = _ignore

    def __contains__(self, producer: int) -> bool:
        return producer in self._by_id

    def __iter__(self) -> Iterator[Producer]:
        return iter(self._by_id.values())

    @property
    def has_lagging(self) -> bool:
        return bool(self._lagging)

    def add(self, producer: Producer) -> None:
        self._by_id[producer.id] = producer

    def remove(self, producer: int) -> None:
        gone = self._by_id.pop(producer, None)
        if gone is not None:
            gone.bell.close()
        self._lagging.discard(producer)

    def close(self) -> None:
        for producer in self._by_id.values():
            producer.bell.close()

    def get(self, producer: int) -> Producer | None:
        return self._by_id.get(producer)

    def ring(self, producer_id: int, message: bytes) -> None:
        """Send one message, in order with all others."""
        producer = self._by_id.get(producer_id)
        if producer is not None:
            if not producer.bell.ring(message) and not producer.trusted:
                self.on_deaf(producer_id)
            if producer.bell.backlog_count:
                self._lagging.add(producer_id)

    def refuse(self, item: Waiting, error: ServingError) -> None:
        """Answer what never ran."""
        self.ring(item.producer, pack_refusal(item, error))

    def tell_lost(self, instance: int, batch_id: int, items: Sequence[Waiting], *, is_hung: bool = False) -> None:
        """A worker died with these requests unanswered.

        Everything it had sent is ahead of this in the producers' doorbells (one queue), so what they still wait for
        when they read it is truly lost.
        """
        for producer, message in pack_losses(instance, batch_id, items, is_hung=is_hung):
            self.ring(producer, message)

    def flush_lagging(self) -> None:
        """Try again to send what a full doorbell did not take."""
        for producer_id in list(self._lagging):
            producer = self._by_id.get(producer_id)
            if producer is None or (producer.bell.flush() and not producer.bell.backlog_count):
                self._lagging.discard(producer_id)


def _ignore(_producer: int) -> None:
    """Nobody is told."""
