"""The scheduler's core on socket pairs: batches, grants, losses, cancellation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scheduler_harness import DYNAMIC, MS, ROUTE, Batch, SchedulerHarness

from forebay.engine.scheduler.route import QUIET_BATCHES
from forebay.ipc.counters import SchedulerCounter
from forebay.ipc.errors import Code
from forebay.ipc.messages import Cancel, GrantReturned, RowsCancel
from forebay.ipc.scheduler_messages import (
    BatchingPolicy,
    Drained,
    Explain,
    Explained,
    InstanceDrain,
    ProducerDown,
    QueuePolicy,
    Resource,
    RouteDrain,
    RouteGone,
)
from forebay.ipc.wire import (
    FLAG_GONE,
    HEAD_BYTES_MAX,
    HEADER,
    MESSAGE_BYTES_MAX,
    Kind,
)


@pytest.fixture
def engine() -> Iterator[SchedulerHarness]:
    """One dynamic model with one instance, and one frontend."""
    harness = SchedulerHarness()
    harness.add_route()
    harness.add_instance()
    harness.add_producer()
    yield harness
    harness.close()


# --- batches


def test_neighbouring_rows_of_one_turn_are_one_segment(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 2), (2, 3))
    (run,) = engine.batch().runs
    assert (run.first, run.rows, run.requests) == (0, 5, 5)


def test_requests_that_wait_for_an_instance_are_batched_together(engine: SchedulerHarness) -> None:
    """Spec S-019."""
    engine.submit_runs((0, 1))
    first = engine.batch()
    engine.submit_runs((1, 1))
    engine.submit_runs((2, 1))
    assert engine.batches() == []
    assert engine.counter(SchedulerCounter.PENDING) == 2
    engine.finish(first)
    assert [run.rows for run in engine.batch().runs] == [2]
    assert engine.counter(SchedulerCounter.PENDING) == 0


def test_instances_run_at_the_same_time(engine: SchedulerHarness) -> None:
    """Spec S-003, S-023."""
    engine.add_instance(2)
    engine.submit_runs((0, 20))
    assert [sum(run.rows for run in engine.batch(instance).runs) for instance in (1, 2)] == [8, 8]


def test_delay_ends_by_an_alarm(engine: SchedulerHarness) -> None:
    """Spec S-017, L-005."""
    policy = BatchingPolicy(max_batch_size=8, dynamic=True, preferred_batch_sizes=(8,), max_queue_delay_us=5000)
    engine.add_route(policy, route=9)
    engine.add_instance(9, route=9)
    engine.submit_runs((0, 1), route=9)
    assert engine.batches(9) == []
    assert engine.alarm_ns == engine.now_ns + 5 * MS
    engine.advance(5 * MS)
    assert engine.batch(9).runs[0].rows == 1
    assert engine.alarm_ns == 0


def test_model_waits_for_the_requests_that_a_test_wants_together() -> None:
    """Spec S-035: once, until so many wait."""
    engine = SchedulerHarness(hold_back_requests=3)
    engine.add_route()
    engine.add_instance()
    engine.add_producer()
    engine.submit_parcels(1)
    engine.submit_parcels(2)
    assert engine.batches() == []
    engine.submit_parcels(3)
    batch = engine.batch()
    assert batch.tokens == [1, 2, 3]
    engine.finish(batch)
    engine.submit_parcels(4)
    assert engine.batch().tokens == [4]
    engine.close()


def test_heads_that_do_not_fit_one_message_go_into_two_batches(engine: SchedulerHarness) -> None:
    engine.submit_parcels(0)
    batch = engine.batch()
    engine.submit_parcels(*range(1, 9), head=b"x" * HEAD_BYTES_MAX)
    engine.finish(batch)
    (message,) = engine.messages()
    assert len(message) <= MESSAGE_BYTES_MAX
    count, number = HEADER.unpack_from(message)[2], HEADER.unpack_from(message)[4]
    assert 1 < count < 8
    engine.finish(Batch(number, [], [], []))
    assert engine.batch().tokens == list(range(1 + count, 9))


def test_head_that_is_too_large_is_refused(engine: SchedulerHarness) -> None:
    engine.submit_parcels(1, head=b"x" * (HEAD_BYTES_MAX + 1))
    (answer,) = engine.answers()
    assert (answer.tokens, answer.code) == ([1], Code.INVALID_ARG)


def test_explain_tells_why_each_batch_was_closed(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 1))
    batch = engine.batch()
    engine.advance(3 * MS)
    engine.submit_runs((1, 8))
    engine.advance(2 * MS)
    engine.finish(batch)
    engine.handle(Explain(route=ROUTE, request=5))
    (explained,) = [message for message in engine.told if isinstance(message, Explained)]
    first, second = explained.batches
    assert (first["reason"], first["rows"], first["run_ns"], first["oldest_wait_ns"]) == ("instance idle", 1, 5, 0)
    assert (second["reason"], second["rows"], second["oldest_wait_ns"]) == ("preferred size", 8, 2 * MS)


# --- refusals


def test_full_queue_refuses_at_once(engine: SchedulerHarness) -> None:
    """Spec S-025."""
    policy = BatchingPolicy(max_batch_size=8, dynamic=True, default_queue_policy=QueuePolicy(max_queue_size=2))
    engine.add_route(policy, route=9)
    engine.add_instance(9, route=9)
    engine.submit_runs((0, 2), route=9)
    engine.submit_runs((2, 3), route=9)
    (answer,) = engine.answers()
    assert (answer.kind, answer.code, answer.text) == (Kind.RUNS_FAILED, Code.UNAVAILABLE, "Exceeds maximum queue size")
    assert [(run.first, run.requests) for run in answer.runs] == [(4, 1)]


def test_expired_request_is_answered_at_its_time_while_every_instance_is_busy(engine: SchedulerHarness) -> None:
    """Spec S-026, L-005: Triton notices some half a second later."""
    policy = BatchingPolicy(max_batch_size=8, dynamic=True, default_queue_policy=QueuePolicy(default_timeout_us=10_000))
    engine.add_route(policy, route=9)
    engine.add_instance(9, route=9)
    engine.submit_parcels(1, route=9)
    engine.submit_parcels(2, route=9)
    engine.advance(10 * MS)
    (answer,) = engine.answers()
    assert (answer.tokens, answer.code, answer.text) == ([2], Code.UNAVAILABLE, "Request timeout expired")


def test_timeouts_of_others_are_kept_when_a_route_goes(engine: SchedulerHarness) -> None:
    """L-005: the alarm that was set for it alone must not be the last one."""
    for route, timeout_us in ((8, 10_000), (9, 20_000)):
        queue_policy = QueuePolicy(default_timeout_us=timeout_us)
        engine.add_route(BatchingPolicy(max_batch_size=8, dynamic=True, default_queue_policy=queue_policy), route=route)
        engine.add_instance(route, route=route)
        engine.submit_parcels(route * 10, route=route)
        engine.submit_parcels(route * 10 + 1, route=route)
    engine.handle(RouteGone(route=8, code=Code.UNAVAILABLE, text="unloaded"))
    assert engine.alarm_ns == engine.now_ns + 20 * MS


def test_unknown_route_and_route_without_instances_refuse(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 1), route=99)
    engine.add_route(route=9)
    engine.submit_parcels(1, route=9)
    assert [answer.code for answer in engine.answers()] == [Code.UNAVAILABLE, Code.UNAVAILABLE]


def test_unloaded_route_fails_what_waits(engine: SchedulerHarness) -> None:
    engine.submit_parcels(1)
    engine.submit_parcels(2)
    engine.handle(RouteGone(route=ROUTE, code=Code.UNAVAILABLE, text="unloaded"))
    (answer,) = engine.answers()
    assert (answer.tokens, answer.text) == ([2], "unloaded")


# --- cancellation


def test_cancelled_parcel_leaves_the_queue(engine: SchedulerHarness) -> None:
    """Spec S-033, S-180."""
    engine.submit_parcels(1)
    batch = engine.batch()
    engine.submit_parcels(2, 3)
    engine.accept(Cancel(producer=7, tokens=(2,)))
    (answer,) = engine.answers()
    assert (answer.tokens, answer.code) == ([2], Code.CANCELLED)
    assert engine.counter(SchedulerCounter.CANCELED) == 1
    engine.finish(batch)
    assert engine.batch().tokens == [3]


def test_worker_hears_of_a_running_parcel_that_was_cancelled(engine: SchedulerHarness) -> None:
    """Spec S-182."""
    engine.submit_parcels(1)
    engine.batch()
    engine.accept(Cancel(producer=7, tokens=(1,)))
    (message,) = engine.messages()
    assert message[0] == Kind.CANCEL
    assert engine.answers() == []


def test_worker_hears_of_a_cancelled_request_that_a_decoupled_model_still_answers(engine: SchedulerHarness) -> None:
    engine.submit_parcels(1)
    engine.finish(engine.batch(), left_open=[(7, 1)])
    engine.accept(Cancel(producer=7, tokens=(1,)))
    assert [message[0] for message in engine.messages()] == [Kind.CANCEL]
    engine.close_request(1)
    engine.accept(Cancel(producer=7, tokens=(1,)))
    assert engine.messages() == []


def test_cancelled_rows_leave_the_queue_and_their_neighbours_stay(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 1))
    batch = engine.batch()
    engine.submit_runs((1, 4))
    engine.accept(Cancel(producer=7, rows=(RowsCancel(ROUTE, 4096, (0, 2, 9)),)))
    (answer,) = engine.answers()
    assert (answer.kind, answer.code) == (Kind.RUNS_FAILED, Code.CANCELLED)
    assert [(run.first, run.rows) for run in answer.runs] == [(2, 1)]
    engine.finish(batch)
    assert [(run.first, run.rows) for run in engine.batch().runs] == [(1, 1), (3, 2)]


def test_rows_of_another_producer_are_not_cancelled(engine: SchedulerHarness) -> None:
    engine.add_producer(8)
    engine.submit_runs((0, 1))
    engine.submit_runs((1, 1))
    engine.accept(Cancel(producer=8, rows=(RowsCancel(ROUTE, 4096, (1,)),)))
    assert engine.answers() == []


# --- losses


def test_requests_of_a_dead_worker_are_reported_lost(engine: SchedulerHarness) -> None:
    engine.add_instance(2)
    engine.submit_runs((0, 2))
    engine.submit_parcels(5)
    batches = {instance: engine.batches(instance) for instance in (1, 2)}
    (victim,) = [instance for instance, given in batches.items() if given[0].runs]
    engine.kill_instance(victim)
    lost, gone = engine.answers()
    assert (lost.kind, lost.instance, lost.number) == (Kind.RUNS_LOST, victim, batches[victim][0].number)
    assert [(run.first, run.rows) for run in lost.runs] == [(0, 2)]
    assert (gone.kind, gone.flags) == (Kind.REVOKE, FLAG_GONE)
    engine.kill_instance(3 - victim)
    assert engine.answers()[0].tokens == [5]
    assert engine.counter(SchedulerCounter.LOST_BATCHES) == 2


def test_finished_batch_is_not_lost(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 1))
    engine.finish(engine.batch())
    engine.kill_instance(1)
    assert [answer.kind for answer in engine.answers()] == [Kind.REVOKE]


def test_request_that_a_dead_worker_had_left_open_is_lost(engine: SchedulerHarness) -> None:
    """A decoupled model answers after its batch."""
    engine.submit_parcels(1, 2)
    engine.finish(engine.batch(), left_open=[(7, 1), (7, 2)])
    engine.close_request(2)
    engine.kill_instance(1)
    assert engine.answers()[0].tokens == [1]


def test_dead_producer_is_forgotten(engine: SchedulerHarness) -> None:
    engine.add_producer(8)
    engine.submit_runs((0, 1), producer=8)
    batch = engine.batch()
    engine.submit_runs((0, 3), producer=8)
    engine.submit_runs((0, 1))
    engine.handle(ProducerDown(producer=8))
    engine.finish(batch)
    assert [(run.producer, run.rows) for run in engine.batch().runs] == [(7, 1)]


# --- draining


def test_drained_when_nothing_waits_runs_or_is_open(engine: SchedulerHarness) -> None:
    engine.submit_parcels(1)
    batch = engine.batch()
    engine.submit_parcels(2)
    engine.handle(RouteDrain(route=ROUTE))
    engine.finish(batch)
    assert engine.told == []
    engine.finish(engine.batch(), left_open=[(7, 2)])
    assert engine.told == []
    engine.close_request(2)
    assert engine.told == [Drained(route=ROUTE)]


def test_drained_instance_gets_nothing_more(engine: SchedulerHarness) -> None:
    engine.add_instance(2)
    engine.submit_parcels(1)
    (busy,) = [instance for instance in (1, 2) if (batches := engine.batches(instance)) and (batch := batches[0])]
    engine.handle(InstanceDrain(instance=busy))
    assert engine.told == []
    engine.finish(batch, busy)
    assert engine.told == [Drained(instance=busy)]
    engine.submit_parcels(*range(2, 20))
    assert engine.batches(busy) == []
    assert len(engine.batches(3 - busy)) == 1


# --- grants


def grant(engine: SchedulerHarness) -> int:
    """Be quiet long enough to be granted instance 1; return the grant's generation."""
    for row in range(QUIET_BATCHES):
        engine.submit_runs((row, 1))
        engine.finish(engine.batch())
    (answer,) = engine.answers()
    assert (answer.kind, answer.instance) == (Kind.GRANT, 1)
    return answer.generation


def test_quiet_producer_is_granted_the_instance_and_gives_it_back_when_asked(engine: SchedulerHarness) -> None:
    generation = grant(engine)
    engine.add_producer(8)
    engine.submit_runs((0, 1), producer=8)
    (revoke,) = engine.answers()
    assert (revoke.kind, revoke.generation, revoke.flags) == (Kind.REVOKE, generation, 0)
    assert engine.batches() == []
    engine.accept(GrantReturned(producer=7, instance=1, generation=generation - 1))
    assert engine.batches() == []
    engine.accept(GrantReturned(producer=7, instance=1, generation=generation))
    assert engine.batch().runs[0].producer == 8


def test_grant_of_a_dead_instance_or_producer_ends(engine: SchedulerHarness) -> None:
    grant(engine)
    engine.add_producer(8)
    engine.handle(ProducerDown(producer=7))
    engine.submit_runs((0, 1), producer=8)
    assert engine.batch().runs[0].producer == 8


def test_models_whose_policies_need_the_scheduler_are_never_granted(engine: SchedulerHarness) -> None:
    policies = [
        BatchingPolicy(max_batch_size=8, dynamic=True, max_queue_delay_us=1),
        BatchingPolicy(max_batch_size=8, dynamic=True, priority_levels=2, default_priority_level=1),
        BatchingPolicy(max_batch_size=8, dynamic=True, preserve_ordering=True),
        *(
            BatchingPolicy(max_batch_size=8, dynamic=True, default_queue_policy=queue_policy)
            for queue_policy in (
                QueuePolicy(max_queue_size=9),
                QueuePolicy(default_timeout_us=1_000_000),
                QueuePolicy(allow_timeout_override=True),
            )
        ),
    ]
    for number, policy in enumerate(policies, 20):
        engine.add_route(policy, route=number)
        engine.add_instance(number, route=number)
        for row in range(QUIET_BATCHES + 2):
            engine.submit_runs((row, 1), route=number)
            engine.advance(MS)
            engine.finish(engine.batch(number), number)
    engine.add_route(DYNAMIC, route=30, extra={"decoupled": True})
    engine.add_instance(30, route=30)
    for row in range(QUIET_BATCHES + 2):
        engine.submit_runs((row, 1), route=30)
        engine.finish(engine.batch(30), 30)
    assert engine.answers() == []


# --- rate limiter


def limited(*limits: Resource) -> SchedulerHarness:
    engine = SchedulerHarness(is_rate_limited=True, resources=limits)
    engine.add_producer()
    return engine


def held_up() -> SchedulerHarness:
    """Return two models that share a resource; the first one has it, for its parcel 1."""
    engine = limited()
    for number in (1, 2):
        engine.add_route(route=number)
        engine.add_instance(number, route=number, resources=(Resource("R", 1),))
    engine.submit_parcels(1, route=1)
    return engine


def both_asked() -> SchedulerHarness:
    """Return the same; the second one has a batch too, with parcel 2."""
    engine = held_up()
    engine.submit_parcels(2, route=2)
    return engine


def test_global_resource_keeps_two_models_apart() -> None:
    """Spec S-152, S-154."""
    engine = both_asked()
    batch = engine.batch(1)
    assert engine.batches(2) == []
    engine.finish(batch, 1)
    assert engine.batch(2).tokens == [2]
    engine.close()


def test_cancelled_parcels_are_cut_out_of_a_batch_that_waits_for_resources() -> None:
    """Spec S-181: the batch is formed, but has not started."""
    engine = held_up()
    first = engine.batch(1)
    engine.submit_parcels(2, 3, 4, route=2)
    engine.accept(Cancel(producer=7, tokens=(3,)))
    (answer,) = engine.answers()
    assert (answer.tokens, answer.code) == ([3], Code.CANCELLED)
    engine.finish(first, 1)
    assert engine.batch(2).tokens == [2, 4]
    assert engine.messages(2) == []
    engine.close()


def test_cancelled_rows_are_cut_out_of_a_batch_that_waits_for_resources() -> None:
    """Spec S-181."""
    engine = held_up()
    first = engine.batch(1)
    engine.submit_runs((0, 4), route=2)
    engine.accept(Cancel(producer=7, rows=(RowsCancel(2, 4096, (1,)),)))
    (answer,) = engine.answers()
    assert [(run.first, run.requests) for run in answer.runs] == [(1, 1)]
    engine.finish(first, 1)
    assert [(run.first, run.requests) for run in engine.batch(2).runs] == [(0, 1), (2, 2)]
    engine.close()


def test_an_instance_whose_whole_batch_is_cancelled_waits_for_no_resources() -> None:
    """Spec S-181."""
    engine = held_up()
    first = engine.batch(1)
    engine.submit_parcels(2, route=2)
    engine.accept(Cancel(producer=7, tokens=(2,)))
    assert [answer.tokens for answer in engine.answers()] == [[2]]
    engine.finish(first, 1)
    assert engine.batches(2) == []
    engine.submit_parcels(5, route=2)
    assert engine.batch(2).tokens == [5]
    engine.close()


def test_nobody_gets_past_the_rate_limiter_by_a_grant() -> None:
    """Spec S-152: however quiet it is."""
    engine = limited()
    engine.add_route()
    engine.add_instance(resources=(Resource("R", 1),))
    for row in range(QUIET_BATCHES + 2):
        engine.submit_runs((row, 1))
        engine.finish(engine.batch())
    assert engine.answers() == []
    engine.close()


def test_set_limit_lets_more_run() -> None:
    """Spec S-152: ``--rate-limit-resource``."""
    engine = limited(Resource("R", 2))
    engine.add_route(route=1)
    for number in (1, 2, 3):
        engine.add_instance(number, route=1, resources=(Resource("R", 1),))
    engine.submit_parcels(*range(24), route=1)
    assert sorted(len(engine.batches(number)) for number in (1, 2, 3)) == [0, 1, 1]
    engine.close()


def test_executions_times_priority_decide_whose_turn_it_is() -> None:
    """Spec S-151: weights 1 and 2 give shares of 2 to 1."""
    engine = limited()
    engine.add_route(BatchingPolicy(), route=1)
    engine.add_route(BatchingPolicy(), route=2)
    engine.add_instance(1, route=1, resources=(Resource("R", 1),), priority=1)
    engine.add_instance(2, route=2, resources=(Resource("R", 1),), priority=2)
    for number in (1, 2):
        engine.submit_parcels(*range(30), route=number)
    ran: list[int] = []
    for _ in range(12):
        (instance,) = [number for number in (1, 2) if (given := engine.batches(number)) and (batch := given[0])]
        ran.append(instance)
        engine.finish(batch, instance)
    assert (ran.count(1), ran.count(2)) == (8, 4)
    engine.close()


def test_dead_instance_gives_its_resources_back() -> None:
    engine = both_asked()
    engine.batch(1)
    engine.kill_instance(1)
    assert engine.batch(2).tokens == [2]
    engine.close()


def test_instance_that_waits_for_resources_loses_its_batch_when_it_dies() -> None:
    engine = both_asked()
    batch = engine.batch(1)
    engine.kill_instance(2)
    assert engine.answers()[0].tokens == [2]
    engine.finish(batch, 1)
    engine.submit_parcels(3, route=1)
    assert engine.batch(1).tokens == [3]
    engine.close()
