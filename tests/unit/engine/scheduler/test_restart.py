"""A scheduler that follows another asks workers what they have, and producers for what was lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scheduler_harness import SchedulerHarness

from forebay.ipc.scheduler_messages import ProducerDown, Restored
from forebay.ipc.wire import FLAG_RESCHEDULE, FLAG_UNNAMED, HEADER, OPEN, Kind


@pytest.fixture
def restarted() -> Iterator[SchedulerHarness]:
    """A second scheduler, to which everything has just been announced."""
    harness = SchedulerHarness(epoch=2)
    harness.add_route()
    harness.add_instance()
    harness.add_producer()
    yield harness
    harness.close()


def synced(epoch: int = 2, instance: int = 1) -> bytes:
    return HEADER.pack(Kind.SYNCED, 0, 0, instance, epoch)


def test_restarted_scheduler_asks_for_what_was_lost_when_all_workers_have_finished(restarted: SchedulerHarness) -> None:
    restarted.handle(Restored())
    assert [message[0] for message in restarted.messages()] == [Kind.SYNC]
    restarted.submit_runs((0, 1))
    assert restarted.batches() == []
    restarted.done(synced(epoch=1))
    assert restarted.answers() == []
    restarted.done(synced())
    assert [(answer.kind, answer.number) for answer in restarted.answers()] == [(Kind.RESYNC, 2)]
    assert restarted.batch().runs[0].rows == 1


def test_requests_that_are_still_being_answered_are_not_called_in_again(restarted: SchedulerHarness) -> None:
    """Decoupled models answer after their batch; the new scheduler learns of it from the worker."""
    restarted.handle(Restored())
    header = HEADER.pack(Kind.SYNCED, 0, 2, 1, 2)
    restarted.done(header + OPEN.pack(7, 0, 5) + OPEN.pack(8, 0, 6))
    (resync,) = restarted.answers()
    assert (resync.kind, resync.tokens) == (Kind.RESYNC, [5])
    restarted.kill_instance(1)
    assert restarted.answers()[0].tokens == [5]


def unsynced(*parts: tuple[int, int, int], instance: int = 1) -> bytes:
    packed = [OPEN.pack(*part) for part in parts]
    return HEADER.pack(Kind.UNSYNCED, 0, len(parts), instance, 2) + b"".join(packed)


def test_model_that_runs_keeps_only_those_waiting_whose_rows_it_may_run(restarted: SchedulerHarness) -> None:
    """It may wait for what was lost with the last scheduler; what it runs must not be handed in again."""
    restarted.add_producer(8)
    restarted.handle(Restored())
    restarted.done(unsynced((7, FLAG_UNNAMED, 0), (8, 0, 5)))
    assert restarted.answers(7) == []
    (resync,) = restarted.answers(8)
    assert (resync.kind, resync.tokens) == (Kind.RESYNC, [5])
    restarted.submit_parcels(1, producer=8)
    assert restarted.batches() == []
    restarted.close_request(5, producer=8)
    restarted.done(synced())
    assert [answer.kind for answer in restarted.answers(7)] == [Kind.RESYNC]
    assert restarted.answers(8) == []
    assert restarted.batch().tokens == [1]


def test_worker_that_says_nothing_keeps_everybody_waiting(restarted: SchedulerHarness) -> None:
    restarted.add_instance(2)
    restarted.handle(Restored())
    restarted.done(unsynced((8, FLAG_UNNAMED, 0)))
    assert restarted.answers() == []
    restarted.done(synced(instance=2))
    assert [answer.kind for answer in restarted.answers()] == [Kind.RESYNC]


def test_worker_that_said_what_it_runs_and_dies(restarted: SchedulerHarness) -> None:
    restarted.add_producer(8)
    restarted.handle(Restored())
    restarted.done(unsynced((7, FLAG_UNNAMED, 0), (8, 0, 5)))
    restarted.answers(8)
    restarted.kill_instance(1)
    assert Kind.RESYNC in [answer.kind for answer in restarted.answers(7)]
    lost, _gone = restarted.answers(8)
    assert (lost.kind, lost.tokens) == (Kind.PARCEL_LOST, [5])


def test_what_a_worker_named_and_answered_unnoticed_is_not_open(restarted: SchedulerHarness) -> None:
    restarted.handle(Restored())
    restarted.done(unsynced((7, 0, 5)))
    restarted.done(synced())
    restarted.answers()
    restarted.kill_instance(1)
    assert [answer.kind for answer in restarted.answers()] == [Kind.REVOKE]


def test_request_of_the_last_scheduler_that_a_model_wants_again_is_handed_in_again(
    restarted: SchedulerHarness,
) -> None:
    restarted.handle(Restored())
    restarted.done(unsynced((7, 0, 5)))
    restarted.done(HEADER.pack(Kind.CLOSED, 0, 1, 1, 0) + OPEN.pack(7, FLAG_RESCHEDULE, 5))
    assert [(answer.kind, answer.tokens) for answer in restarted.answers()][1:] == [(Kind.PARCEL_LOST, [5])]


def test_who_left_is_not_asked(restarted: SchedulerHarness) -> None:
    restarted.add_producer(8)
    restarted.handle(Restored())
    restarted.done(unsynced((8, FLAG_UNNAMED, 0)))
    restarted.handle(ProducerDown(producer=8))
    restarted.done(synced())
    assert [answer.kind for answer in restarted.answers(7)] == [Kind.RESYNC]


def test_late_submission_of_who_is_asked_later_is_dropped(restarted: SchedulerHarness) -> None:
    restarted.handle(Restored())
    restarted.done(unsynced((7, FLAG_UNNAMED, 0)))
    restarted.submit_runs((0, 1), epoch=1)
    assert restarted.answers() == []
    restarted.done(synced())
    assert [answer.kind for answer in restarted.answers()] == [Kind.RESYNC]
    assert restarted.batches() == []


def test_resync_comes_once(restarted: SchedulerHarness) -> None:
    """Who hands in again what is not lost runs it twice."""
    restarted.handle(Restored())
    restarted.done(synced())
    restarted.answers()
    restarted.add_instance(2)
    restarted.kill_instance(2)
    assert [answer.kind for answer in restarted.answers()] == [Kind.REVOKE]


def test_worker_that_dies_while_syncing_holds_nobody_up(restarted: SchedulerHarness) -> None:
    restarted.add_instance(2)
    restarted.handle(Restored())
    restarted.done(synced())
    restarted.kill_instance(2)
    assert Kind.RESYNC in [answer.kind for answer in restarted.answers()]


def test_late_submission_to_the_last_scheduler_is_called_in_again(restarted: SchedulerHarness) -> None:
    """A frontend that was told of the last scheduler while this one was starting."""
    restarted.handle(Restored())
    restarted.submit_runs((0, 1), epoch=1)
    restarted.done(synced())
    restarted.answers()
    restarted.submit_runs((0, 1), epoch=1)
    assert [(answer.kind, answer.number) for answer in restarted.answers()] == [(Kind.RESYNC, 2)]
    assert restarted.batches() == []


def test_batches_and_grants_are_numbered_apart_from_those_of_the_last_scheduler(restarted: SchedulerHarness) -> None:
    restarted.handle(Restored())
    restarted.done(synced())
    restarted.answers()
    restarted.submit_runs((0, 1))
    assert restarted.batch().number > 1 << 48
