"""What a frontend tells the scheduler of requests in rows."""

from __future__ import annotations

from typing import NoReturn

import msgspec
from engine_scene import Rows, Surroundings, play, turn

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.data_plane.slab_set import SlabSet
from forebay.ipc.counters import ProducerCounter
from forebay.ipc.messages import RunSubmit
from forebay.ipc.wire import Kind

MS = 1_000_000


async def runs_with_deadlines(s: Surroundings, objective_us: int, *left_ns: int) -> list[RunSubmit]:
    """Publish a request for each of these times until its deadline, in one turn; return what is sent."""
    s.route.update(msgspec.structs.replace(s.route.entry, objective_us=objective_us))
    now_ns = s.engine.turn_ns()
    for left in left_ns:
        slab, first = s.route.loan(1)
        s.route.publish(slab, first, 1, Rows(), deadline_ns=now_ns - now_ns % MS + left)
    await turn()
    (message,) = s.take_sent()
    return list(message.runs)


def test_deadlines_within_a_models_objective_are_told_and_near_ones_share_a_run() -> None:
    async def scenario(s: Surroundings) -> None:
        runs = await runs_with_deadlines(s, 20_000, 10 * MS + 1, 10 * MS + 400_000, 12 * MS)
        assert [run.requests for run in runs] == [2, 1]
        assert runs[1].deadline_ns - runs[0].deadline_ns == 1_500_000

    play(scenario)


def test_deadlines_that_the_scheduler_has_no_use_for_are_not_told() -> None:
    """Requests with them remain one run; whoever waits takes them back in time."""

    async def scenario(s: Surroundings) -> None:
        for objective_us in (0, 20_000):
            (run,) = await runs_with_deadlines(s, objective_us, 30 * MS, 40 * MS)
            assert (run.requests, run.deadline_ns) == (2, 0)

    play(scenario)


def test_gauges_of_a_frontend_that_died_are_not_those_of_its_successor() -> None:
    gauges = (ProducerCounter.REQUESTS_HELD, ProducerCounter.ROWS_IN_USE, ProducerCounter.BLOCK_BYTES_IN_USE)

    async def scenario(s: Surroundings) -> None:
        for gauge in gauges:
            s.route.counters[gauge] = 5
        RouteClient(s.engine, s.route.entry)
        assert [s.count(gauge) for gauge in gauges] == [0, 0, 0]

    play(scenario)


def test_requests_that_are_kept_back_under_a_grant_are_counted() -> None:
    """M-027: they wait, though not in the scheduler's queue."""

    async def scenario(s: Surroundings) -> None:
        await s.grant()
        s.publish()
        await turn()
        s.publish()
        await turn()
        assert s.route.write_gauges()
        assert s.count(ProducerCounter.REQUESTS_HELD) == 1
        await s.tell_runs(Kind.RUNS_DONE, (0, 1))
        s.route.write_gauges()
        assert s.count(ProducerCounter.REQUESTS_HELD) == 0

    play(scenario)


def test_slabs_that_are_replaced_go_as_they_empty() -> None:
    """Each update of a model of a chain replaces those of the ensemble."""

    async def scenario(s: Surroundings) -> None:
        empty_bytes = s.engine.used_bytes
        slab, first = s.route.loan(1)
        taken_bytes = s.engine.used_bytes
        assert taken_bytes > empty_bytes
        s.route.use_slabs(SlabSet(100, 8, never, never))
        assert s.engine.used_bytes == taken_bytes
        s.route.release(slab, first, 1)
        assert s.engine.used_bytes == empty_bytes

    def never(_what: object) -> NoReturn:
        raise AssertionError("the new ones are not used")

    play(scenario)
