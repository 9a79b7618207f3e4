"""Batches of slab rows: run them where they lie, or gather them. The worker's hot path.

A batch that is one run of consecutive rows is bound in place: the backend reads the slab's input areas and writes its
output areas. The binding is kept, because the same rows come again. Several runs are gathered into staging arrays
first, and the bytes are counted.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from forebay.engine.backends.base import Array, Arrays, SegmentsInstance, TensorInstance
from forebay.engine.worker.places import Producers, row_shape
from forebay.ipc.counters import LAST_BUCKET
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.errors import BackendFailed, Internal, ServingError
from forebay.ipc.messages import InstanceSpec
from forebay.ipc.slabs import SlabLayout
from forebay.ipc.tensor import DATATYPES, TensorSpec
from forebay.ipc.wire import HEADER, NO_TIMES, RUN, TIMES, Kind, Run, pack_runs, unpack_runs

#: Bindings kept per producer; at the limit all of them are dropped, which costs less bookkeeping than an exact order
#: of use.
BINDINGS_MAX = 2048

#: The only run of a message.
_ONE_RUN = slice(HEADER.size, HEADER.size + RUN.size)

# Plain integers: looking up a member of an enum costs as much as the addition.
_SUCCESS, _INFERENCES, _EXECUTIONS = int(Count.SUCCESS), int(Count.INFERENCES), int(Count.EXECUTIONS)
_QUEUE_NS, _INPUT_NS, _INFER_NS = int(Count.QUEUE_NS), int(Count.INPUT_NS), int(Count.INFER_NS)
_OUTPUT_NS, _BUSY_NS, _SEGMENTS = int(Count.OUTPUT_NS), int(Count.BUSY_NS), int(Count.SEGMENTS)
_LAST_INFERENCE_MS, _BATCH_SIZES = int(Count.LAST_INFERENCE_MS), int(Count.BATCH_SIZES)
_QUEUE_BUCKETS, _COMPUTE_BUCKETS = int(Count.QUEUE_BUCKETS), int(Count.COMPUTE_BUCKETS)
_COUNTED_WORDS = _BUSY_NS + 1

#: Layouts kept; slabs grow by doubling, so an honest producer has a handful.
LAYOUTS_MAX = 256


class RowsRunner:
    """Runs RUNS messages on one tensor instance."""

    def __init__(
        self, spec: InstanceSpec, instance: TensorInstance, producers: Producers, counters: memoryview
    ) -> None:
        self._spec = spec
        self._instance = instance
        self._producers = producers
        #: uint64, this instance's block
        self._counters = counters
        self._rows_max = max(spec.max_batch_size, 1)
        self._layouts: dict[int, SlabLayout] = {}
        #: By producer: one that comes and goes, or has a thousand slabs, costs the others nothing.
        self._bound: dict[int, dict[tuple[int, int, int, int], Callable[[], None]]] = {}
        self._staged: dict[int, Callable[[], None]] = {}
        self._staging_in: list[Array] = []
        self._staging_out: list[Array] = []

    def forget_producer(self, producer: int) -> None:
        """Drop the bindings that look into its arena, which is about to be unmapped."""
        self._bound.pop(producer, None)

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
            return self._fail(runs, batch, batch_start_ns, error)
        self._ring(Kind.RUNS_DONE, runs, batch, times)
        return times

    def _execute_one(self, message: memoryview, batch: int, start_ns: int) -> bytes:
        """Run a batch that is one slice, which nearly every one is, in as few steps as possible."""
        numbers = RUN.unpack_from(message, HEADER.size)
        try:
            times = self._execute_in_place(numbers, start_ns)
        except ServingError as error:
            return self._fail([Run._make(numbers)], batch, start_ns, error)
        reply = HEADER.pack(Kind.RUNS_DONE, 0, 1, self._spec.instance, batch) + times + message[_ONE_RUN]
        producers = self._producers
        with producers.lock:
            if numbers[0] in producers:
                producers.get(numbers[0]).bell.ring(reply)
        return times

    def _execute_in_place(self, run: tuple[int, ...], start_ns: int) -> bytes:
        producer, requests, base, capacity, first, rows, _attempt, enqueue_sum_ns = run
        key = (base, capacity, first, rows)
        own = self._bound.get(producer)
        bound = None if own is None else own.get(key)
        if bound is None:
            bound = self._bind(Run._make(run))
            own = self._bound.setdefault(producer, {})
            if len(own) >= BINDINGS_MAX:
                own.clear()
            own[key] = bound
        input_end_ns = time.monotonic_ns()
        bound()
        end_ns = time.monotonic_ns()
        self._count(requests, rows, enqueue_sum_ns, 1, start_ns, input_end_ns, end_ns, end_ns)
        return TIMES.pack(start_ns, input_end_ns, end_ns, end_ns)

    def _execute_gathered(self, runs: list[Run], start_ns: int) -> bytes:
        rows = sum(run.rows for run in runs)
        if rows > self._rows_max:
            raise Internal("batch is larger than the model allows")
        if isinstance(self._instance, SegmentsInstance):
            return self._execute_segments(self._instance, runs, rows, start_ns)
        bound = self._staged.get(rows)
        if bound is None:
            bound = self._bind_staging(rows)
            self._staged[rows] = bound
        copied_in = copied_out = 0
        views = [self._views(run) for run in runs]
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
        self._count(
            sum(run.requests for run in runs),
            rows,
            sum(run.enqueue_sum_ns for run in runs),
            len(runs),
            start_ns,
            input_end_ns,
            output_start_ns,
            end_ns,
        )
        counters = self._counters
        counters[Count.GATHERED_BYTES] += copied_in
        counters[Count.SCATTERED_BYTES] += copied_out
        counters[Count.BATCHES_GATHERED] += 1
        return TIMES.pack(start_ns, input_end_ns, output_start_ns, end_ns)

    def _execute_segments(self, instance: SegmentsInstance, runs: list[Run], rows: int, start_ns: int) -> bytes:
        """Let a device fetch each segment by itself: the copy that it needs anyway does the gathering."""
        segments = [
            (self._named(self._spec.inputs, ins), self._named(self._spec.outputs, outs))
            for ins, outs in map(self._views, runs)
        ]
        input_end_ns = time.monotonic_ns()
        instance.run_segments(segments)
        end_ns = time.monotonic_ns()
        requests, enqueue_sum_ns = sum(run.requests for run in runs), sum(run.enqueue_sum_ns for run in runs)
        self._count(requests, rows, enqueue_sum_ns, len(runs), start_ns, input_end_ns, end_ns, end_ns)
        return TIMES.pack(start_ns, input_end_ns, end_ns, end_ns)

    @staticmethod
    def _named(specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> Arrays:
        return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}

    def _views(self, run: Run) -> tuple[list[Array], list[Array]]:
        """Return the run's input and output rows as arrays, every number in it checked."""
        if not 1 <= run.rows <= self._rows_max:
            raise Internal("batch is larger than the model allows")
        layout = self._layouts.get(run.capacity)
        if layout is None:
            if not 1 <= run.capacity <= 1 << 24:
                raise Internal("message names an impossible slab")
            if len(self._layouts) >= LAYOUTS_MAX:
                self._layouts.clear()
            layout = self._layouts[run.capacity] = SlabLayout(self._spec.inputs, self._spec.outputs, run.capacity)
        if run.first + run.rows > run.capacity:
            raise Internal("message names rows outside its slab")
        producer = self._producers.get(run.producer)
        producer.arena.check(run.base, layout.byte_size)
        batch = self._spec.max_batch_size
        inputs = [
            producer.array(
                spec.datatype, row_shape(spec, run.rows, batch), run.base + area.offset + run.first * area.row_bytes
            )
            for spec, area in zip(self._spec.inputs, layout.inputs, strict=True)
        ]
        outputs = [
            producer.array(
                spec.datatype, row_shape(spec, run.rows, batch), run.base + area.offset + run.first * area.row_bytes
            )
            for spec, area in zip(self._spec.outputs, layout.outputs, strict=True)
        ]
        return inputs, outputs

    def _bind(self, run: Run) -> Callable[[], None]:
        inputs, outputs = self._views(run)
        return self._bind_arrays(inputs, outputs)

    def _bind_arrays(self, inputs: list[Array], outputs: list[Array]) -> Callable[[], None]:
        return self._instance.bind(self._named(self._spec.inputs, inputs), self._named(self._spec.outputs, outputs))

    def _bind_staging(self, rows: int) -> Callable[[], None]:
        batch = self._spec.max_batch_size
        if not self._staging_in:
            self._staging_in = [
                np.zeros(row_shape(spec, self._rows_max, batch), DATATYPES[spec.datatype].numpy_dtype)
                for spec in self._spec.inputs
            ]
            self._staging_out = [
                np.zeros(row_shape(spec, self._rows_max, batch), DATATYPES[spec.datatype].numpy_dtype)
                for spec in self._spec.outputs
            ]
        return self._bind_arrays(
            [array[:rows] for array in self._staging_in], [array[:rows] for array in self._staging_out]
        )

    def _count(
        self,
        requests: int,
        rows: int,
        enqueue_sum_ns: int,
        segments: int,
        start_ns: int,
        input_end_ns: int,
        output_start_ns: int,
        end_ns: int,
    ) -> None:
        counters = self._counters
        input_ns, infer_ns = input_end_ns - start_ns, output_start_ns - input_end_ns
        output_ns = end_ns - output_start_ns
        # One read and one write of the whole block's head: a step per counter would cost three times as much.
        words = counters[:_COUNTED_WORDS].tolist()
        words[_SUCCESS] += requests
        words[_INFERENCES] += rows
        words[_EXECUTIONS] += 1
        queue_ns = max(requests * start_ns - enqueue_sum_ns, 0)
        words[_QUEUE_NS] += queue_ns
        words[_INPUT_NS] += requests * input_ns
        words[_INFER_NS] += requests * infer_ns
        words[_OUTPUT_NS] += requests * output_ns
        words[_LAST_INFERENCE_MS] = time.time_ns() // 1_000_000
        words[_SEGMENTS] += segments
        words[_BUSY_NS] += end_ns - start_ns
        counters[:_COUNTED_WORDS] = array("Q", words)
        # By the mean of the batch's requests.
        bucket = (queue_ns // requests >> 10).bit_length()
        counters[_QUEUE_BUCKETS + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += requests
        bucket = (end_ns - start_ns >> 10).bit_length()
        counters[_COMPUTE_BUCKETS + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += requests
        word = _BATCH_SIZES + 4 * (rows - 1)
        counters[word] += 1
        counters[word + 1] += input_ns
        counters[word + 2] += infer_ns
        counters[word + 3] += output_ns

    def _fail(self, runs: list[Run], batch: int, start_ns: int, error: ServingError) -> bytes:
        end_ns = time.monotonic_ns()
        requests = sum(run.requests for run in runs)
        counters = self._counters
        backend = isinstance(error, BackendFailed)
        counters[Count.FAILED_BACKEND if backend else Count.FAILED_OTHER] += requests
        counters[Count.EXECUTIONS] += 1
        counters[Count.FAIL_NS] += requests * (end_ns - start_ns)
        times = TIMES.pack(start_ns, start_ns, end_ns, end_ns)
        trailer = bytes((error.code,)) + error.text.encode()[:60_000]
        self._ring(Kind.RUNS_FAILED, runs, batch, times, trailer)
        return times

    def _ring(self, kind: Kind, runs: list[Run], batch: int, times: bytes, trailer: bytes = b"") -> None:
        instance = self._spec.instance
        by_producer: dict[int, list[Run]] = {}
        for run in runs:
            by_producer.setdefault(run.producer, []).append(run)
        with self._producers.lock:
            for producer_id, own in by_producer.items():
                try:
                    producer = self._producers.get(producer_id)
                except Internal:
                    continue  # It died; nobody waits.
                producer.bell.ring(pack_runs(kind, 0, instance, batch, own, times) + trailer)
