"""What every RUNS message needs, whoever runs it: arrays over its rows, its counters, its answers."""

from __future__ import annotations

import time
from array import array

from forebay.engine.backends.base import Array
from forebay.engine.worker.places import Producers, row_shape
from forebay.ipc.counters import LAST_BUCKET, counted_batch
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.errors import BackendFailed, Internal, ServingError
from forebay.ipc.slabs import SlabLayout
from forebay.ipc.wire import TIMES, Kind, Run, pack_runs
from forebay.ipc.worker_messages import InstanceSpec

# Plain integers: looking up a member of an enum costs as much as the addition.
_SUCCESS, _INFERENCES, _EXECUTIONS = int(Count.SUCCESS), int(Count.INFERENCES), int(Count.EXECUTIONS)
_QUEUE_NS, _INPUT_NS, _INFER_NS = int(Count.QUEUE_NS), int(Count.INPUT_NS), int(Count.INFER_NS)
_OUTPUT_NS, _BUSY_NS, _SEGMENTS = int(Count.OUTPUT_NS), int(Count.BUSY_NS), int(Count.SEGMENTS)
_LAST_INFERENCE_MS, _BATCH_SIZES = int(Count.LAST_INFERENCE_MS), int(Count.BATCH_SIZES)
_QUEUE_BUCKETS, _COMPUTE_BUCKETS = int(Count.QUEUE_BUCKETS), int(Count.COMPUTE_BUCKETS)
_COUNTED_WORDS = _BUSY_NS + 1

#: Layouts kept; slabs grow by doubling, so an honest producer has a handful.
LAYOUTS_MAX = 256


class SlabViews:
    """Arrays that look into producers' slabs."""

    def __init__(self, spec: InstanceSpec, producers: Producers) -> None:
        self._spec = spec
        self._producers = producers
        self.rows_max = max(spec.max_batch_size, 1)
        self._layouts: dict[int, SlabLayout] = {}

    def of(self, run: Run) -> tuple[list[Array], list[Array]]:
        """Return the run's input and output rows, writable, every number in it checked.

        Raises:
            Internal: the run names what cannot be.
        """
        if not 1 <= run.rows <= self.rows_max:
            raise Internal("batch is larger than the model allows")
        layout = self._layout(run.capacity)
        if run.first + run.rows > run.capacity:
            raise Internal("message names rows outside its slab")
        producer = self._producers.get(run.producer)
        producer.arena.check(run.base, layout.byte_size)
        batch = self._spec.max_batch_size
        areas = ((self._spec.inputs, layout.inputs), (self._spec.outputs, layout.outputs))
        inputs, outputs = (
            [
                producer.array(
                    spec.datatype, row_shape(spec, run.rows, batch), run.base + area.offset + run.first * area.row_bytes
                )
                for spec, area in zip(specs, areas_of_kind, strict=True)
            ]
            for specs, areas_of_kind in areas
        )
        return inputs, outputs

    def _layout(self, capacity: int) -> SlabLayout:
        layout = self._layouts.get(capacity)
        if layout is None:
            if not 1 <= capacity <= 1 << 24:
                raise Internal("message names an impossible slab")
            if len(self._layouts) >= LAYOUTS_MAX:
                self._layouts.clear()
            layout = self._layouts[capacity] = SlabLayout(self._spec.inputs, self._spec.outputs, capacity)
        return layout


class BatchCounters:
    """Writes what batches took into the instance's block."""

    def __init__(self, words: memoryview) -> None:
        #: uint64, the instance's block
        self._words = words

    def succeeded(
        self, requests: int, rows: int, enqueue_sum_ns: int, segments: int, stamps: tuple[int, int, int, int]
    ) -> None:
        """Count a batch; ``stamps``: start, input end, output start, end, monotonic ns."""
        counters = self._words
        start_ns, input_end_ns, output_start_ns, end_ns = stamps
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
        word = _BATCH_SIZES + 4 * (counted_batch(rows) - 1)
        counters[word] += 1
        counters[word + 1] += input_ns
        counters[word + 2] += infer_ns
        counters[word + 3] += output_ns

    def gathered(self, copied_in_bytes: int, copied_out_bytes: int) -> None:
        """Count what it cost to join a batch."""
        counters = self._words
        counters[Count.GATHERED_BYTES] += copied_in_bytes
        counters[Count.SCATTERED_BYTES] += copied_out_bytes
        counters[Count.BATCHES_GATHERED] += 1

    def scattered(self, copied_bytes: int) -> None:
        """Count answers that were copied to their rows."""
        self._words[Count.SCATTERED_BYTES] += copied_bytes

    def failed_with(self, error: ServingError, requests: int, elapsed_ns: int, *, by_model: bool = False) -> None:
        """Count requests that failed, by Triton's reasons (spec M-021).

        Args:
            elapsed_ns: of the execution.
            by_model: the model's code made the error, whatever its code says.
        """
        backend = by_model or isinstance(error, BackendFailed)
        self._words[Count.FAILED_BACKEND if backend else Count.FAILED_OTHER] += requests
        self._words[Count.FAIL_NS] += requests * elapsed_ns

    def batch_failed(self) -> None:
        """Count an execution that nobody had an answer from."""
        self._words[Count.EXECUTIONS] += 1


def by_producer(runs: list[Run]) -> dict[int, list[Run]]:
    """Return the runs of each producer, in their order."""
    grouped: dict[int, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.producer, []).append(run)
    return grouped


class RowBells:
    """Tells producers what became of their rows."""

    def __init__(self, instance: int, producers: Producers, counters: BatchCounters) -> None:
        self._instance = instance
        self._producers = producers
        self._counters = counters

    def ring(
        self, kind: Kind, runs: list[Run], batch: int, times: bytes, trailers: dict[int, bytes], flags: int = 0
    ) -> None:
        """Answer a batch; ``trailers``: by producer, what follows its runs, with ``flags``."""
        with self._producers.lock:
            for producer_id, own in by_producer(runs).items():
                try:
                    producer = self._producers.get(producer_id)
                except Internal:
                    continue  # It died; nobody waits.
                trailer = trailers.get(producer_id, b"")
                header_flags = flags if trailer else 0
                producer.bell.ring(pack_runs(kind, header_flags, self._instance, batch, own, times) + trailer)

    def fail(self, runs: list[Run], batch: int, start_ns: int, error: ServingError) -> bytes:
        """Answer and count a batch that failed as a whole; return its TIMES, packed."""
        end_ns = time.monotonic_ns()
        self._counters.failed_with(error, sum(run.requests for run in runs), end_ns - start_ns)
        self._counters.batch_failed()
        times = TIMES.pack(start_ns, start_ns, end_ns, end_ns)
        trailer = bytes((error.code,)) + error.text.encode()[:60_000]
        self.ring(Kind.RUNS_FAILED, runs, batch, times, {run.producer: trailer for run in runs})
        return times
