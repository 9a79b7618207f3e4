"""Counts the requests of ensembles: themselves like any model's, the time of their steps as an instance would."""

from __future__ import annotations

import time

from forebay.frontend.engine_client import RouteClient
from forebay.frontend.ensemble.step_call import StepReply, StepTimes
from forebay.ipc.counters import InstanceCounter, ProducerCounter
from forebay.ipc.errors import BackendFailed, Cancelled, QueueFull, WorkerDied


def count_outcome(route: RouteClient, reply: StepReply, rows: int, began_ns: int, times: StepTimes) -> None:
    """Count one ended request once (better than L-029).

    Args:
        reply: the last one.
        rows: batch items, at least 1.
        began_ns: monotonic time of the request.
        times: sums over the steps (spec S-112).
    """
    route.write_counters()
    counters = route.counters
    elapsed_ns = max(time.monotonic_ns() - began_ns, 0)
    error = reply.error
    if error is not None:
        counters[ProducerCounter.FAILED] += 1
        counters[ProducerCounter.FAILED_NS] += elapsed_ns
        if isinstance(error, Cancelled):
            counters[ProducerCounter.CANCELED] += 1
        elif isinstance(error, QueueFull):
            counters[ProducerCounter.REJECTED] += 1
        elif isinstance(error, BackendFailed) and not isinstance(error, WorkerDied):
            counters[ProducerCounter.FAILED_BACKEND] += 1
        else:
            counters[ProducerCounter.FAILED_OTHER] += 1
        return
    counters[ProducerCounter.SUCCESS] += 1
    counters[ProducerCounter.SUCCESS_NS] += elapsed_ns
    steps = route.step_counters
    steps[InstanceCounter.SUCCESS] += 1
    steps[InstanceCounter.INFERENCES] += rows
    steps[InstanceCounter.EXECUTIONS] += 1
    steps[InstanceCounter.QUEUE_NS] += times.queue_ns
    steps[InstanceCounter.INPUT_NS] += times.input_ns
    steps[InstanceCounter.INFER_NS] += times.infer_ns
    steps[InstanceCounter.OUTPUT_NS] += times.output_ns
    steps[InstanceCounter.LAST_INFERENCE_MS] = time.time_ns() // 1_000_000
    if rows <= max(route.entry.max_batch_size, 1):
        word = InstanceCounter.BATCH_SIZES + 4 * (rows - 1)
        steps[word] += 1
        steps[word + 1] += times.input_ns
        steps[word + 2] += times.infer_ns
        steps[word + 3] += times.output_ns
