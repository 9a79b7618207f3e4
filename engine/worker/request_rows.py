"""Requests in slab rows for models that get them one by one.

Such a request carries nothing but its tensors: who has an id, parameters or a choice of outputs comes as a parcel. A
batch is answered at its end with one message per producer. A model that answers later than its execution returns is
waited for; the supervisor is told beforehand that it had better get parcels (:attr:`RowsInstance.wants_parcels`).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, RowsInstance
from forebay.engine.worker.inbox import Inbox
from forebay.engine.worker.places import Producers
from forebay.engine.worker.row_batches import BatchCounters, RowBells, SlabViews, by_producer
from forebay.ipc.counters import COUNTED_BATCH_MAX
from forebay.ipc.errors import BackendFailed, Internal, ServingError
from forebay.ipc.messages import ParameterValue, RowRemark
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.wire import (
    FLAG_REMARKS,
    HEADER,
    MESSAGE_BYTES_MAX,
    NO_TIMES,
    ROW,
    RUN,
    SLAB,
    TIMES,
    Kind,
    Run,
    unpack_runs,
)
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.worker.rows_lane import RowsLane

#: Places kept per producer; at the limit all of them are dropped.
PLACES_MAX = 4096
#: Slices that the lane keeps per producer; likewise.
SLICES_MAX = 2048

#: The only run of a message.
_ONE_RUN = slice(HEADER.size, HEADER.size + RUN.size)
#: Bytes of remarks in one message, texts and parameters together.
_REMARKS_BYTES_MAX = MESSAGE_BYTES_MAX // 2

_encode_remarks = msgspec.msgpack.Encoder().encode


class _Remarked(ServingError):
    """The batch has run, and its answers say more than that: the lane cannot give them."""


_REMARKED = _Remarked("")


def address_of(array: Array) -> int:
    """Return where an array begins in this process."""
    return int(array.__array_interface__["data"][0])


class RowPlace:
    """Where one request's tensors lie: arrays that are made once and kept."""

    __slots__ = ("base", "first", "inputs", "outputs", "producer", "rows")

    def __init__(self, run: Run, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        self.producer = run.producer
        self.base = run.base
        self.first = run.first
        self.rows = run.rows
        #: In the order of the model's inputs: ``[rows, *dims]`` as the model sees them.
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)


class RowRequest:
    """One request in rows as a :class:`RowsInstance` sees it.

    It is answered once, by :meth:`complete` or :meth:`fail`, from any thread; the client hears of it with its batch.
    """

    __slots__ = ("_batch", "_lent", "error", "fails_by_model", "is_final", "parameters", "place")

    def __init__(self, batch: RowBatch, place: RowPlace) -> None:
        self._batch = batch
        self.place = place
        self.is_final = False
        self.error: ServingError | None = None
        #: The model's own code made the error.
        self.fails_by_model = False
        #: Response parameters.
        self.parameters: Mapping[str, ParameterValue] | None = None
        #: Outputs whose rows the model was given to write to.
        self._lent: set[int] | None = None

    @property
    def rows(self) -> int:
        """Batch items, at least 1."""
        return self.place.rows

    @property
    def is_cancelled(self) -> bool:
        """True once the client has left; the model may stop early."""
        return not self.is_final and self._batch.is_cancelled(self.place)

    def lend_array(self, datatype: str, shape: tuple[int, ...]) -> Array:
        """Return an uninitialised array for an output: its rows, if there is such an output; else any memory."""
        dtype = DATATYPES[datatype].numpy_dtype
        lent = self._lent
        if lent is None:
            lent = self._lent = set()
        for index, output in enumerate(self.place.outputs):
            if index not in lent and output.shape == shape and output.dtype == dtype:
                lent.add(index)
                return output.view()
        return np.empty(shape, dtype)

    def complete(self, outputs: Sequence[Array], parameters: Mapping[str, ParameterValue]) -> None:
        """Answer.

        Args:
            outputs: in the order of the model's outputs, of exactly the shapes and dtypes of :attr:`RowPlace.outputs`;
                copied before the call returns.
            parameters: response parameters.
        """
        if self.is_final:
            raise BackendFailed("a response was sent after the final one")
        if self._lent is not None:
            outputs = self._untangled(outputs)
        for target, output in zip(self.place.outputs, outputs, strict=True):
            if output is not target:
                target[...] = output  # Not copyto, whose dispatch costs as much as the copying of a small output.
                self._batch.copied_bytes += target.nbytes
        if parameters:
            self.parameters = dict(parameters)
            self._batch.has_remarks = True
        self._end()

    def _untangled(self, outputs: Sequence[Array]) -> list[Array]:
        """Return the outputs so that they can be written one by one: an array may lie in the rows of another output."""
        targets = self.place.outputs
        return [
            target if address_of(output) == address_of(target) else output if len(targets) == 1 else output.copy()
            for target, output in zip(targets, outputs, strict=True)
        ]

    def fail(self, error: ServingError, *, final: bool = True, by_model: bool = False) -> None:
        """Answer with an error, which is always final: there is one response.

        Args:
            by_model: the model's code made the error, whatever its code says; decides how it is counted.
        """
        if self.is_final:
            return
        self.error = error
        self.fails_by_model = by_model
        self._batch.has_remarks = True
        self._end()

    def finish(self) -> None:
        """No response follows; there was one."""

    def _end(self) -> None:
        self.is_final = True
        self._batch.one_ended()

    def remark(self, run: int, text_length_max: int) -> RowRemark | None:
        """Return what is to be said of it besides its outputs; None: nothing."""
        first = self.place.first
        if self.error is not None:
            # An empty text would read as success.
            text = self.error.text[:text_length_max] or "the model failed without saying why"
            return RowRemark(run=run, first=first, code=self.error.code, text=text)
        return RowRemark(run=run, first=first, parameters=dict(self.parameters)) if self.parameters else None


class RowBatch:
    """The requests of one RUNS message while they run."""

    __slots__ = ("_cancelled", "_ended", "_inbox", "_producers", "copied_bytes", "has_remarks", "number", "requests")

    def __init__(self, number: int, inbox: Inbox, producers: Producers) -> None:
        self.number = number
        self.requests: list[RowRequest] = []
        #: Some request has failed or has response parameters.
        self.has_remarks = False
        #: Bytes of outputs that were not made in their rows.
        self.copied_bytes = 0
        #: Producer, slab and first row of requests whose clients left.
        self._cancelled: set[tuple[int, int, int]] | None = None
        self._inbox = inbox
        self._producers = producers
        #: Notified when a request ends; only while somebody waits.
        self._ended: threading.Condition | None = None

    def cancel(self, producer: int, message: memoryview, count: int) -> None:
        """Note whose clients left; the message is a CANCEL_ROWS of this batch."""
        (base,) = SLAB.unpack_from(message, HEADER.size)
        rows = message[HEADER.size + SLAB.size :]
        whole = min(count, len(rows) // ROW.size) * ROW.size
        cancelled = {(producer, base, first) for (first,) in ROW.iter_unpack(rows[:whole])}
        self._cancelled = cancelled | (self._cancelled or set())

    def is_cancelled(self, place: RowPlace) -> bool:
        """Tell whether a request's client has left, as far as is known by now."""
        self._inbox.take_signals()
        if self._cancelled is not None and (place.producer, place.base, place.first) in self._cancelled:
            return True
        return place.producer not in self._producers

    def one_ended(self) -> None:
        """A request has its answer."""
        ended = self._ended
        if ended is not None:
            with ended:
                ended.notify()

    def wait_ended(self) -> None:
        """Wait until every request has its answer; a model's own threads may give it."""
        if self._have_all_ended():
            return
        ended = self._ended = threading.Condition()
        with ended:
            ended.wait_for(self._have_all_ended)

    def _have_all_ended(self) -> bool:
        for request in self.requests:  # noqa: SIM110 - all() costs as much as the answers of a small batch
            if not request.is_final:
                return False
        return True


class RequestRowsRunner:
    """Runs RUNS messages on one instance that gets requests one by one."""

    def __init__(
        self,
        spec: InstanceSpec,
        instance: RowsInstance,
        producers: Producers,
        counters: memoryview,
        inbox: Inbox,
        lane: RowsLane | None = None,
    ) -> None:
        """
        Args:
            lane: for slices that have run before; the caller runs it before anything else.
        """
        self._instance = instance
        self._producers = producers
        self._inbox = inbox
        self._counters = BatchCounters(counters)
        self._bells = RowBells(spec.instance, producers, self._counters)
        self._views = SlabViews(spec, producers)
        #: By producer, then by slab, capacity, first row and rows.
        self._places: dict[int, dict[tuple[int, int, int, int], RowPlace]] = {}
        self._lane = lane
        #: By producer, how many slices the lane keeps.
        self._slice_counts: dict[int, int] = {}
        #: That runs, or that the lane has left unanswered.
        self._batch: RowBatch | None = None

    def forget_producer(self, producer: int) -> None:
        """Drop the arrays that look into its arena, which is about to be unmapped."""
        self._places.pop(producer, None)
        self._slice_counts.pop(producer, None)
        if self._lane is not None:
            self._lane.forget(producer)

    def cancel(self, producer: int, message: memoryview) -> None:
        """Take in a CANCEL_ROWS message."""
        _kind, _flags, count, _sender, number = HEADER.unpack_from(message)
        batch = self._batch
        if batch is not None and batch.number == number and len(message) >= HEADER.size + SLAB.size:
            batch.cancel(producer, message, count)

    def execute(self, message: memoryview, batch_start_ns: int) -> bytes:
        """Run one RUNS message and ring its producers.

        Returns:
            The TIMES of the batch, packed, for the scheduler.
        """
        _kind, _flags, count, _sender, number = HEADER.unpack_from(message)
        # A producer that died between the scheduler's decision and now must not fail its neighbours' requests.
        runs = [run for run in unpack_runs(message, count, HEADER.size) if run.producer in self._producers]
        if not runs:
            return NO_TIMES
        batch = self._batch = RowBatch(number, self._inbox, self._producers)
        input_end_ns = batch_start_ns
        error: ServingError | None = None
        try:
            if sum(run.rows for run in runs) > self._views.rows_max:
                raise Internal("batch is larger than the model allows")
            for run in runs:
                self._add(batch, run)
            if count == 1:
                self._keep(runs[0], batch)
            input_end_ns = time.monotonic_ns()
            self._run(batch)
        except ServingError as failure:
            error = failure
        return self._answer(runs, batch, batch_start_ns, input_end_ns, error)

    def failed(self, message: memoryview, start_ns: int, error: ServingError) -> bytes:
        """Answer a batch that the lane has left unanswered; returns what :meth:`execute` does."""
        _kind, _flags, count, _sender, _number = HEADER.unpack_from(message)
        assert self._batch is not None
        failure = None if error is _REMARKED else error
        return self._answer(unpack_runs(message, count, HEADER.size), self._batch, start_ns, start_ns, failure)

    def _keep(self, run: Run, batch: RowBatch) -> None:
        """Have the lane run these requests the next time."""
        # The lane counts each batch size apart.
        if self._lane is None or run.rows > COUNTED_BATCH_MAX:
            return
        slices = self._slice_counts.get(run.producer, 0)
        if slices >= SLICES_MAX:
            self._lane.forget(run.producer)
            slices = 0
        self._slice_counts[run.producer] = slices + 1
        call = functools.partial(self._run_known, self._lane, [request.place for request in batch.requests])
        self._lane.keep(RUN.pack(*run), call, self._producers.guarded_bell(run.producer))

    def _run_known(self, lane: RowsLane, places: Sequence[RowPlace]) -> None:
        """Run what has run before.

        Raises:
            ServingError: it is not answered yet, whether it has failed or not; see :meth:`failed`.
        """
        batch = self._batch = RowBatch(lane.batch, self._inbox, self._producers)
        batch.requests = [RowRequest(batch, place) for place in places]
        self._run(batch)
        if batch.has_remarks:
            raise _REMARKED
        self._batch = None
        if batch.copied_bytes:
            self._counters.scattered(batch.copied_bytes)

    def _add(self, batch: RowBatch, run: Run) -> None:
        each, remainder = divmod(run.rows, run.requests)
        if remainder or not each:
            raise Internal("message names rows that are no whole requests")
        places = self._places.setdefault(run.producer, {})
        if len(places) + run.requests > PLACES_MAX:
            places.clear()
        requests = batch.requests
        for first in range(run.first, run.first + run.rows, each):
            key = (run.base, run.capacity, first, each)
            place = places.get(key)
            if place is None:
                own = run._replace(requests=1, first=first, rows=each)
                place = places[key] = RowPlace(own, *self._views.of(own))
            requests.append(RowRequest(batch, place))

    def _run(self, batch: RowBatch) -> None:
        self._inbox.begin()
        try:
            self._instance.execute_rows(batch.requests)
            batch.wait_ended()
        except ServingError:
            raise
        except Exception as error:  # a model's own code may raise anything
            raise BackendFailed(f"{type(error).__name__}: {error}") from None
        finally:
            self._inbox.end()

    def _answer(
        self, runs: list[Run], batch: RowBatch, start_ns: int, input_end_ns: int, error: ServingError | None
    ) -> bytes:
        """Count, and tell the producers; with ``error``, which is that of all that have no answer yet.

        Returns:
            The TIMES of the batch, packed.
        """
        self._batch = None
        if error is not None:
            for request in batch.requests:
                request.fail(error)
            if all(request.error is error for request in batch.requests):
                return self._bells.fail(runs, batch.number, start_ns, error)
        end_ns = time.monotonic_ns()
        stamps = start_ns, input_end_ns, end_ns, end_ns
        times = TIMES.pack(*stamps)
        trailers: dict[int, bytes] = {}
        failed = failed_rows = 0
        if batch.has_remarks:
            trailers = self._remarks(runs, batch)
            for request in batch.requests:
                if request.error is not None:
                    failed += 1
                    failed_rows += request.rows
                    elapsed_ns = stamps[3] - stamps[0]
                    self._counters.failed_with(request.error, 1, elapsed_ns, by_model=request.fails_by_model)
        requests, rows = len(batch.requests) - failed, sum(run.rows for run in runs) - failed_rows
        if requests:
            enqueue_sum_ns = sum(run.enqueue_sum_ns for run in runs) * requests // len(batch.requests)
            self._counters.succeeded(requests, rows, enqueue_sum_ns, len(runs), stamps)
            self._counters.scattered(batch.copied_bytes)
        else:
            self._counters.batch_failed()
        self._bells.ring(Kind.RUNS_DONE, runs, batch.number, times, trailers, FLAG_REMARKS)
        return times

    @staticmethod
    def _remarks(runs: list[Run], batch: RowBatch) -> dict[int, bytes]:
        """Return by producer what is to be said of its requests."""
        text_length_max = _REMARKS_BYTES_MAX // len(batch.requests) // 4
        by_place = {
            (request.place.producer, request.place.base, request.place.first): request for request in batch.requests
        }
        packed: dict[int, bytes] = {}
        for producer, own in by_producer(runs).items():
            remarks: list[RowRemark] = []
            for index, run in enumerate(own):
                for first in range(run.first, run.first + run.rows, run.rows // run.requests):
                    remark = by_place[producer, run.base, first].remark(index, text_length_max)
                    if remark is not None:
                        remarks.append(remark)
            packed[producer] = _bounded(remarks, len(batch.requests)) if remarks else b""
        return packed


def _bounded(remarks: list[RowRemark], requests: int) -> bytes:
    """Encode remarks so that they fit into a message with the runs; whose parameters are too large fails."""
    encoded = _encode_remarks(remarks)
    if len(encoded) <= _REMARKS_BYTES_MAX:
        return encoded
    each_max = _REMARKS_BYTES_MAX // requests
    return _encode_remarks(
        [
            remark
            if len(_encode_remarks(remark)) <= each_max
            else RowRemark(
                run=remark.run, first=remark.first, code=Internal.code, text="the response's parameters are too large"
            )
            for remark in remarks
        ]
    )
