"""A model with a latency objective under random load: who is answered, who is refused, and how many are in time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queues import MS, parcel, run

from forebay.engine.scheduler.adaptive_line import AdaptiveLine
from forebay.engine.scheduler.batcher import Reason
from forebay.engine.scheduler.line import SharedLine
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.errors import Code, QueueFull, ServingError, Unavailable
from forebay.ipc.scheduler_messages import BatchingPolicy, QueuePolicy

OBJECTIVE_MS = 10
POLICY = BatchingPolicy(max_batch_size=32, dynamic=True, objective_us=OBJECTIVE_MS * 1000)


class Simulation:
    """A line and instances whose batches cost what they cost; time is :attr:`now_ns`."""

    def __init__(
        self,
        policy: BatchingPolicy = POLICY,
        *,
        instances: int = 1,
        base_ms: float = 1.0,
        row_ms: float = 0.1,
        noise: float = 0.0,
    ) -> None:
        self.line = AdaptiveLine("m", policy) if policy.objective_us else SharedLine(policy)
        self.now_ns = 0
        self.in_time = self.late = self.refused = 0
        self.errors: list[ServingError] = []
        self._base_ms, self._row_ms, self._noise = base_ms, row_ms, noise
        self._dice = random.Random(1)
        self._idle = list(range(instances))
        self._ends: list[tuple[int, int]] = []
        self._running: dict[int, list[tuple[Waiting, int]]] = {}
        for instance in self._idle:
            self.line.add_instance(instance)

    def run(self, arrivals: Iterable[Waiting]) -> None:
        """Let requests arrive, then everything end."""
        for item in sorted(arrivals, key=lambda item: item.enqueue_ns):
            self._pass_until(item.enqueue_ns)
            self._submit(item)
            self._decide()
        self._pass_until(1 << 60)
        assert self.line.is_empty

    @property
    def answered(self) -> int:
        return self.in_time + self.late

    def _submit(self, item: Waiting) -> None:
        has_own_time = isinstance(self.line, AdaptiveLine) and self.line.batcher.has_own_time(item)
        must_run = self.line.is_empty and bool(self._idle) and item.requests == 1 and not has_own_time
        try:
            self.line.append(item, item.enqueue_ns)
        except Unavailable as error:
            assert not must_run
            self.refused += item.requests
            self.errors.append(error)

    def _pass_until(self, at_ns: int) -> None:
        while True:
            alarm_ns = max(self._alarm_ns, self.now_ns) if self._alarm_ns else 1 << 62
            next_ns = min(alarm_ns, self._ends[0][0] if self._ends else 1 << 62)
            if next_ns > at_ns:
                self.now_ns = max(self.now_ns, min(at_ns, 1 << 59))
                return
            self.now_ns = next_ns
            while self._ends and self._ends[0][0] <= self.now_ns:
                self._end(heapq.heappop(self._ends)[1])
            self._decide()

    _alarm_ns = 0

    def _end(self, instance: int) -> None:
        if isinstance(self.line, AdaptiveLine):
            self.line.batcher.ended(instance, self.now_ns)
        for item, due_ns in self._running.pop(instance):
            if self.now_ns <= due_ns:
                self.in_time += item.requests
            else:
                self.late += item.requests
        self._idle.append(instance)

    def _decide(self) -> None:
        for refusal in self.line.expire(self.now_ns):
            self.refused += refusal.item.requests
            self.errors.append(refusal.error)
        wait_ns = 0
        for instance in tuple(self._idle):
            choice = self.line.choose(instance, self.now_ns)
            if choice.items:
                self._start(instance, choice.items, choice.decision.reason)
            elif choice.decision.wait_until_ns:
                assert choice.decision.wait_until_ns > self.now_ns
                wait_ns = min(wait_ns or choice.decision.wait_until_ns, choice.decision.wait_until_ns)
        expiry_ns = self.line.next_expiry_ns()
        self._alarm_ns = min((ns for ns in (wait_ns, expiry_ns) if ns), default=0)

    def _start(self, instance: int, items: Sequence[Waiting], reason: Reason) -> None:
        rows = sum(item.requests * item.rows_each for item in items)
        if isinstance(self.line, AdaptiveLine):
            self._check_start(self.line, instance, items, reason, rows)
        self._idle.remove(instance)
        self._running[instance] = [(item, item.enqueue_ns + self._given_ns(item)) for item in items]
        noise = 1 + self._noise * self._dice.uniform(-1, 1)
        cost_ns = int((self._base_ms + self._row_ms * rows) * MS * noise)
        heapq.heappush(self._ends, (self.now_ns + cost_ns, instance))

    def _given_ns(self, item: Waiting) -> int:
        if isinstance(self.line, AdaptiveLine):
            return 1 << 60 if item.attempt else self.line.batcher.given_ns(item)
        return OBJECTIVE_MS * MS

    def _check_start(
        self, line: AdaptiveLine, instance: int, items: Sequence[Waiting], reason: Reason, rows: int
    ) -> None:
        batcher = line.batcher
        if reason is Reason.LATE:
            # Predicted to miss: only where nobody else could use the instance.
            assert line.is_empty
            assert sum(item.requests for item in items) == 1
        elif reason is not Reason.RETRY:
            end_ns = self.now_ns + batcher._costs[instance].expected_ns(rows)
            assert all(end_ns <= batcher.due_ns(item) for item in items)
        batcher.started(instance, rows, self.now_ns)


def steady(rate_per_s: float, seconds: float, *, seed: int = 1, timeout_us: int = 0) -> list[Waiting]:
    """Return single requests with Poisson arrivals."""
    dice = random.Random(seed)
    arrivals: list[Waiting] = []
    at_s = 0.0
    while (at_s := at_s + dice.expovariate(rate_per_s)) < seconds:
        arrivals.append(run(len(arrivals), at_ns=int(at_s * 1e9), timeout_us=timeout_us))
    return arrivals


_items = st.builds(
    lambda at_us, requests, rows, timeout_us, deadline_us, attempt: run(
        0,
        requests,
        rows,
        at_us * 1000,
        timeout_us=timeout_us,
        attempt=attempt,
        deadline_ns=(at_us + deadline_us) * 1000 if deadline_us else 0,
    ),
    st.integers(0, 200_000),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from((0, 0, 0, 500, 3_000, 100_000)),
    st.sampled_from((0, 0, 0, 2_000, 8_000, 50_000)),
    st.sampled_from((0, 0, 0, 0, 1)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_items, max_size=80),
    st.integers(1, 3),
    st.floats(0.01, 30.0),
    st.floats(0.0, 1.0),
    st.sampled_from((0.0, 0.5)),
)
def test_everybody_is_answered_or_refused_and_nobody_knowingly_too_late(
    arrivals: list[Waiting], instances: int, base_ms: float, row_ms: float, noise: float
) -> None:
    """Whatever arrives and whatever it costs: nothing is lost, nothing waits for ever, and a request that is predicted
    to miss runs only where nobody else could use the instance."""
    simulation = Simulation(instances=instances, base_ms=base_ms, row_ms=row_ms, noise=noise)
    asked = sum(item.requests for item in arrivals)
    simulation.run(arrivals)
    assert simulation.answered + simulation.refused == asked


@pytest.mark.parametrize("rate_per_s", [50, 500, 2_000, 4_000])
def test_what_can_be_done_is_done_in_time(rate_per_s: int) -> None:
    """Batches of 32 are up to 7,600 rows a second; half of that needs no refusals worth mentioning."""
    simulation = Simulation(noise=0.2)
    arrivals = steady(rate_per_s, 2.0)
    simulation.run(arrivals)
    assert simulation.in_time >= 0.97 * len(arrivals)
    assert simulation.late <= 0.01 * len(arrivals)


def test_under_three_times_the_load_that_can_be_borne_the_instance_does_useful_work() -> None:
    """What is refused is refused at once, so those who are let in are answered in time."""
    simulation = Simulation(noise=0.2)
    arrivals = steady(20_000, 1.0)
    simulation.run(arrivals)
    assert simulation.in_time >= 5_000
    assert simulation.late <= 0.05 * simulation.answered


def bursty(rate_per_s: float, seconds: float) -> list[Waiting]:
    """Return single requests at 2.5 times the rate for 20 ms, then at 0.625 times for 80 ms, on average."""
    dice = random.Random(3)
    arrivals: list[Waiting] = []
    at_s = end_s = 0.0
    is_burst = True
    while at_s < seconds:
        next_s = at_s + dice.expovariate(rate_per_s * (2.5 if is_burst else 0.625))
        if next_s < end_s:
            at_s = next_s
            arrivals.append(run(len(arrivals), at_ns=int(at_s * 1e9)))
        else:
            at_s, is_burst = end_s, not is_burst
            end_s += dice.expovariate(1 / (0.02 if is_burst else 0.08))
    return arrivals


@pytest.mark.parametrize("load", [steady, bursty])
@pytest.mark.parametrize("rate_per_s", [500, 2_000, 4_000, 8_000, 12_000])
def test_no_fixed_delay_answers_more_in_time(load: Callable[[float, float], list[Waiting]], rate_per_s: int) -> None:
    """But for a few of a hundred where everything can be done anyway; far from it where it cannot."""
    answered: dict[int, float] = {}
    for delay_us in (0, 2_000, 5_000):
        fixed = BatchingPolicy(
            max_batch_size=32, dynamic=True, preferred_batch_sizes=(32,), max_queue_delay_us=delay_us
        )
        simulation = Simulation(fixed, noise=0.2)
        simulation.run(load(rate_per_s, 1.0))
        answered[delay_us] = simulation.in_time
    adaptive = Simulation(noise=0.2)
    adaptive.run(load(rate_per_s, 1.0))
    best = max(answered.values())
    assert adaptive.in_time >= 0.95 * best
    if rate_per_s >= 8_000:
        assert adaptive.in_time >= 2 * best


def test_an_objective_below_the_cost_of_one_request_leaves_the_model_answering() -> None:
    simulation = Simulation(base_ms=25.0)
    simulation.run(steady(200, 2.0))
    assert simulation.late >= 60


def test_clients_that_give_more_time_get_it() -> None:
    simulation = Simulation(base_ms=25.0)
    arrivals = steady(200, 2.0, timeout_us=200_000)
    simulation.run(arrivals)
    assert simulation.in_time >= 0.97 * len(arrivals)


def test_refusals_say_what_would_take_too_long_and_what_to_do() -> None:
    simulation = Simulation(base_ms=25.0)
    simulation.run([*steady(200, 1.0), *steady(200, 1.0, seed=2, timeout_us=3_000)])
    texts = {error.text.partition(":")[0]: error.text for error in simulation.errors}
    assert set(texts) == {"Exceeds latency objective", "Exceeds request timeout"}
    assert "the objective of model 'm' is 10 ms; try again later" in texts["Exceeds latency objective"]
    assert "and 3 ms are given; try again later" in texts["Exceeds request timeout"]
    assert {error.code for error in simulation.errors} == {Code.UNAVAILABLE}


def busy_line(policy: BatchingPolicy = POLICY) -> AdaptiveLine:
    """Return a line whose one instance costs 1 ms + 0.1 ms a row and runs 16 rows since the first millisecond."""
    line = AdaptiveLine("m", policy)
    line.add_instance(1)
    for index in range(100):
        line.batcher.started(1, 1 + index % 16, 0)
        line.batcher.ended(1, int((1.1 + index % 16 * 0.1) * MS))
    line.batcher.started(1, 16, MS)
    return line


def test_of_a_run_the_part_that_is_in_time_is_let_in() -> None:
    """The batch ends at 3.6 ms; until 11 ms there are 64 rows' time, in two batches of 32 and 18."""
    line = busy_line()
    item = run(0, 200, at_ns=MS)
    with pytest.raises(Unavailable, match="Exceeds latency objective"):
        line.append(item, MS)
    assert 40 <= line.request_count <= 54
    assert item.requests == 200 - line.request_count


def test_priorities_go_first_and_count_only_what_is_ahead_of_them() -> None:
    """S-031: a level's requests are refused for what waits at their level and above, not below."""
    levels = BatchingPolicy(
        max_batch_size=32, dynamic=True, objective_us=10_000, priority_levels=2, default_priority_level=2
    )
    line = busy_line(levels)
    with pytest.raises(Unavailable):
        line.append(run(0, 200, at_ns=MS, priority=2), MS)
    with pytest.raises(Unavailable):
        line.append(run(0, at_ns=MS, priority=2), MS)
    line.append(run(900, at_ns=MS, priority=1), MS)
    line.batcher.ended(1, 3_600_000)
    first = line.choose(1, 3_600_000).items[0]
    assert first.priority == 1


def test_queue_limits_hold_beside_the_objective() -> None:
    """S-025."""
    limited = BatchingPolicy(
        max_batch_size=32, dynamic=True, objective_us=10_000, default_queue_policy=QueuePolicy(max_queue_size=2)
    )
    line = busy_line(limited)
    for token in range(2):
        line.append(parcel(token, at_ns=MS), MS)
    with pytest.raises(QueueFull):
        line.append(parcel(2, at_ns=MS), MS)


def test_an_instance_that_is_gone_is_not_counted_on() -> None:
    line = busy_line()
    line.drop_instance(1)
    line.append(run(0, 500, at_ns=MS), MS)
    assert line.request_count == 500
