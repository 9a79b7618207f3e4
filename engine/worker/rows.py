"""Batches of slab rows: run them where they lie, or gather them. The worker's hot path.

A batch that is one run of consecutive rows is bound in place: the backend reads the slab's input areas and writes its
output areas. The binding is kept, because the same rows come again. Several runs are gathered into staging arrays
first, and the bytes are counted.

What has been bound goes by way of the lane from then on (``rows_lane.c``), if the package was built with a C compiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from forebay.engine.backends.base import Array, Arrays, SegmentsInstance, TensorInstance
from forebay.engine.worker.places import Producers, row_shape
from forebay.engine.worker.row_batches import BatchCounters, RowBells, SlabViews
from forebay.engine.worker.tensor_parcels import JOINED_BYTES_MAX
from forebay.ipc.counters import COUNTED_BATCH_MAX
from forebay.ipc.errors import Internal, ServingError
from forebay.ipc.tensor import DATATYPES, TensorSpec
from forebay.ipc.wire import HEADER, NO_TIMES, RUN, TIMES, Kind, Run, unpack_runs
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.worker.rows_lane import RowsLane

#: Bindings kept per producer; at the limit all of them are dropped, which costs less bookkeeping than an exact order
#: of use.
BINDINGS_MAX = 2048

#: The only run of a message.
_ONE_RUN = slice(HEADER.size, HEADER.size + RUN.size)


class RowsRunner:
    """Runs RUNS messages on one tensor instance."""

    def __init__(
        self,
        spec: InstanceSpec,
        instance: TensorInstance,
        producers: Producers,
        counters: memoryview,
        lane: RowsLane | None = None,
    ) -> None:
        """
        Args:
            lane: for what will be bound; the caller runs it before anything else.
        """
        self._spec = spec
        self._instance = instance
        self._producers = producers
        self._counters = BatchCounters(counters)
        self._bells = RowBells(spec.instance, producers, self._counters)
        self._views = SlabViews(spec, producers)
        row_bytes = sum(tensor.row_bytes for tensor in spec.inputs if tensor.is_fixed)
        self._runs_apart = spec.kind != "GPU" and row_bytes >= JOINED_BYTES_MAX
        self._lane = lane
        #: By producer: one that comes and goes, or has a thousand slabs, costs the others nothing.
        self._bound: dict[int, dict[tuple[int, int, int, int], Callable[[], None]]] = {}
        self._staged: dict[int, Callable[[], None]] = {}
        self._staging_in: list[Array] = []
        self._staging_out: list[Array] = []

    def forget_producer(self, producer: int) -> None:
        """Drop the bindings that look into its arena, which is about to be unmapped."""
        self._bound.pop(producer, None)
        if self._lane is not None:
            self._lane.forget(producer)

    def failed(self, message: memoryview, start_ns: int, error: ServingError) -> bytes:
        """Answer a batch that failed in the lane; returns what :meth:`execute` does."""
        _kind, _flags, count, _sender, batch = HEADER.unpack_from(message)
        return self._bells.fail(unpack_runs(message, count, HEADER.size), batch, start_ns, error)

    def execute(self, message: memoryview, batch_start_ns: int) -> bytes:
        """Run one RUNS message and ring its producers.

        Returns:
            The TIMES of the batch, packed, for the scheduler.
        """
        _kind, _flags, count, _sender, batch = HEADER.unpack_from(message)
        if count == 1:
            return self._execute_one(message, batch, batch_start_ns)
        # A producer that died between the scheduler's decision and now must not fail its neighbours' requests.
        runs = [run for run in unpack_runs(message, count, HEADER.size) if run.producer in self._producers]
        if not runs:
            return NO_TIMES
        try:
            if len(runs) == 1:
                times = self._execute_in_place(runs[0], batch_start_ns)
            else:
                times = self._execute_gathered(runs, batch_start_ns)
        except ServingError as error:
            return self._bells.fail(runs, batch, batch_start_ns, error)
        self._bells.ring(Kind.RUNS_DONE, runs, batch, times, {})
        return times

    def _execute_one(self, message: memoryview, batch: int, start_ns: int) -> bytes:
        """Run a batch that is one slice, which nearly every one is, in as few steps as possible."""
        numbers = RUN.unpack_from(message, HEADER.size)
        try:
            times = self._execute_in_place(numbers, start_ns)
        except ServingError as error:
            return self._bells.fail([Run._make(numbers)], batch, start_ns, error)
        reply = HEADER.pack(Kind.RUNS_DONE, 0, 1, self._spec.instance, batch) + times + message[_ONE_RUN]
        producers = self._producers
        with producers.lock:
            if numbers[0] in producers:
                producers.get(numbers[0]).bell.ring(reply)
        return times

    def _execute_in_place(self, run: tuple[int, ...], start_ns: int) -> bytes:
        _producer, requests, _base, _capacity, _first, rows, _attempt, enqueue_sum_ns = run
        bound = self._bound_in_place(run)
        input_end_ns = time.monotonic_ns()
        bound()
        end_ns = time.monotonic_ns()
        self._counters.succeeded(requests, rows, enqueue_sum_ns, 1, (start_ns, input_end_ns, end_ns, end_ns))
        return TIMES.pack(start_ns, input_end_ns, end_ns, end_ns)

    def _bound_in_place(self, run: tuple[int, ...]) -> Callable[[], None]:
        producer, _requests, base, capacity, first, rows, _attempt, _enqueue_sum_ns = run
        key = (base, capacity, first, rows)
        own = self._bound.get(producer)
        bound = None if own is None else own.get(key)
        if bound is None:
            bound = self._bind(Run._make(run))
            self._keep(run, key, bound)
        return bound

    def _keep(self, run: tuple[int, ...], key: tuple[int, int, int, int], bound: Callable[[], None]) -> None:
        producer = run[0]
        own = self._bound.setdefault(producer, {})
        if len(own) >= BINDINGS_MAX:
            self.forget_producer(producer)
            own = self._bound[producer] = {}
        own[key] = bound
        # The lane counts each batch size apart.
        if self._lane is not None and key[3] <= COUNTED_BATCH_MAX:
            self._lane.keep(RUN.pack(*run), bound, self._producers.get(producer).bell)

    def _execute_gathered(self, runs: list[Run], start_ns: int) -> bytes:
        rows = sum(run.rows for run in runs)
        if rows > self._views.rows_max:
            raise Internal("batch is larger than the model allows")
        if isinstance(self._instance, SegmentsInstance):
            return self._execute_segments(self._instance, runs, rows, start_ns)
        if self._runs_apart:
            return self._execute_apart(runs, rows, start_ns)
        bound = self._staged.get(rows)
        if bound is None:
            bound = self._bind_staging(rows)
            self._staged[rows] = bound
        copied_in = copied_out = 0
        views = [self._views.of(run) for run in runs]
        first = 0
        for run, (inputs, _outputs) in zip(runs, views, strict=True):
            for staging, view in zip(self._staging_in, inputs, strict=True):
                np.copyto(staging[first : first + run.rows], view)
                copied_in += view.nbytes
            first += run.rows
        input_end_ns = time.monotonic_ns()
        bound()
        output_start_ns = time.monotonic_ns()
        first = 0
        for run, (_inputs, outputs) in zip(runs, views, strict=True):
            for staging, view in zip(self._staging_out, outputs, strict=True):
                np.copyto(view, staging[first : first + run.rows])
                copied_out += view.nbytes
            first += run.rows
        end_ns = time.monotonic_ns()
        stamps = start_ns, input_end_ns, output_start_ns, end_ns
        self._count(runs, rows, stamps)
        self._counters.gathered(copied_in, copied_out)
        return TIMES.pack(*stamps)

    def _execute_apart(self, runs: list[Run], rows: int, start_ns: int) -> bytes:
        """Run each segment where it lies: on a CPU, copying large rows together costs more than further calls."""
        bound = [self._bound_in_place(run) for run in runs]
        input_end_ns = time.monotonic_ns()
        for run_bound in bound:
            run_bound()
        end_ns = time.monotonic_ns()
        stamps = start_ns, input_end_ns, end_ns, end_ns
        self._count(runs, rows, stamps)
        return TIMES.pack(*stamps)

    def _execute_segments(self, instance: SegmentsInstance, runs: list[Run], rows: int, start_ns: int) -> bytes:
        """Let a device fetch each segment by itself: the copy that it needs anyway does the gathering."""
        segments = [
            (self._named(self._spec.inputs, ins), self._named(self._spec.outputs, outs))
            for ins, outs in map(self._views.of, runs)
        ]
        input_end_ns = time.monotonic_ns()
        instance.run_segments(segments)
        end_ns = time.monotonic_ns()
        stamps = start_ns, input_end_ns, end_ns, end_ns
        self._count(runs, rows, stamps)
        return TIMES.pack(*stamps)

    def _count(self, runs: list[Run], rows: int, stamps: tuple[int, int, int, int]) -> None:
        requests, enqueue_sum_ns = sum(run.requests for run in runs), sum(run.enqueue_sum_ns for run in runs)
        self._counters.succeeded(requests, rows, enqueue_sum_ns, len(runs), stamps)

    @staticmethod
    def _named(specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> Arrays:
        return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}

    def _bind(self, run: Run) -> Callable[[], None]:
        inputs, outputs = self._views.of(run)
        return self._bind_arrays(inputs, outputs)

    def _bind_arrays(self, inputs: list[Array], outputs: list[Array]) -> Callable[[], None]:
        return self._instance.bind(self._named(self._spec.inputs, inputs), self._named(self._spec.outputs, outputs))

    def _bind_staging(self, rows: int) -> Callable[[], None]:
        batch = self._spec.max_batch_size
        if not self._staging_in:
            self._staging_in = [
                np.zeros(row_shape(spec, self._views.rows_max, batch), DATATYPES[spec.datatype].numpy_dtype)
                for spec in self._spec.inputs
            ]
            self._staging_out = [
                np.zeros(row_shape(spec, self._views.rows_max, batch), DATATYPES[spec.datatype].numpy_dtype)
                for spec in self._spec.outputs
            ]
        return self._bind_arrays(
            [array[:rows] for array in self._staging_in], [array[:rows] for array in self._staging_out]
        )
