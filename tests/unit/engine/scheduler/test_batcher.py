"""The dynamic batcher's decisions, a line per case (spec 6.1, 6.2, appendix B)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from queues import MS, parcel, queue_of, run

from forebay.engine.scheduler.batcher import Batcher, Decision, Reason
from forebay.engine.scheduler.waiting import Waiting
from forebay.ipc.scheduler_messages import BatchingPolicy


def dynamic(max_size: int, *preferred: int, delay_us: int = 0) -> BatchingPolicy:
    """As the supervisor sends it: a preferred size of ``max_size`` unless others are given (spec S-014)."""
    return BatchingPolicy(
        max_batch_size=max_size,
        dynamic=True,
        preferred_batch_sizes=preferred or (max_size,),
        max_queue_delay_us=delay_us,
    )


def check(policy: BatchingPolicy, queue: Sequence[Waiting], now_ns: int, expected: tuple[int, str]) -> None:
    decision = Batcher(policy).decide(queue_of(queue, policy), now_ns)
    assert (decision.requests, str(decision.reason)) == expected


def singles(*rows: int, at_ns: int = 0) -> list[Waiting]:
    """Return parcels of these sizes that arrived together."""
    return [parcel(token, size, at_ns) for token, size in enumerate(rows)]


def test_default_scheduler_runs_each_request_alone() -> None:
    """Spec S-001, S-002: also with max_batch_size above 1, and whatever a client put into one request."""
    plain = BatchingPolicy(max_batch_size=8)
    check(plain, [], 0, (0, "empty"))
    check(plain, [run(0, 5)], 0, (1, "single"))
    check(plain, singles(3, 3), 0, (1, "single"))


def test_dynamic_batching_without_batch_dimension_runs_each_request_alone() -> None:
    """Spec S-038."""
    check(BatchingPolicy(max_batch_size=0, dynamic=True), singles(1, 1), 0, (1, "single"))
    check(dynamic(1), singles(1, 1), 0, (1, "preferred size"))


def test_requests_are_never_split() -> None:
    """Spec S-010, S-016: 3+3 with at most 4 are two executions."""
    check(dynamic(4), singles(3, 3), 0, (1, "full"))
    check(dynamic(4, 2), singles(3, 2), 0, (1, "full"))
    check(dynamic(4), [run(0, 2, rows=3)], 0, (1, "full"))


def test_delay_0_takes_the_largest_preferred_prefix_else_everything() -> None:
    """Spec S-013."""
    check(dynamic(8, 4), singles(1, 1, 1, 1, 1, 1), 0, (4, "preferred size"))
    check(dynamic(8, 4), singles(1, 1), 0, (2, "instance idle"))
    check(dynamic(8, 2, 4), singles(1, 1, 1, 1, 1), 0, (4, "preferred size"))
    check(dynamic(8, 2, 4), singles(1, 1, 1), 0, (2, "preferred size"))
    check(dynamic(8), singles(*[1] * 20), 0, (8, "preferred size"))
    check(dynamic(8, 4), [run(0, 6)], 0, (4, "preferred size"))
    check(dynamic(8, 2, 4), [run(0, 20)], 0, (4, "preferred size"))


def test_passing_the_largest_preferred_size_sends_what_is_there() -> None:
    """Spec S-015: preferred [4], two requests of 3: the first goes at once, also with a delay."""
    check(dynamic(8, 4, delay_us=200_000), singles(3, 3), 0, (1, "full"))
    check(dynamic(8, 4, delay_us=200_000), [run(0, 2, rows=3)], 0, (1, "full"))
    check(dynamic(8, 4), singles(3, 3), 0, (1, "full"))


def test_delay_waits_for_a_preferred_size() -> None:
    """Spec S-017, S-018: the delay counts from the oldest request."""
    policy = dynamic(8, 4, delay_us=200_000)
    for queue in (singles(1), singles(1, 1, 1), [run(0, 3)]):
        check(policy, queue, 0, (0, "waiting"))
        check(policy, queue, 199 * MS, (0, "waiting"))
        check(policy, queue, 200 * MS, (len(queue) if len(queue) > 1 else queue[0].requests, "delay"))
    check(policy, singles(1, 1, 1, 1), 0, (4, "preferred size"))
    check(policy, [parcel(0, at_ns=0), parcel(1, at_ns=150 * MS)], 199 * MS, (0, "waiting"))
    check(policy, [parcel(0, at_ns=0), parcel(1, at_ns=150 * MS)], 200 * MS, (2, "delay"))


def test_an_aged_queue_is_not_cut_to_a_preferred_size() -> None:
    """Spec S-017: preferred prefixes count only while the oldest is younger than the delay."""
    policy = dynamic(8, 4, delay_us=1000)
    check(policy, singles(1, 1, 1, 1, 1, 1), 0, (4, "preferred size"))
    check(policy, singles(1, 1, 1, 1, 1, 1), MS, (6, "full"))
    check(policy, singles(*[1] * 12), MS, (8, "full"))


def test_wait_ends_when_the_delay_of_the_oldest_does() -> None:
    """Spec S-017."""
    policy = dynamic(8, 4, delay_us=5000)
    queue = queue_of([run(0, 1, at_ns=10 * MS), run(1, 1, at_ns=12 * MS)], policy)
    assert Batcher(policy).decide(queue, 13 * MS) == Decision(0, Reason.WAIT, 15 * MS)


def test_another_shape_ends_the_batch_without_reordering() -> None:
    """Spec S-011, S-012: shapes A, B, A, B are four executions."""
    mixed = [parcel(0, shape=1), parcel(1, shape=2), parcel(2, shape=1), parcel(3, shape=2)]
    check(dynamic(8), mixed, 0, (1, "shape change"))
    check(dynamic(8, delay_us=5000), mixed, 0, (1, "shape change"))
    check(dynamic(8, delay_us=5000), [parcel(0, shape=1), parcel(1, shape=1)], 0, (0, "waiting"))
    check(dynamic(8), [run(0, 2), parcel(1)], 0, (2, "shape change"))


def test_retried_requests_run_alone() -> None:
    """What ended a worker once must not take its neighbours with it a second time."""
    check(dynamic(8), [run(0, attempt=1), run(1, attempt=1)], 0, (1, "retry"))
    check(dynamic(8, delay_us=5000), [run(0, attempt=1), run(1)], 0, (1, "retry"))
    check(dynamic(8, 2), [run(0), run(1, attempt=1)], 0, (1, "shape change"))
    check(dynamic(8), [run(0, 4, attempt=1)], 0, (1, "retry"))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("preferred", [(), (4,), (2, 6), (3, 8)])
def test_a_run_decides_as_its_single_requests(rows: int, preferred: tuple[int, ...]) -> None:
    """A run of equal requests is a shorthand, nothing else (I-3)."""
    policy = dynamic(8, *preferred, delay_us=1000)
    for count in range(1, 20):
        for now_ns in (0, MS):
            as_run = Batcher(policy).decide(queue_of([run(0, count, rows)], policy), now_ns)
            alone = [run(index * rows, 1, rows) for index in range(count)]
            assert as_run == Batcher(policy).decide(queue_of(alone, policy), now_ns)


def test_grant_allows_what_is_one_batch_for_sure() -> None:
    assert Batcher(dynamic(8, 4)).grant_rows == 4
    assert Batcher(dynamic(8)).grant_rows == 8
    assert Batcher(BatchingPolicy(max_batch_size=8)).grant_rows == 0
    assert Batcher(dynamic(8)).can_be_granted
    assert not Batcher(dynamic(8, delay_us=1)).can_be_granted
