"""Which requests run together now: Triton's dynamic batcher over runs of requests. Pure: data in, data out.

The decision equals Triton's (appendix B of the specification, ``dynamic_batch_scheduler.cc``) for a queue of single
requests, but costs a step per run: where a preferred size falls inside a run is computed, not searched.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.scheduler_messages import BatchingPolicy


class Reason(enum.StrEnum):
    """Why a batch was closed, or is not closed yet; shown by ``explain``."""

    SINGLE = "single"
    """The model does not batch dynamically."""
    PREFERRED = "preferred size"
    FULL = "full"
    SHAPE = "shape change"
    RETRY = "retry"
    """Ran before on an instance that died; runs alone now."""
    MESSAGE = "message full"
    """More heads of requests do not fit into one message to a worker."""
    DELAY = "delay"
    IDLE = "instance idle"
    SLOTS = "slot utilization"
    """Direct sequence batching: enough of the slots have a request (spec S-065)."""
    OBJECTIVE = "objective"
    """A larger batch, or a later one, would miss the model's latency objective."""
    DEADLINE = "deadline"
    """A larger batch, or a later one, would be too late for a request with a timeout or deadline of its own."""
    LATE = "late"
    """The objective cannot be met, but nobody else could use the instance."""
    WAIT = "waiting"
    EMPTY = "empty"


class Decision(NamedTuple):
    """What to do with the head of the queue."""

    requests: int
    """How many of the first requests form the batch; 0: none yet."""
    reason: Reason
    wait_until_ns: int = 0
    """When to look again if nothing arrives; 0: only when something changes."""


#: An empty queue.
NOTHING = Decision(0, Reason.EMPTY)


class Batcher:
    """Chooses batches for one model version."""

    def __init__(self, policy: BatchingPolicy) -> None:
        self._dynamic = policy.dynamic and policy.max_batch_size > 0
        self._max = max(policy.max_batch_size, 1)
        self._preferred = sorted(size for size in policy.preferred_batch_sizes if size > 0) or [self._max]
        self._delay_ns = policy.max_queue_delay_us * 1000

    @property
    def can_be_granted(self) -> bool:
        """True if a lone request would run at once anyway, so that nobody is cheated by a grant."""
        return self._delay_ns == 0

    @property
    def grant_rows(self) -> int:
        """Rows up to which any set of requests is one batch for sure; 0: one request at a time."""
        return self._preferred[0] if self._dynamic else 0

    def decide(self, queue: Iterable[Waiting], now_ns: int) -> Decision:
        """Look at the queue for an idle instance.

        Args:
            queue: items in the order of :class:`RequestQueue`.
        """
        if not self._dynamic:
            for _ in queue:
                return Decision(1, Reason.SINGLE)
            return NOTHING
        max_size, max_preferred = self._max, self._preferred[-1]
        pending = requests = 0
        best = best_requests = 0
        oldest_ns = 0
        shape_key = 0
        kind: type[Waiting] = Waiting
        forced: Reason | None = None
        for item in queue:
            if item.attempt and not requests:
                # What ended a worker must not take its neighbours along when it is tried again.
                return Decision(1, Reason.RETRY)
            if not requests:
                oldest_ns = item.enqueue_ns
                shape_key = item.shape_key
                kind = type(item)
            elif item.attempt or item.shape_key != shape_key or type(item) is not kind:
                forced = Reason.SHAPE
            rows = item.rows_each
            if pending and best == 0 and pending + rows > max_preferred:
                best, best_requests = pending, requests
            if forced is not None:
                break
            fit = (max_size - pending) // rows
            if fit == 0 and not requests:
                fit = 1  # Larger than the limit cannot happen; if it does, it runs alone.
            taken = min(fit, item.requests)
            for size in reversed(self._preferred):
                inside, remainder = divmod(size - pending, rows)
                if remainder == 0 and 1 <= inside <= taken:
                    best, best_requests = size, requests + inside
                    break
            if best == 0:
                # The last prefix at or below the largest preferred size, if a further request would pass it. A batch
                # has at least one request, however large.
                below = max((max_preferred - pending) // rows, 0 if pending else 1)
                if 0 <= below < item.requests:
                    best, best_requests = pending + below * rows, requests + below
            if taken:
                oldest_ns = min(oldest_ns, item.enqueue_ns)
            pending += taken * rows
            requests += taken
            if taken < item.requests:
                forced = Reason.FULL
                break
        if not requests:
            return NOTHING
        aged = self._delay_ns != 0 and now_ns - oldest_ns >= self._delay_ns
        if best and not aged:
            return Decision(best_requests, Reason.PREFERRED if best in self._preferred else Reason.FULL)
        if forced is not None:
            return Decision(requests, forced)
        if pending >= max_preferred:
            return Decision(requests, Reason.FULL)
        if self._delay_ns == 0:
            return Decision(requests, Reason.IDLE)
        if aged:
            return Decision(requests, Reason.DELAY)
        return Decision(0, Reason.WAIT, oldest_ns + self._delay_ns)
