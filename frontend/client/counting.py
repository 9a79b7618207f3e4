"""Counts a client's requests to one model version, in a block of its arena that the server reads now and then.

What HTTP and gRPC frontends count of theirs, so that the statistics of a model cover everybody's requests (spec H-231,
P-101). The connection's lock is held in every call.
"""

from __future__ import annotations

import time

from forebay.client.pending import BlockLease
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import PRODUCER_WORDS, InstanceCounter, ProducerCounter, counted_batch, instance_words
from forebay.ipc.counting import count_answered, count_failure
from forebay.ipc.ensemble.steps import StepReply, StepTimes
from forebay.ipc.errors import ServingError


class RequestCounts:
    """The block of one version."""

    __slots__ = ("_lease", "_requests", "_rows_max", "_steps")

    def __init__(self, view: memoryview, lease: BlockLease, entry: ModelEntry) -> None:
        """Begin at zero in a block of :func:`block_bytes`; it is never given back, as the server may read it."""
        self._lease = lease
        raw = view[lease.offset : lease.offset + block_bytes(entry)]
        raw[:] = bytes(len(raw))
        words = raw.cast("Q")
        self._requests = words[:PRODUCER_WORDS]
        #: Of an ensemble: what its steps took.
        self._steps = words[PRODUCER_WORDS:]
        self._rows_max = max(entry.max_batch_size, 1)

    def ended(self, enqueue_ns: int, error: ServingError | None, *, ran: bool) -> None:
        """Count a request that was handed over at ``enqueue_ns``; ``ran``: a worker had it."""
        elapsed_ns = time.monotonic_ns() - enqueue_ns
        if error is None:
            count_answered(self._requests, 1, elapsed_ns)
        else:
            count_failure(self._requests, error, 1, max(elapsed_ns, 0), ran=ran)

    def passed(self, byte_size: int) -> None:
        """Count an output that whoever asked for it got on the GPU."""
        self._requests[ProducerCounter.DEVICE_PASSED_BYTES] += byte_size

    def ensemble_ended(self, rows: int, began_ns: int, reply: StepReply) -> None:
        """Count a request to an ensemble, and what its steps took as an instance would (spec S-112)."""
        self.ended(began_ns, reply.error, ran=reply.ran)
        if reply.error is None and len(self._steps):
            self._add_times(rows, reply.times)

    def _add_times(self, rows: int, times: StepTimes) -> None:
        steps = self._steps
        queue_ns, input_ns, infer_ns, output_ns = times
        steps[InstanceCounter.SUCCESS] += 1
        steps[InstanceCounter.INFERENCES] += rows
        steps[InstanceCounter.EXECUTIONS] += 1
        steps[InstanceCounter.QUEUE_NS] += queue_ns
        steps[InstanceCounter.INPUT_NS] += input_ns
        steps[InstanceCounter.INFER_NS] += infer_ns
        steps[InstanceCounter.OUTPUT_NS] += output_ns
        if rows <= self._rows_max:
            word = InstanceCounter.BATCH_SIZES + 4 * (counted_batch(rows) - 1)
            for index, amount in enumerate((1, input_ns, infer_ns, output_ns)):
                steps[word + index] += amount


def block_bytes(entry: ModelEntry) -> int:
    """Return the bytes of a version's block."""
    return 8 * (PRODUCER_WORDS + (instance_words(entry.max_batch_size) if entry.is_ensemble else 0))
