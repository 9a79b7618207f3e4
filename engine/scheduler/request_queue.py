"""Who waits for one model version, in which order, and until when. Pure: no clock, no sockets.

An item is a run of equal requests (slab rows) or one parcel; a run is cut where a batch ends. Order: priority level
(1 first), then arrival; items whose timeout passed under the DELAY action come after the live ones of their level
(spec S-025..S-032, appendix B).

Differences from Triton, on purpose: a timeout ends waiting at its time and not when the batcher next looks (L-005);
``allow_timeout_override`` also works where the default timeout is 0, which means "none" (L-006); a client's deadline
ends waiting under any policy (L-007).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from forebay.engine.scheduler.waiting import Waiting, WaitingParcel, WaitingRun
from forebay.ipc.errors import QUEUE_FULL_TEXT, QueueFull
from forebay.ipc.messages import Cancel
from forebay.ipc.scheduler_messages import BatchingPolicy, QueuePolicy

#: Text of an expired request (spec S-026).
TIMEOUT_TEXT = "Request timeout expired"


class _Level:
    """The items of one priority level."""

    __slots__ = ("count", "delayed", "live", "next_end_ns", "policy")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.live: deque[Waiting] = deque()
        self.delayed: deque[Waiting] = deque()
        #: Requests in both.
        self.count = 0
        #: No item ends before; exact after each :meth:`expire`. 0: no item ever does.
        self.next_end_ns = 0

    def note_end(self, end_ns: int) -> None:
        if end_ns and (self.next_end_ns == 0 or end_ns < self.next_end_ns):
            self.next_end_ns = end_ns

    def expire(self, now_ns: int) -> list[Waiting]:
        """Remove and return what is rejected now; move what is only delayed."""
        rejected: list[Waiting] = []
        kept: deque[Waiting] = deque()
        late: list[Waiting] = []
        self.next_end_ns = 0
        for item in self.live:
            if item.deadline_ns and item.deadline_ns <= now_ns:
                rejected.append(item)
            elif not item.expiry_ns or item.expiry_ns > now_ns:
                kept.append(item)
                self.note_end(item.next_end_ns)
            elif self.policy.timeout_action == "DELAY":
                item.expiry_ns = 0
                late.append(item)
            else:
                rejected.append(item)
        self.live = kept
        if late or any(item.deadline_ns for item in self.delayed):
            rejected += [item for item in self.delayed if item.deadline_ns and item.deadline_ns <= now_ns]
            self.delayed = deque(item for item in self.delayed if not item.deadline_ns or item.deadline_ns > now_ns)
            self.delayed.extend(late)
            for item in self.delayed:
                self.note_end(item.deadline_ns)
        self.count -= sum(item.requests for item in rejected)
        return rejected


class RequestQueue:
    """The queue of one model version."""

    def __init__(self, batching: BatchingPolicy) -> None:
        self._batching = batching
        #: By priority, ascending.
        self._levels: dict[int, _Level] = {}
        #: Requests waiting.
        self.request_count = 0
        #: An item that may expire has come; most models never have one.
        self._has_ends = False

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
        room = self.room(item)
        if room < item.requests:
            if room > 0:
                self._push(level, item.split(room))
            raise QueueFull(QUEUE_FULL_TEXT)
        self._push(level, item)

    def room(self, item: Waiting) -> int:
        """Return how many of the item's requests its level's ``max_queue_size`` lets in."""
        level = self._level(item.priority)
        limit = level.policy.max_queue_size
        return min(item.requests, max(limit - level.count, 0)) if limit else item.requests

    def ahead_of(self, item: Waiting) -> Iterator[Waiting]:
        """Return what would run before an item that came now: its level and higher ones."""
        own = self._level(item.priority)
        for level in self._levels.values():
            yield from level.live
            yield from level.delayed
            if level is own:
                return

    @property
    def first(self) -> Waiting | None:
        """What is next."""
        return next(iter(self), None)

    def _push(self, level: _Level, item: Waiting) -> None:
        level.live.append(item)
        if item.expiry_ns or item.deadline_ns:
            self._has_ends = True
            level.note_end(item.next_end_ns)
        level.count += item.requests
        self.request_count += item.requests

    def expire(self, now_ns: int) -> list[Waiting]:
        """Apply timeouts and deadlines: return what is rejected, move what is only delayed behind the live ones."""
        rejected: list[Waiting] = []
        if not self._has_ends:
            return rejected
        for level in self._levels.values():
            if level.next_end_ns and level.next_end_ns <= now_ns:
                rejected += level.expire(now_ns)
        for item in rejected:
            self.request_count -= item.requests
        return rejected

    def next_expiry_ns(self) -> int:
        """Return when :meth:`expire` may next have something to do; 0: never. May be early, never late."""
        next_ns = 0
        if not self._has_ends:
            return next_ns
        for level in self._levels.values():
            if level.next_end_ns and level.count and (not next_ns or level.next_end_ns < next_ns):
                next_ns = level.next_end_ns
        return next_ns

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

    def put_back(self, items: Sequence[Waiting]) -> None:
        """Return items that were just taken to the head, in their order."""
        for item in reversed(items):
            level = self._level(item.priority)
            level.live.appendleft(item)
            level.note_end(item.next_end_ns)
            level.count += item.requests
            self.request_count += item.requests

    def remove_producer(self, producer: int) -> int:
        """Drop everything of a producer that is gone; return how many requests that were."""
        return sum(item.requests for item in self._remove(lambda item: item.producer == producer))

    def remove_tokens(self, producer: int, tokens: Collection[int]) -> list[WaitingParcel]:
        """Remove and return the parcels with these tokens."""
        removed = self._remove(
            lambda item: isinstance(item, WaitingParcel) and item.producer == producer and item.token in tokens
        )
        return [item for item in removed if isinstance(item, WaitingParcel)]

    def remove_rows(self, producer: int, base: int, firsts: Collection[int]) -> list[WaitingRun]:
        """Cut out and return the requests that begin at these rows of a slab; their neighbours stay where they are."""
        removed: list[WaitingRun] = []
        lowest, highest = min(firsts), max(firsts)
        for level in self._levels.values():
            for side in (level.live, level.delayed):
                kept: list[Waiting] = []
                before = len(removed)
                for item in side:
                    if (
                        isinstance(item, WaitingRun)
                        and item.producer == producer
                        and item.base == base
                        and item.first <= highest
                        and item.end > lowest
                    ):
                        cut_out(item, firsts, kept, removed)
                    else:
                        kept.append(item)
                if len(removed) > before:
                    side.clear()
                    side.extend(kept)
                    level.count -= sum(run.requests for run in removed[before:])
        for run in removed:
            self.request_count -= run.requests
        return removed

    def clear(self) -> list[Waiting]:
        """Remove and return everything."""
        return self._remove(lambda _item: True)

    def _remove(self, is_gone: Callable[[Waiting], bool]) -> list[Waiting]:
        removed: list[Waiting] = []
        for level in self._levels.values():
            for side in (level.live, level.delayed):
                gone = [item for item in side if is_gone(item)]
                if gone:
                    kept = [item for item in side if not is_gone(item)]
                    side.clear()
                    side.extend(kept)
                    level.count -= sum(item.requests for item in gone)
                    removed += gone
        for item in removed:
            self.request_count -= item.requests
        return removed


def part_cancelled(items: Iterable[Waiting], message: Cancel, route: int) -> tuple[list[Waiting], list[Waiting]]:
    """Divide what a route has taken out of its queue into what somebody waits for and what nobody does any more."""
    kept: list[Waiting] = []
    removed: list[Waiting] = []
    for item in items:
        if item.producer != message.producer:
            kept.append(item)
        elif isinstance(item, WaitingRun):
            runs: list[WaitingRun] = []
            rows = [rows for rows in message.rows if rows.route == route and rows.base == item.base]
            cut_out(item, frozenset(first for each in rows for first in each.firsts), kept, runs)
            removed += runs
        else:
            is_left = isinstance(item, WaitingParcel) and item.token in message.tokens
            (removed if is_left else kept).append(item)
    return kept, removed


def cut_out(run: WaitingRun, firsts: Collection[int], kept: list[Waiting], removed: list[WaitingRun]) -> None:
    """Divide a run: requests that begin at one of ``firsts`` go to ``removed``, those between them to ``kept``."""
    rows = run.rows_each
    inside = sorted(first for first in firsts if run.first <= first < run.end and (first - run.first) % rows == 0)
    for first in inside:
        ahead = (first - run.first) // rows
        if ahead:
            kept.append(run.split(ahead))
        removed.append(run.split(1))
    if run.requests:
        kept.append(run)
