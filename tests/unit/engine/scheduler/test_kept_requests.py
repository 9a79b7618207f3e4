"""Models that get requests one by one, in rows: where one ends stays visible, and they hear of cancellations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scheduler_harness import DYNAMIC, ROUTE, SchedulerHarness

from forebay.ipc.errors import Code
from forebay.ipc.messages import Cancel, RowsCancel
from forebay.ipc.scheduler_messages import RouteUp
from forebay.ipc.wire import Kind, pack_rows_cancel


@pytest.fixture(name="engine")
def engine_that_keeps_requests() -> Iterator[SchedulerHarness]:
    harness = SchedulerHarness()
    harness.handle(RouteUp(route=ROUTE, name="model", version=1, batching=DYNAMIC, keeps_requests=True))
    harness.add_instance()
    harness.add_producer()
    yield harness
    harness.close()


def test_runs_are_joined_only_if_their_requests_have_equally_many_rows(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 1))
    first = engine.batch()
    engine.submit_runs((1, 2))
    engine.submit_runs((3, 1))
    engine.submit_runs((4, 1), rows=2)
    engine.finish(first)
    assert [(run.first, run.requests, run.rows) for run in engine.batch().runs] == [(1, 3, 3), (4, 1, 2)]


def test_the_worker_hears_of_cancelled_rows_that_it_runs(engine: SchedulerHarness) -> None:
    """P-039"""
    engine.submit_runs((0, 3))
    batch = engine.batch()
    engine.accept(Cancel(producer=7, rows=(RowsCancel(ROUTE, 4096, (1, 9)),)))
    assert engine.messages() == [pack_rows_cancel(batch.number, 7, 4096, (1,))]
    assert engine.answers() == []
    engine.finish(batch)
    engine.accept(Cancel(producer=7, rows=(RowsCancel(ROUTE, 4096, (1,)),)))
    assert engine.messages() == []


def test_a_request_that_ended_the_only_instance_hears_so(engine: SchedulerHarness) -> None:
    engine.submit_runs((0, 1))
    engine.batch()
    engine.kill_instance(1)
    assert [answer.kind for answer in engine.answers()][:1] == [Kind.RUNS_LOST]
    engine.submit_runs((0, 1), attempt=1)
    (answer,) = engine.answers()
    assert (answer.code, answer.text) == (
        Code.INTERNAL, "an instance of model 'model' ended unexpectedly while it ran the request",
    )  # fmt: skip
    engine.submit_runs((1, 1))
    (answer,) = engine.answers()
    assert answer.code == Code.UNAVAILABLE
