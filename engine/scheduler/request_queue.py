"""Who waits for one model version, in which order, and until when. Pure: no clock, no sockets.

An item is a run of equal requests (slab rows) or one parcel; a run is cut where a batch ends. Order: priority level
(1 first), then arrival; items whose timeout passed under the DELAY action come after the live ones of their level
(spec S-025..S-032, appendix B).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator

from forebay.ipc.errors import QueueFull
from forebay.ipc.messages import BatchingPolicy, QueuePolicy

#: Text of a refused request (spec S-025).
QUEUE_FULL_TEXT = "Exceeds maximum queue size"
#: Text of an expired request (spec S-026).
TIMEOUT_TEXT = "Request timeout expired"


class Waiting:
    """Something in the queue: ``requests`` equal requests of ``rows_each`` rows that arrived together."""

    __slots__ = (
        "attempt",
        "enqueue_ns",
        "expiry_ns",
        "priority",
        "producer",
        "requests",
        "rows_each",
        "shape_key",
        "timeout_us",
    )

    def __init__(
        self,
        producer: int,
        requests: int,
        rows_each: int,
        enqueue_ns: int,
        *,
        attempt: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
        shape_key: int = 0,
    ) -> None:
        self.producer = producer
        self.requests = requests
        #: Batch items of each request, at least 1.
        self.rows_each = rows_each
        self.enqueue_ns = enqueue_ns
        self.attempt = attempt
        self.priority = priority
        self.timeout_us = timeout_us
        #: Items of different keys never share a batch.
        self.shape_key = shape_key
        #: When the queue policy gives up on it; 0: never.
        self.expiry_ns = 0

    def split(self, requests: int) -> Waiting:
        """Take the first ``requests`` out of this item and return them as one of their own."""
        raise NotImplementedError


class WaitingRun(Waiting):
    """Requests in consecutive slab rows."""

    __slots__ = ("base", "capacity", "first")

    def __init__(
        self,
        producer: int,
        base: int,
        capacity: int,
        first: int,
        requests: int,
        rows_each: int,
        enqueue_ns: int,
        *,
        attempt: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
    ) -> None:
        super().__init__(
            producer, requests, rows_each, enqueue_ns, attempt=attempt, priority=priority, timeout_us=timeout_us
        )
        self.base = base
        self.capacity = capacity
        self.first = first

    def split(self, requests: int) -> WaitingRun:
        head = WaitingRun(
            self.producer,
            self.base,
            self.capacity,
            self.first,
            requests,
            self.rows_each,
            self.enqueue_ns,
            attempt=self.attempt,
            priority=self.priority,
            timeout_us=self.timeout_us,
        )
        head.expiry_ns = self.expiry_ns
        self.first += requests * self.rows_each
        self.requests -= requests
        return head


class WaitingParcel(Waiting):
    """One request outside a slab."""

    __slots__ = ("head", "token")

    def __init__(
        self,
        producer: int,
        token: int,
        rows: int,
        enqueue_ns: int,
        head: bytes,
        *,
        attempt: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
        shape_key: int = 0,
    ) -> None:
        super().__init__(
            producer,
            1,
            max(rows, 1),
            enqueue_ns,
            attempt=attempt,
            priority=priority,
            timeout_us=timeout_us,
            shape_key=shape_key,
        )
        self.token = token
        self.head = head

    def split(self, requests: int) -> WaitingParcel:
        raise AssertionError("a parcel is one request")


class _Level:
    __slots__ = ("count", "delayed", "live", "policy")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.live: deque[Waiting] = deque()
        self.delayed: deque[Waiting] = deque()
        #: Requests in both.
        self.count = 0


class RequestQueue:
    """The queue of one model version."""

    def __init__(self, batching: BatchingPolicy) -> None:
        self._batching = batching
        self._levels: dict[int, _Level] = {}
        self._has_timeouts = False
        #: Requests waiting.
        self.request_count = 0

    def _level(self, priority: int) -> _Level:
        batching = self._batching
        if batching.priority_levels:
            if not 1 <= priority <= batching.priority_levels:
                priority = batching.default_priority_level
        else:
            priority = 0
        level = self._levels.get(priority)
        if level is None:
            policy = batching.priority_queue_policy.get(priority, batching.default_queue_policy)
            self._levels[priority] = level = _Level(policy)
            self._levels = dict(sorted(self._levels.items()))
        return level

    def append(self, item: Waiting) -> None:
        """Queue an item.

        Raises:
            QueueFull: at the level's ``max_queue_size``. Those that fit have been queued; ``item`` holds the rest.
        """
        level = self._level(item.priority)
        policy = level.policy
        timeout_us = policy.default_timeout_us
        if policy.allow_timeout_override and item.timeout_us > 0 and (timeout_us == 0 or item.timeout_us < timeout_us):
            timeout_us = item.timeout_us
        if timeout_us:
            item.expiry_ns = item.enqueue_ns + timeout_us * 1000
            self._has_timeouts = True
        if policy.max_queue_size:
            room = policy.max_queue_size - level.count
            if room < item.requests:
                if room > 0:
                    self._push(level, item.split(room))
                raise QueueFull(QUEUE_FULL_TEXT)
        self._push(level, item)

    def _push(self, level: _Level, item: Waiting) -> None:
        level.live.append(item)
        level.count += item.requests
        self.request_count += item.requests

    def expire(self, now_ns: int) -> list[Waiting]:
        """Apply timeouts: return what is rejected, and move what is only delayed behind the live ones."""
        if not self._has_timeouts:
            return []
        rejected: list[Waiting] = []
        for level in self._levels.values():
            if not any(item.expiry_ns and item.expiry_ns <= now_ns for item in level.live):
                continue
            kept: deque[Waiting] = deque()
            for item in level.live:
                if not item.expiry_ns or item.expiry_ns > now_ns:
                    kept.append(item)
                elif level.policy.timeout_action == "DELAY":
                    item.expiry_ns = 0
                    level.delayed.append(item)
                else:
                    rejected.append(item)
                    level.count -= item.requests
                    self.request_count -= item.requests
            level.live = kept
        return rejected

    def next_expiry_ns(self) -> int:
        """Return when :meth:`expire` has something to do next; 0: never."""
        if not self._has_timeouts:
            return 0
        expiries = [item.expiry_ns for level in self._levels.values() for item in level.live if item.expiry_ns]
        self._has_timeouts = bool(expiries)
        return min(expiries, default=0)

    def __iter__(self) -> Iterator[Waiting]:
        for level in self._levels.values():
            yield from level.live
            yield from level.delayed

    def take(self, requests: int) -> list[Waiting]:
        """Remove and return the first ``requests`` requests; the last item may be cut."""
        taken: list[Waiting] = []
        for level in self._levels.values():
            for side in (level.live, level.delayed):
                while requests and side:
                    item = side[0]
                    if item.requests <= requests:
                        side.popleft()
                    else:
                        item = item.split(requests)
                    requests -= item.requests
                    level.count -= item.requests
                    self.request_count -= item.requests
                    taken.append(item)
        return taken

    def remove_producer(self, producer: int) -> int:
        """Drop everything of a producer that is gone; return how many requests that were."""
        return len(self._filter(lambda item: item.producer != producer))

    def remove_tokens(self, producer: int, tokens: frozenset[int]) -> list[Waiting]:
        """Remove and return the parcels with these tokens."""
        return self._filter(
            lambda item: not (isinstance(item, WaitingParcel) and item.producer == producer and item.token in tokens)
        )

    def clear(self) -> list[Waiting]:
        """Remove and return everything."""
        return self._filter(lambda _item: False)

    def _filter(self, keep: Callable[[Waiting], bool]) -> list[Waiting]:
        removed: list[Waiting] = []
        for level in self._levels.values():
            for name in ("live", "delayed"):
                side: deque[Waiting] = getattr(level, name)
                kept = deque(item for item in side if keep(item))
                if len(kept) != len(side):
                    removed.extend(item for item in side if not keep(item))
                    setattr(level, name, kept)
        for item in removed:
            self.request_count -= item.requests
        for level in self._levels.values():
            level.count = sum(item.requests for item in itertools.chain(level.live, level.delayed))
        return removed
