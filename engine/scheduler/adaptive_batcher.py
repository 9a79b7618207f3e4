"""Batches for a latency objective: as large as the oldest request's time allows, and no request that comes too late.

Each request has a time by which its answer is to be there: its own ``timeout``, else the model's objective, after its
arrival, or its client's deadline if that comes first. What a batch costs is learned for each instance
(:mod:`cost_model`), so that three questions have answers:

- *How large?* The first requests of the queue, as many as an instance can finish before the earliest of their times.
- *Now, or wait for more?* An idle instance waits as long as larger batches would leave it idle for half of its time
  at the present rate, more requests keep coming, and there is time left. Where the rate is low nothing waits.
- *Can it be done at all?* What would not be answered in time, given the queue ahead and the expected ends of the
  running batches, is refused when it arrives, or as soon as it is known.

Pure: data and times in, decisions out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from forebay.engine.scheduler.admission_plan import AdmissionPlan
from forebay.engine.scheduler.arrival_rate import ArrivalRate
from forebay.engine.scheduler.batcher import NOTHING, Decision, Reason
from forebay.engine.scheduler.cost_model import CostModel
from forebay.engine.scheduler.request_queue import RequestQueue
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.scheduler_messages import BatchingPolicy

#: The share of its time that an instance may be busy for batches to be large enough.
_BUSY_SHARE = 0.5

#: The share of its time that a request may wait for others. The rest is for its batch, and for what is not seen here.
_WAIT_SHARE = 0.25

#: So many rows must be expected within that time for waiting to be worth it.
_GAIN_ROWS = 2

#: The share of its time that a request needs before it is seen here, and after its batch: in frontends and sockets.
_WAY_SHARE = 0.1

#: After so many mean distances between arrivals without one, nobody else is expected.
_PATIENCE = 3.0

#: What the model costs may have changed if no batch has ended for so long, ns.
_STALE_NS = 100_000_000

#: How long a plan is believed while nothing happens but the passing of time, ns.
_PLAN_LIFE_NS = 1_000_000

#: Later than any time; the time of a request that waits for ever.
NEVER_NS = 1 << 62


class _Running:
    """A batch that an instance runs."""

    __slots__ = ("rows", "started_ns")

    def __init__(self, rows: int, started_ns: int) -> None:
        self.rows = rows
        self.started_ns = started_ns


class _Batch:
    """A batch that is being put together."""

    __slots__ = ("closed", "due_ns", "head", "is_own_time", "most", "requests", "rows")

    def __init__(self, head: Waiting, most: int) -> None:
        self.head = head
        #: Rows that it may have.
        self.most = most
        self.requests = self.rows = 0
        #: When the first of its requests is to be answered, and whether that request says so itself.
        self.due_ns = NEVER_NS
        self.is_own_time = False
        #: Why nobody else may join it.
        self.closed: Reason | None = None


class AdaptiveBatcher:
    """The policy of one model version."""

    def __init__(self, policy: BatchingPolicy) -> None:
        self._objective_ns = policy.objective_us * 1000
        self._max = max(policy.max_batch_size, 1)
        self._costs: dict[int, CostModel] = {}
        self._running: dict[int, _Running] = {}
        self._rate = ArrivalRate()
        #: When a batch ended last, so that what it cost was seen.
        self._observed_ns = 0
        self._has_levels = policy.priority_levels > 0
        #: Of what waits, for who comes next; None: to be made anew.
        self._plan: AdmissionPlan | None = None
        self._planned_ns = 0

    # --- what happens ---

    def add_instance(self, instance: int) -> None:
        self._costs.setdefault(instance, CostModel())
        self.forget_plan()

    def remove_instance(self, instance: int) -> None:
        self._costs.pop(instance, None)
        self._running.pop(instance, None)
        self.forget_plan()

    def arrived(self, rows: int, now_ns: int) -> None:
        """Rows were asked for, whether they will run or not."""
        self._rate.note(rows, now_ns)

    def started(self, instance: int, rows: int, now_ns: int) -> None:
        """An instance got a batch."""
        self._running[instance] = _Running(rows, now_ns)
        self.forget_plan()

    def ended(self, instance: int, now_ns: int) -> None:
        """Its batch is done."""
        batch = self._running.pop(instance, None)
        cost = self._costs.get(instance)
        if batch is not None and cost is not None:
            cost.observe(batch.rows, now_ns - batch.started_ns)
            self._observed_ns = now_ns
        self.forget_plan()

    # --- times ---

    def given_ns(self, item: Waiting) -> int:
        """Return how long an item's requests may take from their arrival to their answers.

        A timeout takes the objective's place, be it shorter or longer; a deadline can only take time away: clients set
        generous ones for the case that all else fails.
        """
        given_ns = item.timeout_us * 1000 or self._objective_ns
        if item.deadline_ns:
            given_ns = min(given_ns, max(item.deadline_ns - item.enqueue_ns, 1))
        return given_ns

    def has_own_time(self, item: Waiting) -> bool:
        """Tell whether it is an item's timeout or deadline, and not the objective, that says how long it may take."""
        return bool(item.timeout_us) or self.given_ns(item) < self._objective_ns

    def due_ns(self, item: Waiting) -> int:
        """Return when the batch of an item's requests is to be done; :data:`NEVER_NS`: whenever."""
        if item.attempt:
            return NEVER_NS  # It is late through no fault of its own.
        return item.enqueue_ns + int(self.given_ns(item) * (1 - _WAY_SHARE))

    @property
    def has_idle(self) -> bool:
        return len(self._running) < len(self._costs)

    def answer_ns(self, rows: int, now_ns: int) -> int:
        """Return when rows would be answered that were all that waits."""
        ends_ns = (self._free_ns(instance, now_ns) + cost.ceiling_ns(rows) for instance, cost in self._costs.items())
        return min(ends_ns, default=now_ns)

    def _free_ns(self, instance: int, now_ns: int) -> int:
        """Return when an instance is expected to be free; one that should have ended long ago: now."""
        batch = self._running.get(instance)
        if batch is None:
            return now_ns
        return max(now_ns, batch.started_ns + self._costs[instance].expected_ns(batch.rows))

    # --- who gets in, and who stays ---

    def admit(self, item: Waiting, ahead: RequestQueue, now_ns: int) -> tuple[int, int]:
        """Decide who of an item's requests is let in.

        What finds an idle instance that nobody else waits for is run in any case: see :meth:`is_hopeless`.

        Returns:
            How many of its requests would be answered in time, and when the next one would be, if not all.
        """
        if self.due_ns(item) == NEVER_NS or not self._costs:
            self.forget_plan()
            return item.requests, 0
        least = 1 if self._may_try(item, ahead.request_count, now_ns) else 0
        return self._plan_behind(item, ahead, now_ns).admit(item, least)

    def _plan_behind(self, item: Waiting, queue: RequestQueue, now_ns: int) -> AdmissionPlan:
        """Return the plan for all that will run before an item."""
        plan = self._plan
        if plan is None or now_ns - self._planned_ns > _PLAN_LIFE_NS:
            free_ns = {instance: self._free_ns(instance, now_ns) for instance in self._costs}
            plan = AdmissionPlan(
                self._costs, free_ns, self._max, self.due_ns, lambda cost: self._useful_rows(cost, now_ns)
            )
            plan.seat(queue.ahead_of(item))
            # Who comes next may come before some of these if there are priorities.
            self._plan = None if self._has_levels else plan
            self._planned_ns = now_ns
        return plan

    def forget_plan(self) -> None:
        """What waits has changed, but for what was let in."""
        self._plan = None

    def _useful_rows(self, cost: CostModel, now_ns: int) -> int:
        """Return how large a batch must be to keep up with what is asked for, if that goes into half of the objective.

        Then one such batch can run while the next one is waited for.
        """
        enough = self._enough_rows(cost, self._rate.at(now_ns))
        return max(min(enough, cost.rows_within(self._objective_ns // 2)), 1)

    def is_hopeless(self, item: Waiting, others: int, now_ns: int) -> bool:
        """Whether the first item of the queue, beside ``others``, cannot be answered in time, even by itself.

        If nobody else could use an idle instance it is tried all the same: an objective that is always missed is better
        than a model that never answers, and what is believed of the costs may be wrong.
        """
        due_ns = self.due_ns(item)
        if due_ns == NEVER_NS or self._may_try(item, others, now_ns):
            return False
        return self.answer_ns(item.rows_each, now_ns) > due_ns

    def _may_try(self, item: Waiting, others: int, now_ns: int) -> bool:
        if others or not self.has_idle:
            return False
        # A client that says when it stops waiting has no use for a late answer.
        return not self.has_own_time(item) or now_ns - self._observed_ns >= _STALE_NS

    def next_look_ns(self, first: Waiting | None) -> int:
        """Return when the first item may become hopeless by the passing of time; 0: never."""
        if first is None or not self._costs:
            return 0
        due_ns = self.due_ns(first)
        if due_ns == NEVER_NS:
            return 0
        return due_ns - min(cost.ceiling_ns(first.rows_each) for cost in self._costs.values()) + 1

    # --- batches ---

    def decide(self, queue: Iterable[Waiting], instance: int, now_ns: int) -> Decision:
        """Look at the queue for an idle instance; hopeless requests are out of it already.

        Args:
            queue: items in the order in which they run.
        """
        cost = self._costs.get(instance)
        items = iter(queue)
        head = next(items, None)
        if cost is None or head is None:
            return NOTHING
        if head.attempt:
            return Decision(1, Reason.RETRY)
        batch = _Batch(head, min(self._max, cost.trusted_rows))
        self._fill(batch, head, cost, now_ns)
        if not batch.requests:
            is_alone = head.requests == 1 and next(items, None) is None
            return self._decide_tight(head, cost, now_ns, is_alone=is_alone)
        while batch.closed is None and (item := next(items, None)) is not None:
            self._fill(batch, item, cost, now_ns)
        if batch.closed is None:
            until_ns, batch.closed = self._wait_until(cost, batch, now_ns)
            if until_ns > now_ns:
                return Decision(0, Reason.WAIT, until_ns)
        if batch.closed is Reason.OBJECTIVE and batch.is_own_time:
            batch.closed = Reason.DEADLINE
        return Decision(batch.requests, batch.closed)

    def _fill(self, batch: _Batch, item: Waiting, cost: CostModel, now_ns: int) -> None:
        """Add as many of an item's requests as there is time for, and close the batch if that is not all."""
        head = batch.head
        if item.attempt or item.shape_key != head.shape_key or type(item) is not type(head):
            batch.closed = Reason.SHAPE
            return
        due_ns = self.due_ns(item)
        limit = min(batch.most, cost.rows_within(min(batch.due_ns, due_ns) - now_ns))
        taken = min((limit - batch.rows) // item.rows_each, item.requests)
        if taken > 0:
            if due_ns < batch.due_ns:
                batch.due_ns, batch.is_own_time = due_ns, self.has_own_time(item)
            batch.requests += taken
            batch.rows += taken * item.rows_each
        if batch.rows >= batch.most or (taken < item.requests and batch.rows + item.rows_each > batch.most):
            batch.closed = Reason.FULL
        elif taken < item.requests:
            batch.closed = Reason.OBJECTIVE

    def _decide_tight(self, head: Waiting, cost: CostModel, now_ns: int, *, is_alone: bool) -> Decision:
        """Decide about a request that not even a batch of its own on this instance answers in time."""
        due_ns = self.due_ns(head)
        if head.rows_each > cost.trusted_rows and due_ns - now_ns >= cost.ceiling_ns(head.rows_each):
            return Decision(1, Reason.FULL)  # Larger than anything seen yet: there is only one way to learn.
        if self.answer_ns(head.rows_each, now_ns) <= due_ns:
            return Decision(0, Reason.WAIT)  # Another instance will be in time.
        if self._may_try(head, not is_alone, now_ns):
            return Decision(1, Reason.LATE)
        # It was not hopeless before an instance was taken by others a moment ago: look at it again.
        return Decision(0, Reason.WAIT, now_ns + 1)

    def _wait_until(self, cost: CostModel, batch: _Batch, now_ns: int) -> tuple[int, Reason]:
        """Return until when more requests are worth waiting for, and why no longer; not after ``now_ns``: not at all.

        Args:
            batch: all that waits.
        """
        rate = self._rate.at(now_ns)
        enough = self._enough_rows(cost, rate)
        if batch.rows >= enough or rate <= 0:
            return 0, Reason.IDLE
        wait_ns = int(self.given_ns(batch.head) * _WAIT_SHARE)
        latest_ns = min(batch.due_ns - cost.ceiling_ns(enough), batch.head.enqueue_ns + wait_ns)
        if rate * (latest_ns - batch.head.enqueue_ns) < _GAIN_ROWS:
            return 0, Reason.IDLE
        last_ns = self._rate.last_ns
        alone_ns = last_ns + int(_PATIENCE / self._rate.at(last_ns))
        return (latest_ns, Reason.OBJECTIVE) if latest_ns <= alone_ns else (alone_ns, Reason.IDLE)

    def _enough_rows(self, cost: CostModel, rate: float) -> int:
        """Return the smallest batch that keeps the instances busy for no more than their share of the time.

        Batches of n rows keep them busy for rate * (a + b / n) of it, all together.
        """
        most = min(self._max, cost.trusted_rows)
        spare = _BUSY_SHARE * len(self._costs) - rate * cost.row_ns
        return most if spare <= 0 else min(math.ceil(rate * cost.base_ns / spare), most)
