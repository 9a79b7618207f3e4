"""The ends of requests in slab rows: done, failed, or lost with their worker."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from forebay.frontend.data_plane.owners import OwnedSlab
from forebay.frontend.data_plane.recovery import ATTEMPTS_MAX, gave_up
from forebay.frontend.data_plane.turn_run import TurnRun
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.counting import count_answered, count_failure
from forebay.ipc.errors import ServingError, from_wire
from forebay.ipc.messages import RowRemark
from forebay.ipc.wire import RUN, TIMES_END, Run, unpack_runs

if TYPE_CHECKING:
    from forebay.frontend.data_plane.core_sharing import Pace
    from forebay.frontend.data_plane.route_client import RouteClient
    from forebay.frontend.engine_client import EngineClient


_decode_remarks = msgspec.msgpack.Decoder(list[RowRemark]).decode
#: Rows whose answers take so long that those of others are looked for in between.
_MANY_ROWS = 8
_NO_REMARKS: dict[int, list[RowRemark]] = {}


def _read_remarks(message: memoryview, count: int) -> dict[int, list[RowRemark]]:
    """Return what a RUNS_DONE says of single requests, by the index of their run."""
    by_run: dict[int, list[RowRemark]] = {}
    for remark in _decode_remarks(message[TIMES_END + count * RUN.size :]):
        by_run.setdefault(remark.run, []).append(remark)
    return by_run


class RowAnswers:
    """Gives requests in rows their answers."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        #: By instance: the last batch of ours that it answered.
        self._answered_batches: dict[int, int] = {}

    def done(self, message: memoryview, count: int, instance: int, batch: int, *, has_remarks: bool) -> None:
        """Take in a RUNS_DONE message."""
        self._answered_batches[instance] = batch
        now_ns = time.monotonic_ns()
        slabs, cores = self._engine.slabs, self._engine.cores
        cores.answering = instance
        remarks = _read_remarks(message, count) if has_remarks else _NO_REMARKS
        pace: Pace | None = None
        elapsed_ns = 0
        for index in range(count):
            _producer, requests, base, _capacity, first, rows, _attempt, enqueue_sum_ns = RUN.unpack_from(
                message, TIMES_END + index * RUN.size
            )
            found = slabs.get(base)
            if found is None:
                continue
            route, slab = found
            enqueue_ns = enqueue_sum_ns // requests
            pace, elapsed_ns = route.pace, now_ns - enqueue_ns
            if index in remarks:
                requests -= self._answer_remarked(route, slab, remarks[index], elapsed_ns)
            self._answer_rows(slab, first, rows)
            route.release(slab, first, rows)
            if requests:
                count_answered(route.counters, requests, requests * elapsed_ns)
                if route.details is not None:
                    route.details.answered(requests, elapsed_ns, enqueue_ns, self._engine.reply_times())
            route.write_counters()
        self._engine.grants.runs_ended(instance)
        cores.answering = 0
        if pace is not None:
            cores.ended(pace, elapsed_ns, now_ns)

    def _answer_rows(self, slab: OwnedSlab, first: int, rows: int) -> None:
        """Call everybody who waits for one of these rows."""
        owners = slab.owners
        is_long = rows >= _MANY_ROWS or self._engine.crowded_routes
        between_answers = self._engine.between_answers if is_long else None
        for row in range(first, first + rows):
            owner = owners[row]
            if owner is not None:
                owners[row] = None
                owner.rows_done(slab, row)
                if between_answers is not None:
                    between_answers()

    @staticmethod
    def _answer_remarked(route: RouteClient, slab: OwnedSlab, remarks: list[RowRemark], elapsed_ns: int) -> int:
        """Answer those requests of a run that something is said of; return how many of them failed."""
        failed = 0
        for remark in remarks:
            owner = slab.owners[remark.first] if 0 <= remark.first < slab.capacity else None
            if owner is None:
                continue
            slab.owners[remark.first] = None
            if not remark.text:
                owner.rows_done(slab, remark.first, remark.parameters)
                continue
            failed += 1
            error = from_wire(remark.code, remark.text)
            count_failure(route.counters, error, 1, max(elapsed_ns, 0), ran=True)
            owner.rows_failed(slab, remark.first, error, ran=True)
        return failed

    def failed(self, message: memoryview, count: int, instance: int, batch: int) -> None:
        """Take in a RUNS_FAILED message; the instance is 0 if no worker had the rows."""
        if instance:
            self._answered_batches[instance] = batch
        now_ns = time.monotonic_ns()
        end = TIMES_END + count * RUN.size
        error = from_wire(message[end], bytes(message[end + 1 :]).decode(errors="replace"))
        for run in unpack_runs(message, count, TIMES_END):
            found = self._engine.slabs.get(run.base)
            if found is None:
                continue
            route, slab = found
            elapsed_ns = max(run.requests * now_ns - run.enqueue_sum_ns, 0)
            count_failure(route.counters, error, run.requests, elapsed_ns, ran=instance != 0)
            self._fail_rows(route, slab, run.first, run.rows, error, ran=instance != 0)
        if instance:
            self._engine.grants.runs_ended(instance)

    def lost(self, message: memoryview, count: int, instance: int, batch: int, *, is_hung: bool) -> None:
        """Take in a RUNS_LOST message."""
        # A worker may die when it has answered us and not yet told the scheduler: the rows may be others' by now.
        if self._answered_batches.get(instance) != batch:
            for run in unpack_runs(message, count, TIMES_END):
                self.run_lost(run, is_hung=is_hung)

    def forget_worker(self, instance: int) -> None:
        """Its successor numbers its batches anew."""
        self._answered_batches.pop(instance, None)

    def fail(
        self, route: RouteClient, slab: OwnedSlab, first: int, rows: int, error: ServingError, *, requests: int = 1
    ) -> None:
        """Answer requests in rows that never reached the scheduler."""
        count_failure(route.counters, error, requests, 0, ran=False)
        self._fail_rows(route, slab, first, rows, error, ran=False)

    @staticmethod
    def _fail_rows(
        route: RouteClient, slab: OwnedSlab, first: int, rows: int, error: ServingError, *, ran: bool
    ) -> None:
        for row in range(first, first + rows):
            owner = slab.owners[row]
            if owner is not None:
                slab.owners[row] = None
                owner.rows_failed(slab, row, error, ran=ran)
        route.release(slab, first, rows)

    def run_lost(self, run: Run, *, is_hung: bool) -> None:
        """The worker that had these rows is gone: hand each request in again, or fail it the second time."""
        found = self._engine.slabs.get(run.base)
        if found is None or run.first + run.rows > found[1].capacity:
            return
        route, slab = found
        if all(slab.owners[row] is None for row in range(run.first, run.first + run.rows)):
            return
        if is_hung or run.attempt >= ATTEMPTS_MAX or route.is_retired:
            error = gave_up(route.entry.name, is_hung=is_hung)
            count_failure(route.counters, error, run.requests, 0, ran=True)
            self._fail_rows(route, slab, run.first, run.rows, error, ran=True)
            return
        enqueue_ns = run.enqueue_sum_ns // max(run.requests, 1)
        self.resubmit(route, slab, range(run.first, run.first + run.rows), enqueue_ns, run.attempt + 1)

    def resubmit(
        self,
        route: RouteClient,
        slab: OwnedSlab,
        rows: range,
        enqueue_ns: int,
        attempt: int,
        skip: frozenset[int] = frozenset(),
    ) -> None:
        """Hand in again every request that starts in ``rows`` and still has an owner, each for itself."""
        for row in rows:
            owner = slab.owners[row]
            if owner is None or row in skip:
                continue
            # Models with priorities get parcels, which keep theirs.
            route.append_turn(TurnRun(slab, row, owner.rows, enqueue_ns, 1, attempt, 0, 0))
            route.need_flush()
            route.counters[Count.RESUBMITTED] += 1
