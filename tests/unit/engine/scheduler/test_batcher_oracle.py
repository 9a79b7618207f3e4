"""Our batcher beside a literal transcription of Triton's (spec appendix B), under random load.

Triton's loop, with the two things left out that we do differently on purpose: it may form a second batch for a busy
instance (S-020) and let a formed batch grow until it starts (S-021). We form a batch only when an instance is idle, so
Triton's ``payload`` is always empty when a batch is chosen, as it is in Triton for a model with one free slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from queues import parcel, run

from forebay.engine.scheduler.batcher import Batcher
from forebay.engine.scheduler.request_queue import RequestQueue
from forebay.engine.scheduler.waiting import WaitingParcel, WaitingRun
from forebay.ipc.scheduler_messages import BatchingPolicy


class Arrival(NamedTuple):
    at_ns: int
    rows: int
    shape: int
    priority: int


class Batch(NamedTuple):
    at_ns: int
    numbers: list[int]


class LiteralBatcher:
    """``get_batch`` of appendix B, line by line, over single requests."""

    def __init__(self, policy: BatchingPolicy) -> None:
        self._policy = policy
        self._preferred = set(policy.preferred_batch_sizes)
        self._max_preferred = max(policy.preferred_batch_sizes)
        self._queue: list[tuple[int, Arrival]] = []
        self._cursor = 0
        self._pending = 0

    def enqueue(self, number: int, arrival: Arrival) -> None:
        at = len(self._queue)
        if self._policy.priority_levels:
            # std::map by level, lowest number first; a higher-priority arrival invalidates the cursor.
            while at and self._queue[at - 1][1].priority > arrival.priority:
                at -= 1
            if at < self._cursor:
                self._cursor = self._pending = 0
        self._queue.insert(at, (number, arrival))

    def get_batch(self, now_ns: int) -> tuple[list[int], int]:
        """Return the requests of the batch, and when to look again (0: only on an event)."""
        delay_ns = self._policy.max_queue_delay_us * 1000
        best = mark = 0
        send_now = False
        for _number, request in self._queue[self._cursor :]:
            b = request.rows
            if self._pending:
                if self._pending + b > self._max_preferred and best == 0:
                    best, mark = self._pending, self._cursor
                if self._pending + b > self._policy.max_batch_size:
                    send_now = True
                    break
                if request.shape != self._queue[0][1].shape:
                    send_now = True
                    break
            self._pending += b
            self._cursor += 1
            if self._pending in self._preferred:
                best, mark = self._pending, self._cursor
        if not self._pending:
            return [], 0
        oldest_ns = min(request.at_ns for _number, request in self._queue[: self._cursor])
        age_ns = now_ns - oldest_ns
        if best and not (delay_ns != 0 and age_ns >= delay_ns):
            return self._send(mark), 0
        if send_now or self._pending >= self._max_preferred:
            return self._send(self._cursor), 0
        if delay_ns == 0 or age_ns >= delay_ns:
            return self._send(self._cursor), 0
        return [], oldest_ns + delay_ns

    def _send(self, count: int) -> list[int]:
        sent, self._queue = self._queue[:count], self._queue[count:]
        self._cursor = self._pending = 0
        return [number for number, _request in sent]


class OurBatcher:
    """Queue and batcher of the scheduler; arrivals of one moment come as runs where they can."""

    def __init__(self, policy: BatchingPolicy, *, as_runs: bool) -> None:
        self._queue = RequestQueue(policy)
        self._batcher = Batcher(policy)
        self._as_runs = as_runs
        self._sizes: dict[int, int] = {}
        self._last: WaitingRun | None = None

    def enqueue(self, number: int, arrival: Arrival) -> None:
        at_ns, rows, shape, priority = arrival
        if not self._as_runs:
            self._queue.append(parcel(number, rows, at_ns, shape=shape, priority=priority))
            return
        # Ten rows apart, so that a run's requests can be told from its first row.
        item = run(number * rows, 1, rows, at_ns, base=4096 * rows, priority=priority, capacity=1 << 20)
        self._queue.append(item)

    def get_batch(self, now_ns: int) -> tuple[list[int], int]:
        decision = self._batcher.decide(self._queue, now_ns)
        numbers: list[int] = []
        for item in self._queue.take(decision.requests):
            if isinstance(item, WaitingParcel):
                numbers.append(item.token)
            else:
                assert isinstance(item, WaitingRun)
                first = item.first // item.rows_each
                numbers.extend(range(first, first + item.requests))
        return numbers, decision.wait_until_ns


def simulate(
    batcher: LiteralBatcher | OurBatcher, arrivals: Sequence[Arrival], durations_ns: Sequence[int], instances: int
) -> list[Batch]:
    """Feed arrivals; run batches on instances that take ``durations_ns`` in turn; return the batches."""
    batches: list[Batch] = []
    idle = instances
    events: list[tuple[int, int, int]] = [(arrival.at_ns, 0, number) for number, arrival in enumerate(arrivals)]
    heapq.heapify(events)
    while events:
        now_ns = events[0][0]
        while events and events[0][0] == now_ns:
            _at_ns, kind, number = heapq.heappop(events)
            if kind == 0:
                batcher.enqueue(number, arrivals[number])
            elif kind == 1:
                idle += 1
        while idle:
            numbers, wait_until_ns = batcher.get_batch(now_ns)
            if not numbers:
                if wait_until_ns:
                    heapq.heappush(events, (wait_until_ns, 2, 0))
                break
            heapq.heappush(events, (now_ns + durations_ns[len(batches) % len(durations_ns)], 1, 0))
            batches.append(Batch(now_ns, numbers))
            idle -= 1
    return batches


@st.composite
def policies(draw: st.DrawFn) -> BatchingPolicy:
    max_size = draw(st.integers(1, 12))
    preferred = draw(st.sets(st.integers(1, max_size), max_size=3)) or {max_size}
    return BatchingPolicy(
        max_batch_size=max_size,
        dynamic=True,
        preferred_batch_sizes=tuple(sorted(preferred)),
        max_queue_delay_us=draw(st.sampled_from([0, 0, 1, 3, 10])),
        priority_levels=draw(st.sampled_from([0, 0, 3])),
        default_priority_level=1,
    )


@st.composite
def loads(draw: st.DrawFn, policy: BatchingPolicy) -> list[Arrival]:
    # Ticks of one microsecond, the unit of the delay, so that everything coincides often.
    at_ns = 0
    arrivals: list[Arrival] = []
    for _ in range(draw(st.integers(1, 40))):
        at_ns += 1000 * draw(st.sampled_from([0, 0, 0, 1, 2, 7]))
        rows = draw(st.integers(1, policy.max_batch_size))
        shape = draw(st.sampled_from([0, 0, 0, 0, 1]))
        priority = draw(st.integers(1, 3)) if policy.priority_levels else 0
        arrivals.append(Arrival(at_ns, rows, shape, priority))
    return arrivals


durations = st.lists(st.sampled_from([1000, 2000, 5000, 20_000]), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(st.data(), policies(), durations, st.integers(1, 3))
def test_same_batches_as_triton_for_single_requests(
    data: st.DataObject, policy: BatchingPolicy, durations_ns: list[int], instances: int
) -> None:
    arrivals = data.draw(loads(policy))
    expected = simulate(LiteralBatcher(policy), arrivals, durations_ns, instances)
    assert simulate(OurBatcher(policy, as_runs=False), arrivals, durations_ns, instances) == expected
    assert sorted(number for batch in expected for number in batch.numbers) == list(range(len(arrivals)))


@settings(max_examples=300, deadline=None)
@given(st.data(), policies(), durations, st.integers(1, 3))
def test_same_batches_as_triton_for_requests_in_slab_rows(
    data: st.DataObject, policy: BatchingPolicy, durations_ns: list[int], instances: int
) -> None:
    """Rows have fixed shapes."""
    arrivals = [arrival._replace(shape=0) for arrival in data.draw(loads(policy))]
    expected = simulate(LiteralBatcher(policy), arrivals, durations_ns, instances)
    assert simulate(OurBatcher(policy, as_runs=True), arrivals, durations_ns, instances) == expected


@settings(max_examples=200, deadline=None)
@given(policies(), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1), st.integers(0, 30))
def test_a_queue_of_runs_gives_the_batch_of_its_single_requests(
    policy: BatchingPolicy, shape_of_runs: list[tuple[int, int]], now_us: int
) -> None:
    """Where a preferred size falls inside a run is computed; here it is compared with searching (I-3)."""
    together = RequestQueue(policy)
    apart = RequestQueue(policy)
    first = 0
    for at_us, (requests, rows) in enumerate(shape_of_runs):
        rows = min(rows, policy.max_batch_size)
        together.append(run(first, requests, rows, at_us * 1000))
        for index in range(requests):
            apart.append(run(first + index * rows, 1, rows, at_us * 1000))
        first += requests * rows
    batcher = Batcher(policy)
    now_ns = now_us * 1000
    while apart.request_count:
        decision = batcher.decide(apart, now_ns)
        assert batcher.decide(together, now_ns) == decision
        if not decision.requests:
            now_ns = decision.wait_until_ns
            continue
        taken = together.take(decision.requests)
        assert sum(item.requests for item in taken) == len(apart.take(decision.requests))
