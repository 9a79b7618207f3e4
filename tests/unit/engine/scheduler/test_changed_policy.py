"""A loaded version whose batching changes, and workers that were ended because they hung."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scheduler_harness import DYNAMIC, MS, SchedulerHarness

from forebay.engine.scheduler.route import QUIET_BATCHES
from forebay.ipc.counters import SchedulerCounter
from forebay.ipc.errors import Code
from forebay.ipc.scheduler_messages import BatchingPolicy, InstanceDown, QueuePolicy
from forebay.ipc.wire import FLAG_GONE, FLAG_HUNG, Kind

OBJECTIVE = BatchingPolicy(max_batch_size=8, dynamic=True, preferred_batch_sizes=(8,), objective_us=10_000)
DELAYED = BatchingPolicy(max_batch_size=8, dynamic=True, preferred_batch_sizes=(8,), max_queue_delay_us=10_000)


@pytest.fixture
def engine() -> Iterator[SchedulerHarness]:
    harness = SchedulerHarness()
    harness.add_route(DELAYED)
    harness.add_instance()
    harness.add_producer()
    yield harness
    harness.close()


def test_what_waits_goes_by_the_new_policy_at_once(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 3))
    engine.advance(MS)
    assert engine.batches() == []
    engine.add_route(DYNAMIC)
    (run,) = engine.batch().runs
    assert (run.first, run.requests) == (0, 3)


def test_later_requests_go_by_the_new_policy(engine: SchedulerHarness) -> None:
    engine.add_route(DYNAMIC)
    engine.submit_runs((0, 1))
    engine.finish(engine.batch())
    engine.add_route(DELAYED)
    engine.submit_runs((1, 1))
    assert engine.batches() == []
    engine.advance(10 * MS)
    assert engine.batch().runs[0].first == 1


def test_batch_that_runs_is_finished_under_the_new_policy(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 8))
    batch = engine.batch()
    engine.add_route(DYNAMIC)
    engine.submit_runs((8, 1))
    assert engine.batches() == []
    engine.finish(batch)
    assert engine.batch().runs[0].first == 8


def test_an_objective_may_come_and_go(engine: SchedulerHarness) -> None:
    """Its instances are known to it from the first moment on, and what it refuses is counted as rejected."""
    engine.add_route(OBJECTIVE)
    for first in range(5):
        engine.submit_runs((first, 1))
        batch = engine.batch()
        engine.now_ns += 4 * MS
        engine.finish(batch)
    engine.submit_runs((10, 1))
    batch = engine.batch()
    engine.answers()
    # One batch more has time behind the one that runs, but not two.
    engine.submit_runs((11, 8))
    engine.submit_runs((19, 8))
    (refusal,) = engine.answers()
    assert (refusal.kind, refusal.code) == (Kind.RUNS_FAILED, Code.UNAVAILABLE)
    assert refusal.text.startswith("Exceeds latency objective: ")
    assert engine.counter(SchedulerCounter.REJECTED) == 8
    engine.add_route(DYNAMIC)
    engine.finish(batch)
    assert engine.batch().runs[0].requests == 8


def test_no_instance_is_granted_under_an_objective(engine: SchedulerHarness) -> None:
    """Every batch must be seen to be learned from."""
    engine.add_route(OBJECTIVE)
    for first in range(QUIET_BATCHES + 2):
        engine.submit_runs((first, 1))
        engine.finish(engine.batch())
    assert Kind.GRANT not in {answer.kind for answer in engine.answers()}


def test_what_the_new_policy_has_no_room_for_is_refused(engine: SchedulerHarness) -> None:
    """Spec S-030: the limit holds from the first moment on."""
    engine.submit_runs((0, 1))
    engine.submit_runs((4, 1))
    limited = BatchingPolicy(
        max_batch_size=8,
        dynamic=True,
        preferred_batch_sizes=(8,),
        max_queue_delay_us=10_000,
        default_queue_policy=QueuePolicy(max_queue_size=1),
    )
    engine.add_route(limited)
    (answer,) = engine.answers()
    assert answer.kind == Kind.RUNS_FAILED
    assert answer.code == Code.UNAVAILABLE


def test_grants_are_earned_again_under_a_new_policy(engine: SchedulerHarness) -> None:
    engine.add_route(DYNAMIC)
    for number in range(QUIET_BATCHES):
        engine.submit_runs((number, 1))
        engine.finish(engine.batch())
    assert [answer.kind for answer in engine.answers()] == [Kind.GRANT]
    engine.add_route(DELAYED)
    assert [answer.kind for answer in engine.answers()] == [Kind.REVOKE]


def test_requests_of_a_hung_worker_are_not_to_be_tried_again(engine: SchedulerHarness) -> None:
    engine.add_route(DYNAMIC)
    engine.submit_runs((0, 2))
    engine.submit_parcels(5)
    engine.batch()
    engine.handle(InstanceDown(instance=1, is_hung=True))
    lost, gone = [answer for answer in engine.answers() if answer.kind in (Kind.RUNS_LOST, Kind.REVOKE)]
    assert (lost.kind, lost.flags) == (Kind.RUNS_LOST, FLAG_HUNG)
    assert (gone.kind, gone.flags) == (Kind.REVOKE, FLAG_GONE | FLAG_HUNG)
