"""Batches for a latency objective: how large, when, and for whom there is no time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from queues import MS, parcel, queue_of, run

from forebay.engine.scheduler.adaptive_batcher import NEVER_NS, AdaptiveBatcher
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.scheduler_messages import BatchingPolicy

#: A tenth of the time is for the way: batches have 10 ms.
POLICY = BatchingPolicy(max_batch_size=64, dynamic=True, objective_us=11_112)

#: When everything happens in these tests.
NOW = 1_000 * MS


def trained(
    *instances: int, base_ms: float = 1.0, row_ms: float = 0.1, policy: BatchingPolicy = POLICY
) -> AdaptiveBatcher:
    """Return a batcher whose instances have shown what they cost; the last batch ended at ``NOW``."""
    batcher = AdaptiveBatcher(policy)
    for instance in instances or (1,):
        batcher.add_instance(instance)
        teach(batcher, instance, base_ms, row_ms)
    return batcher


def teach(batcher: AdaptiveBatcher, instance: int, base_ms: float, row_ms: float) -> None:
    for _ in range(100):
        for rows in (1, 8, 32):
            cost_ns = int((base_ms + row_ms * rows) * MS)
            batcher.started(instance, rows, NOW - cost_ns)
            batcher.ended(instance, NOW)


def arrive(batcher: AdaptiveBatcher, *, every_us: int, until_ns: int = NOW) -> None:
    """Let single rows come at a steady rate for half a second."""
    for index in range(500_000 // every_us, 0, -1):
        batcher.arrived(1, until_ns - index * every_us * 1000)
    batcher.arrived(1, until_ns)


def decide(batcher: AdaptiveBatcher, queue: Sequence[Waiting], now_ns: int = NOW, instance: int = 1) -> tuple[int, str]:
    decision = batcher.decide(queue_of(queue, POLICY), instance, now_ns)
    return decision.requests, str(decision.reason)


def test_the_batch_is_as_large_as_the_oldest_requests_time_allows() -> None:
    """1 ms + 0.1 ms a row: 10 ms are 90 rows, more than the model's 64; 5.05 ms are 40; 2.05 ms are 10."""
    batcher = trained()
    assert decide(batcher, [run(0, 100, at_ns=NOW)]) == (64, "full")
    assert decide(batcher, [run(0, 100, at_ns=NOW - 4_950_000)]) == (40, "objective")
    assert decide(batcher, [run(0, 1, at_ns=NOW - 7_950_000), run(1, 99, at_ns=NOW)]) == (10, "objective")


def test_a_timeout_of_its_own_takes_the_objectives_place() -> None:
    batcher = trained()
    assert decide(batcher, [run(0, 100, at_ns=NOW, timeout_us=2_278)]) == (10, "deadline")
    assert decide(batcher, [run(0, 100, at_ns=NOW - 9 * MS, timeout_us=60_000)]) == (64, "full")


def test_a_deadline_counts_only_where_it_comes_first() -> None:
    """One that is later than the objective, or the timeout, is there for the case that all else fails."""
    batcher = trained()
    soon, late = NOW + 2_278_000, NOW + 30_000 * MS
    assert decide(batcher, [parcel(n, at_ns=NOW, deadline_ns=soon) for n in range(40)]) == (10, "deadline")
    assert decide(batcher, [run(0, 100, at_ns=NOW, deadline_ns=soon)]) == (10, "deadline")
    assert decide(batcher, [run(0, 100, at_ns=NOW, timeout_us=2_278, deadline_ns=late)]) == (10, "deadline")
    assert decide(batcher, [run(0, 100, at_ns=NOW - 4_950_000, deadline_ns=late)]) == (40, "objective")


def test_a_request_with_less_time_does_not_join_a_batch_that_is_too_long_for_it() -> None:
    batcher = trained()
    queue = [run(0, 30, at_ns=NOW), run(30, 1, at_ns=NOW, timeout_us=2_000)]
    assert decide(batcher, queue) == (30, "objective")


def test_requests_of_another_shape_close_the_batch() -> None:
    batcher = trained()
    assert decide(batcher, [parcel(0, at_ns=NOW), parcel(1, at_ns=NOW, shape=2)]) == (1, "shape change")


def test_what_ran_before_runs_alone_and_is_never_too_late() -> None:
    batcher = trained()
    retried = run(0, 2, at_ns=NOW - 500 * MS, attempt=1)
    assert batcher.due_ns(retried) == NEVER_NS
    assert not batcher.is_hopeless(retried, 9, NOW)
    assert decide(batcher, [retried, run(2, 2, at_ns=NOW)]) == (1, "retry")


def test_nobody_waits_where_the_rate_is_low() -> None:
    """100 a second keep an instance busy for 11 % of its time, one by one."""
    batcher = trained()
    arrive(batcher, every_us=10_000)
    assert decide(batcher, [run(0, 1, at_ns=NOW)]) == (1, "instance idle")


def test_at_a_high_rate_an_idle_instance_waits_for_a_larger_batch() -> None:
    """2,000 a second: batches of 7 keep it busy for 2 * (0.1 + 1 / 7) = 49 % of its time."""
    batcher = trained()
    arrive(batcher, every_us=500)
    assert decide(batcher, [run(0, 4, at_ns=NOW)]) == (0, "waiting")
    assert decide(batcher, [run(0, 7, at_ns=NOW)]) == (7, "instance idle")


def test_waiting_ends_when_nobody_else_comes() -> None:
    batcher = trained()
    arrive(batcher, every_us=500)
    queue = [run(0, 4, at_ns=NOW)]
    decision = batcher.decide(queue_of(queue, POLICY), 1, NOW)
    assert NOW + MS < decision.wait_until_ns < NOW + 2 * MS  # three distances of 0.5 ms, nearly
    assert decide(batcher, queue, decision.wait_until_ns) == (4, "instance idle")


def test_nobody_waits_for_more_than_a_quarter_of_the_time() -> None:
    batcher = trained()
    arrive(batcher, every_us=500)
    queue = [run(0, 4, at_ns=NOW - 2 * MS)]
    decision = batcher.decide(queue_of(queue, POLICY), 1, NOW)
    assert decision.wait_until_ns == NOW + 778_000
    assert decide(batcher, queue, decision.wait_until_ns) == (4, "objective")


def test_nobody_waits_who_has_no_time_for_the_batch_that_would_be_waited_for() -> None:
    """Of 2.5 ms a tenth is for the way, and a batch of 7 takes 1.7 ms: one more would come until then."""
    batcher = trained()
    arrive(batcher, every_us=500)
    assert decide(batcher, [run(0, 4, at_ns=NOW, timeout_us=2_500)]) == (4, "instance idle")


def test_several_instances_share_the_load() -> None:
    """What keeps one instance busy needs no waiting where there are four."""
    batcher = trained(1, 2, 3, 4)
    arrive(batcher, every_us=500)
    assert decide(batcher, [run(0, 2, at_ns=NOW)]) == (2, "instance idle")


def test_batches_grow_step_by_step_until_their_costs_are_known() -> None:
    batcher = AdaptiveBatcher(POLICY)
    batcher.add_instance(1)
    sizes: list[int] = []
    for step in range(5):
        size, _reason = decide(batcher, [run(0, 100, at_ns=NOW)])
        sizes.append(size)
        batcher.started(1, size, NOW + step * MS)
        batcher.ended(1, NOW + step * MS + MS // 10)
    assert sizes == [1, 2, 4, 8, 16]


def test_a_request_larger_than_anything_seen_runs() -> None:
    batcher = trained()
    assert decide(batcher, [parcel(0, 64, NOW)]) == (1, "full")
    fresh = AdaptiveBatcher(POLICY)
    fresh.add_instance(1)
    assert decide(fresh, [parcel(0, 64, NOW)]) == (1, "full")


# --- admission


def admitted(batcher: AdaptiveBatcher, item: Waiting, *ahead: Waiting, now_ns: int = NOW) -> int:
    batcher.forget_plan()
    return batcher.admit(item, queue_of(ahead, POLICY), now_ns)[0]


def test_the_running_batch_and_the_queue_ahead_count() -> None:
    """A batch of 32 runs until 4.2 ms; then 1 ms + 0.1 ms a row: 48 rows fit into what is left of 10.05 ms."""
    batcher = trained()
    batcher.started(1, 32, NOW - MS // 20)
    assert admitted(batcher, run(0, 100, at_ns=NOW)) == 48
    assert admitted(batcher, run(0, 100, at_ns=NOW), run(0, 40, at_ns=NOW)) == 8
    assert admitted(batcher, run(0, 5, at_ns=NOW), run(0, 48, at_ns=NOW)) == 0
    assert admitted(batcher, run(0, 5, at_ns=NOW, timeout_us=3_000)) == 0
    assert admitted(batcher, run(0, 5, at_ns=NOW, timeout_us=60_000), run(0, 200, at_ns=NOW)) == 5


def test_who_comes_does_not_make_those_late_who_are_in() -> None:
    """The oldest request leaves its batch room for 9 rows; the next one starts when that ends, and has 8 ms."""
    batcher = trained()
    batcher.started(1, 1, NOW - MS)
    oldest = run(0, 5, at_ns=NOW - 7_950_000)
    assert admitted(batcher, run(0, 80, at_ns=NOW), oldest) == 4 + 64


def test_at_a_high_rate_no_small_batch_is_begun() -> None:
    """Rows that come a little later, with more time left, make a large one."""
    batcher = trained()
    batcher.started(1, 64, NOW)
    newcomer = run(0, 1, at_ns=NOW)
    assert admitted(batcher, newcomer) == 1
    arrive(batcher, every_us=100)
    assert admitted(batcher, newcomer) == 0
    assert admitted(batcher, run(0, 1, at_ns=NOW + 3 * MS), now_ns=NOW + 3 * MS) == 1


def test_two_instances_take_twice_as_much() -> None:
    batcher = trained(1, 2)
    batcher.started(1, 32, NOW)
    batcher.started(2, 32, NOW)
    assert admitted(batcher, run(0, 200, at_ns=NOW)) > 64


def test_each_instance_has_costs_of_its_own() -> None:
    """A slow instance leaves to a fast one what it cannot finish in time."""
    batcher = trained(1)
    batcher.add_instance(2)
    teach(batcher, 2, 20.0, 1.0)
    batcher.started(1, 8, NOW)
    queue = [run(0, 1, at_ns=NOW)]
    assert decide(batcher, queue, instance=2) == (0, "waiting")
    assert not batcher.is_hopeless(queue[0], 0, NOW)
    batcher.ended(1, NOW + 2 * MS)
    assert decide(batcher, queue, NOW + 2 * MS) == (1, "instance idle")


def test_what_cannot_be_in_time_is_hopeless() -> None:
    batcher = trained()
    late = run(0, 1, at_ns=NOW - 9 * MS)
    assert batcher.is_hopeless(late, 3, NOW)
    assert not batcher.is_hopeless(run(0, 1, at_ns=NOW - 8 * MS), 3, NOW)


def test_an_objective_that_cannot_be_met_leaves_the_model_answering() -> None:
    """A lone request runs on an idle instance: late answers are better than none, and the costs may have changed."""
    batcher = trained(base_ms=30.0)
    lone = run(0, 1, at_ns=NOW)
    assert admitted(batcher, lone) == 1
    assert not batcher.is_hopeless(lone, 0, NOW)
    assert decide(batcher, [lone]) == (1, "late")
    batcher.started(1, 1, NOW)
    assert admitted(batcher, run(1, 1, at_ns=NOW)) == 0


def test_a_deadline_that_cannot_be_met_is_tried_only_if_nothing_was_seen_for_a_while() -> None:
    batcher = trained(base_ms=30.0)
    lone = parcel(0, at_ns=NOW, deadline_ns=NOW + 5 * MS)
    assert admitted(batcher, lone) == 0
    later = NOW + 200 * MS
    assert admitted(batcher, parcel(0, at_ns=later, deadline_ns=later + 5 * MS), now_ns=later) == 1


def test_time_alone_makes_the_first_request_hopeless() -> None:
    batcher = trained()
    batcher.started(1, 32, NOW)
    item = run(0, 1, at_ns=NOW)
    look_ns = batcher.next_look_ns(item)
    assert look_ns == pytest.approx(NOW + 8.9 * MS, abs=0.02 * MS)
    assert not batcher.is_hopeless(item, 0, look_ns - 1)
    assert batcher.is_hopeless(item, 0, look_ns)


def test_one_client_that_waits_for_each_answer_is_not_made_to_wait_for_others() -> None:
    """30 ms a batch, asked for every 80 ms: waiting would find hardly anybody."""
    slow = trained(
        base_ms=30.0, row_ms=0.0, policy=BatchingPolicy(max_batch_size=4, dynamic=True, objective_us=200_000)
    )
    for index in range(10):
        slow.arrived(1, NOW - (9 - index) * 80 * MS)
        assert decide(slow, [run(0, 1, at_ns=NOW)]) == (1, "instance idle")
