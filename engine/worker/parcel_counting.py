"""Counts a batch of parcels in its instance's block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from forebay.ipc.counters import LAST_BUCKET, counted_batch
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.errors import BackendFailed, Cancelled, ServingError

if TYPE_CHECKING:
    from forebay.engine.worker.parcel_request import ParcelRequest


def count_answer(
    counters: memoryview, executed_ns: int, failed: ServingError | None = None, *, by_model: bool = False
) -> None:
    """Count a request whose final response is about to be sent; the doorbells' lock is held.

    Before, not after: whoever has the answer finds it counted.

    Args:
        executed_ns: when the execution that it was part of had returned; 0: not yet.
        by_model: the model's code made the error, whatever its code says.
    """
    if failed is None:
        counters[Count.SUCCESS] += 1
    elif failed.code == Cancelled.code:
        counters[Count.CANCELED] += 1
    elif by_model or isinstance(failed, BackendFailed):
        counters[Count.FAILED_BACKEND] += 1
    else:
        counters[Count.FAILED_OTHER] += 1
    if executed_ns:
        # Answered after its execution had returned: by a thread or a coroutine of the model.
        counters[Count.INFER_NS] += max(time.monotonic_ns() - executed_ns, 0)


def count_batch(
    counters: memoryview, requests: Sequence[ParcelRequest], rows: int, stamps: Sequence[int], max_batch_size: int
) -> None:
    """Count an execution.

    Args:
        stamps: start, input end, output start, end: monotonic ns.
    """
    start_ns, input_end_ns, output_start_ns, end_ns = stamps
    count = len(requests)
    counters[Count.EXECUTIONS] += 1
    counters[Count.INFERENCES] += rows
    queue_ns = max(sum(start_ns - request.enqueue_ns for request in requests), 0)
    counters[Count.QUEUE_NS] += queue_ns
    if count:
        # By the mean of the batch's requests.
        counters[Count.QUEUE_BUCKETS + min((queue_ns // count >> 10).bit_length(), LAST_BUCKET)] += count
        counters[Count.COMPUTE_BUCKETS + min((end_ns - start_ns >> 10).bit_length(), LAST_BUCKET)] += count
    counters[Count.INPUT_NS] += count * (input_end_ns - start_ns)
    counters[Count.INFER_NS] += count * (output_start_ns - input_end_ns)
    counters[Count.OUTPUT_NS] += count * (end_ns - output_start_ns)
    counters[Count.LAST_INFERENCE_MS] = time.time_ns() // 1_000_000
    counters[Count.SEGMENTS] += count
    counters[Count.BUSY_NS] += end_ns - start_ns
    if rows <= max(max_batch_size, 1):
        word = Count.BATCH_SIZES + 4 * (counted_batch(rows) - 1)
        counters[word] += 1
        counters[word + 1] += input_end_ns - start_ns
        counters[word + 2] += output_start_ns - input_end_ns
        counters[word + 3] += end_ns - output_start_ns


def count_gathered(counters: memoryview, requests: Sequence[ParcelRequest]) -> None:
    """Count the input bytes of requests that were copied together."""
    counters[Count.GATHERED_BYTES] += sum(place.byte_size for request in requests for place in request.head.inputs)
    counters[Count.BATCHES_GATHERED] += 1
