"""What a worker says of single requests in rows: errors and parameters of one, and whose client has left."""

from __future__ import annotations

import msgspec
from engine_scene import PRODUCER, ROUTE, Surroundings, play, turn

from forebay.ipc.catalog import Catalog
from forebay.ipc.counters import ProducerCounter
from forebay.ipc.errors import Code
from forebay.ipc.messages import RowRemark
from forebay.ipc.wire import (
    FLAG_REMARKS,
    GRANTED_BATCH,
    HEADER,
    NO_TIMES,
    Kind,
    Run,
    pack_rows_cancel,
    pack_runs,
)


async def tell_done(s: Surroundings, runs: list[tuple[int, int, int]], remarks: list[RowRemark]) -> None:
    """Tell of (first, rows, requests) that have run."""
    slab = s.route.slabs[-1]
    packed = [Run(PRODUCER, n, slab.base, slab.capacity, first, rows, 0, n * 5) for first, rows, n in runs]
    await s.tell(pack_runs(Kind.RUNS_DONE, FLAG_REMARKS, 11, 1, packed, NO_TIMES) + msgspec.msgpack.encode(remarks))


def test_a_remark_concerns_its_request_alone() -> None:
    async def scenario(s: Surroundings) -> None:
        owners = [s.publish()[0] for _ in range(4)] + [s.publish(2)[0]]
        await turn()
        remarks = [
            RowRemark(run=0, first=1, code=int(Code.NOT_FOUND), text="not this one"),
            RowRemark(run=1, first=4, parameters={"seen": 1}),
        ]
        await tell_done(s, [(0, 4, 4), (4, 2, 1)], remarks)
        assert [owner.end for owner in owners] == ["done", "NOT_FOUND ran", "done", "done", "done"]
        assert owners[1].text == "not this one"
        assert [dict(owner.parameters) for owner in owners] == [{}, {}, {}, {}, {"seen": 1}]
        assert s.count(ProducerCounter.SUCCESS) == 4
        assert s.count(ProducerCounter.FAILED_BACKEND) == 1
        assert s.engine.in_flight_count == 0

    play(scenario)


def test_a_remark_on_rows_that_nobody_waits_for_changes_nothing() -> None:
    async def scenario(s: Surroundings) -> None:
        owner, slab, _first = s.publish()
        await turn()
        remarks = [
            RowRemark(run=0, first=slab.capacity + 5, text="beyond the slab"),
            RowRemark(run=0, first=3, text="nobody's"),
            RowRemark(run=9, first=0, text="of no run"),
        ]
        await tell_done(s, [(0, 1, 1)], remarks)
        assert owner.end == "done"

    play(scenario)


def test_a_granted_worker_that_sees_requests_hears_whose_client_has_left() -> None:
    """P-039: of what it runs now, by the number of the batch."""

    async def scenario(s: Surroundings) -> None:
        entry = msgspec.structs.replace(s.route.entry, sees_requests=True)
        s.engine.update_catalog(Catalog(generation=2, models=(entry,)))
        worker = await s.grant()
        owner, slab, first = s.publish()
        await turn()
        assert worker.recv(4096)[0] == Kind.RUNS
        s.route.cancel_rows(slab, first, owner)
        await turn()
        message = worker.recv(4096)
        assert message == pack_rows_cancel(GRANTED_BATCH | 1, PRODUCER, slab.base, (first,))
        assert HEADER.unpack_from(message)[0] == Kind.CANCEL_ROWS

    play(scenario)


def test_rows_of_models_that_see_requests_are_for_those_that_carry_nothing() -> None:
    async def scenario(s: Surroundings) -> None:
        assert s.route.takes_rows(is_bare=False)
        entry = msgspec.structs.replace(s.route.entry, sees_requests=True)
        s.engine.update_catalog(Catalog(generation=2, models=(entry,)))
        route = s.engine.routes[ROUTE]
        assert [route.takes_rows(is_bare=bare) for bare in (False, True)] == [False, True]

    play(scenario)
