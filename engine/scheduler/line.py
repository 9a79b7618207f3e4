"""The line before a model version: who waits, and who is next when an instance is idle.

:class:`SharedLine` is the default scheduler and the dynamic batcher: any instance takes whatever is next. The sequence
batcher's line, where every sequence has its own instance, is in ``sequence_line.py``; that of models with a latency
objective in ``adaptive_line.py``. Pure: no clock, no sockets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from forebay.engine.scheduler.batch_messages import count_fitting
from forebay.engine.scheduler.batcher import NOTHING, Batcher, Decision, Reason
from forebay.engine.scheduler.request_queue import TIMEOUT_TEXT, RequestQueue
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.errors import Cancelled, ServingError, Unavailable
from forebay.ipc.scheduler_messages import BatchingPolicy
from forebay.ipc.wire import Slot

#: Text for a request whose client's deadline passed while it waited.
DEADLINE_TEXT = "request was cancelled: its deadline passed while it waited"


class Refusal(NamedTuple):
    """A request that will not run, and why."""

    item: Waiting
    error: ServingError


class Choice(NamedTuple):
    """What an idle instance is to run now; no items: nothing."""

    decision: Decision
    items: Sequence[Waiting] = ()
    slots: Sequence[Slot] = ()
    """Of a sequence model: one per item."""


NO_CHOICE = Choice(NOTHING)


class Line(Protocol):
    """Who waits for one model version."""

    #: True if what waits may suit one idle instance and not another.
    is_bound: bool

    @property
    def request_count(self) -> int:
        """Requests waiting."""
        ...

    @property
    def is_empty(self) -> bool:
        """True if nothing waits, and nothing that has run holds on to an instance's room."""
        ...

    def __iter__(self) -> Iterator[Waiting]:
        """Return what waits."""
        ...

    def append(self, item: Waiting, now_ns: int) -> None:
        """Add an item.

        Raises:
            ServingError: it is refused; ``item`` holds the part of it that is.
        """
        ...

    def choose(self, instance: int, now_ns: int) -> Choice:
        """Take out what an idle instance runs now."""
        ...

    def expire(self, now_ns: int) -> list[Refusal]:
        """Apply timeouts."""
        ...

    def next_expiry_ns(self) -> int:
        """Return when :meth:`expire` may next have something to do; 0: never."""
        ...

    def add_instance(self, instance: int) -> None: ...

    def remove_instance(self, instance: int, now_ns: int) -> list[Refusal]:
        """An instance is gone; return who cannot go on without it."""
        ...

    def answered(self, items: Iterable[Waiting], now_ns: int) -> None:
        """Requests that ran have their final answers, or are lost."""
        ...

    def remove_tokens(self, producer: int, tokens: Collection[int]) -> Sequence[Waiting]:
        """Remove and return parcels whose clients left, and what cannot go on without them."""
        ...

    def remove_rows(self, producer: int, base: int, firsts: Collection[int]) -> Sequence[Waiting]:
        """Remove and return requests in rows whose clients left."""
        ...

    def remove_producer(self, producer: int) -> Sequence[Waiting]:
        """Drop everything of a producer that is gone; return what others cannot go on with."""
        ...

    def clear(self) -> list[Waiting]:
        """Remove and return everything."""
        ...


def _why_expired(item: Waiting, now_ns: int) -> ServingError:
    if item.deadline_ns and item.deadline_ns <= now_ns:
        return Cancelled(DEADLINE_TEXT)
    return Unavailable(TIMEOUT_TEXT)


class QueueLine:
    """One queue for all instances; who runs when is the subclass's."""

    def __init__(self, batching: BatchingPolicy) -> None:
        self.queue = RequestQueue(batching)

    @property
    def request_count(self) -> int:
        return self.queue.request_count

    @property
    def is_empty(self) -> bool:
        return not self.queue.request_count

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self.queue)

    def _take(self, decision: Decision) -> Choice:
        """Take out what was decided, or as much of it as goes into one message to a worker."""
        if not decision.requests:
            return Choice(decision)
        items = self.queue.take(decision.requests)
        fitting = count_fitting(items)
        if fitting < len(items):
            self.queue.put_back(items[fitting:])
            items = items[:fitting]
            decision = Decision(sum(item.requests for item in items), Reason.MESSAGE)
        return Choice(decision, items)

    def expire(self, now_ns: int) -> list[Refusal]:
        expired = self.queue.expire(now_ns)
        return [Refusal(item, _why_expired(item, now_ns)) for item in expired] if expired else []

    def next_expiry_ns(self) -> int:
        return self.queue.next_expiry_ns()

    def add_instance(self, instance: int) -> None:
        pass

    def remove_instance(self, instance: int, now_ns: int) -> list[Refusal]:
        return []

    def answered(self, items: Iterable[Waiting], now_ns: int) -> None:
        pass

    def remove_tokens(self, producer: int, tokens: Collection[int]) -> Sequence[Waiting]:
        return self.queue.remove_tokens(producer, tokens)

    def remove_rows(self, producer: int, base: int, firsts: Collection[int]) -> Sequence[Waiting]:
        return self.queue.remove_rows(producer, base, firsts)

    def remove_producer(self, producer: int) -> Sequence[Waiting]:
        self.queue.remove_producer(producer)
        return ()

    def clear(self) -> list[Waiting]:
        return self.queue.clear()


class SharedLine(QueueLine):
    """Any instance takes whatever is next, in batches as the configuration asks for."""

    is_bound = False

    def __init__(self, batching: BatchingPolicy) -> None:
        super().__init__(batching)
        self.batcher = Batcher(batching)

    def append(self, item: Waiting, now_ns: int) -> None:
        self.queue.append(item)

    def choose(self, instance: int, now_ns: int) -> Choice:
        return self._take(self.batcher.decide(self.queue, now_ns))
