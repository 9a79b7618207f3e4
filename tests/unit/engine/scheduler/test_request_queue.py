"""Order, limits and timeouts of the queue of one model version (spec S-025..S-033)."""

from __future__ import annotations

import pytest
from queues import MS, PRODUCER, parcel, queue_of, run, tokens

from forebay.engine.scheduler.request_queue import RequestQueue
from forebay.engine.scheduler.waiting import WaitingRun
from forebay.ipc.errors import QueueFull
from forebay.ipc.scheduler_messages import BatchingPolicy, QueuePolicy


def with_policy(**fields: object) -> BatchingPolicy:
    policy = QueuePolicy(**fields)  # type: ignore[arg-type]
    return BatchingPolicy(max_batch_size=8, dynamic=True, default_queue_policy=policy)


def test_first_in_first_out() -> None:
    """Spec S-002."""
    queue = queue_of([run(0), parcel(1), run(2)])
    assert tokens(queue.take(2)) == [0, 1]
    assert tokens(queue) == [2]
    assert queue.request_count == 1


def test_take_cuts_a_run() -> None:
    queue = queue_of([run(0, 5, rows=2)])
    (head,) = queue.take(2)
    (rest,) = queue
    assert isinstance(head, WaitingRun)
    assert isinstance(rest, WaitingRun)
    assert (head.first, head.requests, rest.first, rest.requests) == (0, 2, 4, 3)
    assert queue.request_count == 3


def test_a_lower_level_is_never_served_while_a_higher_one_has_requests() -> None:
    """Spec S-032: as in Triton, nothing prevents starvation."""
    policy = BatchingPolicy(max_batch_size=8, dynamic=True, priority_levels=2, default_priority_level=1)
    queue = queue_of([parcel(0, priority=2)], policy)
    for token in range(1, 20):
        queue.append(parcel(token, priority=1))
        assert tokens(queue.take(1)) == [token]
    assert tokens(queue) == [0]


def test_priority_1_first_and_unknown_levels_are_the_default() -> None:
    """Spec S-031: 0 and levels above the configured ones mean the default level; one batch may mix levels."""
    policy = BatchingPolicy(max_batch_size=8, dynamic=True, priority_levels=3, default_priority_level=2)
    arrivals = [(0, 3), (1, 0), (2, 9), (3, 1), (4, 2), (5, 3), (6, 1)]
    queue = queue_of([parcel(token, priority=level) for token, level in arrivals], policy)
    assert tokens(queue) == [3, 6, 1, 2, 4, 0, 5]
    assert tokens(queue.take(4)) == [3, 6, 1, 2]


def test_without_levels_priority_means_nothing() -> None:
    """Spec S-004."""
    queue = queue_of([parcel(0, priority=5), parcel(1, priority=1)])
    assert tokens(queue) == [0, 1]


def test_queue_limit_counts_waiting_requests() -> None:
    """Spec S-025: those that fit are queued, the rest is refused."""
    queue = RequestQueue(with_policy(max_queue_size=3))
    queue.append(run(0, 2))
    too_many = run(10, 4)
    with pytest.raises(QueueFull, match=r"^Exceeds maximum queue size$"):
        queue.append(too_many)
    assert queue.request_count == 3
    assert (too_many.first, too_many.requests) == (11, 3)
    queue.take(1)
    queue.append(run(20))
    assert queue.request_count == 3


def test_queue_limit_is_per_priority_level() -> None:
    """Spec S-025, appendix H 25."""
    policy = BatchingPolicy(
        max_batch_size=8,
        dynamic=True,
        priority_levels=2,
        default_priority_level=2,
        default_queue_policy=QueuePolicy(max_queue_size=1),
        priority_queue_policy={1: QueuePolicy(max_queue_size=2)},
    )
    queue = queue_of([parcel(0, priority=1), parcel(1, priority=1), parcel(2, priority=2)], policy)
    for level in (1, 2):
        with pytest.raises(QueueFull):
            queue.append(parcel(9, priority=level))


def test_timeout_rejects_at_its_time() -> None:
    """Spec S-026, L-005."""
    queue = queue_of([parcel(0, at_ns=0), parcel(1, at_ns=50 * MS)], with_policy(default_timeout_us=100_000))
    assert queue.next_expiry_ns() == 100 * MS
    assert queue.expire(100 * MS - 1) == []
    assert tokens(queue.expire(100 * MS)) == [0]
    assert queue.next_expiry_ns() == 150 * MS
    assert tokens(queue) == [1]
    assert queue.request_count == 1


def test_taken_requests_do_not_expire() -> None:
    """Spec S-030: the timeout covers the queue only."""
    queue = queue_of([run(0, 4)], with_policy(default_timeout_us=1000))
    queue.take(3)
    (rest,) = queue.expire(MS)
    assert rest.requests == 1
    assert queue.next_expiry_ns() == 0


def test_delayed_requests_come_after_the_live_ones_of_their_level() -> None:
    """Spec S-028: they are not rejected, and never expire again."""
    queue = queue_of(
        [parcel(0), parcel(1, at_ns=MS)], with_policy(default_timeout_us=1500, timeout_action="DELAY", max_queue_size=2)
    )
    assert queue.expire(2 * MS) == []
    assert tokens(queue) == [1, 0]
    with pytest.raises(QueueFull):
        queue.append(parcel(9))
    assert queue.expire(3 * MS) == []
    assert tokens(queue) == [0, 1]
    assert queue.next_expiry_ns() == 0
    assert tokens(queue.take(2)) == [0, 1]


@pytest.mark.parametrize(
    ("default_us", "override", "request_us", "expected_us"),
    [
        (1000, True, 500, 500),
        (1000, True, 2000, 1000),
        (1000, True, 0, 1000),
        (1000, False, 500, 1000),
        (0, False, 500, 0),
        # Triton ignores this one (S-029); a default of 0 means "none" here, which any timeout shortens (L-006).
        (0, True, 500, 500),
        (0, True, 0, 0),
    ],
)
def test_request_timeout_only_shortens_the_default(
    default_us: int, override: bool, request_us: int, expected_us: int
) -> None:
    """Spec S-029, L-006."""
    policy = with_policy(default_timeout_us=default_us, allow_timeout_override=override)
    queue = queue_of([parcel(0, timeout_us=request_us)], policy)
    assert queue.next_expiry_ns() == expected_us * 1000


def test_deadline_ends_waiting_whatever_the_policy_says() -> None:
    """Spec L-007: also without any policy, and under DELAY."""
    for policy in (with_policy(), with_policy(default_timeout_us=10_000, timeout_action="DELAY")):
        queue = queue_of([parcel(0, deadline_ns=2 * MS), parcel(1)], policy)
        assert queue.next_expiry_ns() == 2 * MS
        assert tokens(queue.expire(2 * MS)) == [0]


def test_cancelled_parcels_leave() -> None:
    """Spec S-033; tokens are each producer's own."""
    queue = queue_of([parcel(1), parcel(2), parcel(1, producer=8), run(1)])
    assert tokens(queue.remove_tokens(PRODUCER, {1, 5})) == [1]
    assert queue.request_count == 3


def test_cancelled_rows_are_cut_out_of_their_run() -> None:
    queue = queue_of([run(10, 5, rows=2), run(10, 5, rows=2, producer=8)])
    assert tokens(queue.remove_rows(PRODUCER, 4096, {14})) == [14]
    assert [(item.producer, item.requests) for item in queue] == [(7, 2), (7, 2), (8, 5)]
    assert tokens(queue) == [10, 16, 10]
    assert queue.request_count == 9
    assert tokens(queue.remove_rows(PRODUCER, 4096, {10, 12, 18})) == [10, 12, 18]
    assert tokens(queue) == [16, 10]


def test_rows_of_another_slab_stay() -> None:
    queue = queue_of([run(10, 2)])
    assert queue.remove_rows(PRODUCER, 8192, {10, 11}) == []
    assert queue.request_count == 2


def test_dead_producer_takes_its_requests_along() -> None:
    queue = queue_of([run(0, 3), run(0, 2, producer=8), parcel(1)])
    assert queue.remove_producer(PRODUCER) == 4
    assert queue.request_count == 2


def test_clear_returns_everything() -> None:
    queue = queue_of([run(0, 3), parcel(1)])
    assert len(queue.clear()) == 2
    assert queue.request_count == 0
