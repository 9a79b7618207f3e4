"""Grants of shared-memory clients: what they ring is not told to the scheduler, and may outlive the grant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scheduler_harness import DYNAMIC, SchedulerHarness

from forebay.engine.scheduler.route import QUIET_BATCHES
from forebay.ipc.messages import Cancel
from forebay.ipc.scheduler_messages import Drained, InstanceDrain
from forebay.ipc.wire import FLAG_GONE, HEADER, OPEN, TOKEN, Kind

CLIENT, OTHER = 3, 7


@pytest.fixture(name="engine")
def engine_with_a_grant() -> Iterator[SchedulerHarness]:
    """An engine that has granted its instance 1 to the client."""
    harness = SchedulerHarness()
    harness.add_route(DYNAMIC)
    harness.add_instance()
    harness.add_client(CLIENT, 1)
    harness.add_producer(OTHER)
    for token in range(QUIET_BATCHES):
        harness.submit_parcels(token, producer=CLIENT)
        harness.finish(harness.batch())
    assert [answer.kind for answer in harness.answers(CLIENT)] == [Kind.GRANT]
    harness.messages()
    yield harness
    harness.close()


def end_grant(engine: SchedulerHarness) -> None:
    """Have another producer served by the instance."""
    engine.submit_parcels(50, producer=OTHER)
    assert [message[0] for message in engine.messages()] == [Kind.RING_CLOSE, Kind.PARCELS]


def test_cancelled_parcel_is_told_to_the_worker_that_was_rung_for_it(engine: SchedulerHarness) -> None:
    end_grant(engine)
    engine.accept(Cancel(producer=CLIENT, tokens=(11,)))
    assert engine.messages() == [HEADER.pack(Kind.CANCEL, 0, 1, CLIENT, 0) + TOKEN.pack(11)]


def test_client_hears_that_the_worker_is_gone_also_after_its_grant(engine: SchedulerHarness) -> None:
    end_grant(engine)
    engine.kill_instance(1)
    assert [(answer.kind, answer.flags) for answer in engine.answers(CLIENT)] == [(Kind.REVOKE, FLAG_GONE)]


def test_clients_without_a_grant_hear_nothing_of_the_worker(engine: SchedulerHarness) -> None:
    engine.add_client(4, 1)
    engine.accept(Cancel(producer=4, tokens=(11,)))
    assert engine.messages() == []
    engine.kill_instance(1)
    assert engine.answers(4) == []


def opened(engine: SchedulerHarness, token: int) -> None:
    """Say that the worker has run what it was rung for, and will answer it later."""
    engine.done(HEADER.pack(Kind.OPENED, 0, 1, 1, 0) + OPEN.pack(CLIENT, 0, token))


def test_what_is_answered_later_is_lost_with_the_worker(engine: SchedulerHarness) -> None:
    opened(engine, 11)
    engine.kill_instance(1)
    lost, revoke = engine.answers(CLIENT)
    assert (lost.kind, lost.tokens, revoke.kind) == (Kind.PARCEL_LOST, [11], Kind.REVOKE)


def test_worker_is_not_drained_before_all_is_answered(engine: SchedulerHarness) -> None:
    opened(engine, 11)
    engine.handle(InstanceDrain(instance=1))
    assert Drained(instance=1) not in engine.told
    engine.close_request(11, producer=CLIENT)
    assert Drained(instance=1) in engine.told


def test_worker_with_a_full_doorbell_gets_its_batch_as_soon_as_it_reads(engine: SchedulerHarness) -> None:
    """What any client may have it told does not wait without bounds, and nothing is rung behind the batch."""
    while not engine.core.has_lagging:
        engine.accept(Cancel(producer=CLIENT, tokens=(11,)))
    end_of_grant = len(engine.messages())
    engine.core.flush_lagging()
    engine.messages()
    for _ in range(end_of_grant + 3000):
        engine.accept(Cancel(producer=CLIENT, tokens=(11,)))
    engine.submit_parcels(50, producer=OTHER)
    told: list[bytes] = []
    while engine.core.has_lagging:
        told += engine.messages()
        engine.core.flush_lagging()
    told += engine.messages()
    assert [message[0] for message in told[-2:]] == [Kind.RING_CLOSE, Kind.PARCELS]
    assert len(told) < end_of_grant + 1500
