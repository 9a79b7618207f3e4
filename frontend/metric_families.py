"""What ``/metrics`` shows of models: names, HELP texts, and which counter each value is; spec 9.2, 9.3, appendix G."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from forebay.frontend.statistics import ModelTotals, Words, sum_blocks
from forebay.ipc.counters import (
    CACHE_WORDS,
    DURATION_BUCKETS,
    CacheCounter,
    InstanceCounter,
    ProducerCounter,
    SchedulerCounter,
    Stage,
)

_NS_PER_US = 1_000

#: A number as prometheus-cpp prints it.
Value = int | float

#: One model version's value in a family.
Reader = Callable[[ModelTotals], Value]


class ModelFamily(msgspec.Struct, frozen=True):
    """A family with one series per READY model version, or several told apart by one more label."""

    name: str
    help: str
    kind: str
    readers: tuple[tuple[str, Reader], ...]
    """(value of the further label, how to read it); one with an empty value if there is no further label."""
    label: str = ""
    is_latency: bool = False
    """Dropped by ``--metrics-config counter_latencies=false``."""
    needs_cache: bool = False
    """Only models with the response cache have series (spec M-029)."""
    needs_device: bool = False
    """Only models that live on a GPU have series."""


def _producer(counter: ProducerCounter, unit: int = 1) -> Reader:
    return lambda totals: totals.producers[counter] // unit


def _instance(counter: InstanceCounter, unit: int = 1) -> Reader:
    return lambda totals: totals.instances[counter] // unit


def _scheduler(counter: SchedulerCounter, unit: int = 1) -> Reader:
    return lambda totals: totals.scheduler[counter] // unit


def _counter(
    name: str, text: str, reader: Reader, *, is_latency: bool = False, needs_cache: bool = False
) -> ModelFamily:
    return ModelFamily(name, text, "counter", (("", reader),), is_latency=is_latency, needs_cache=needs_cache)


def _gauge(name: str, text: str, reader: Reader) -> ModelFamily:
    return ModelFamily(name, text, "gauge", (("", reader),))


PENDING = "nv_inference_pending_request_count"

#: Triton's families of models, in Triton's order; `_us` families cumulate nanoseconds and print microseconds.
TRITON_FAMILIES = (
    _counter(
        "nv_inference_request_success",
        "Number of successful inference requests, all batch sizes",
        _producer(ProducerCounter.SUCCESS),
    ),
    ModelFamily(
        "nv_inference_request_failure",
        "Number of failed inference requests, all batch sizes",
        "counter",
        (
            ("OTHER", _producer(ProducerCounter.FAILED_OTHER)),
            ("BACKEND", _producer(ProducerCounter.FAILED_BACKEND)),
            ("REJECTED", _producer(ProducerCounter.REJECTED)),
            ("CANCELED", _producer(ProducerCounter.CANCELED)),
        ),
        label="reason",
    ),
    _counter(
        "nv_inference_count",
        "Number of inferences performed (does not include cached requests)",
        _instance(InstanceCounter.INFERENCES),
    ),
    _counter(
        "nv_inference_exec_count",
        "Number of model executions performed (does not include cached requests)",
        _instance(InstanceCounter.EXECUTIONS),
    ),
    _counter(
        "nv_inference_request_duration_us",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        _producer(ProducerCounter.SUCCESS_NS, _NS_PER_US),
        is_latency=True,
    ),
    _counter(
        "nv_inference_queue_duration_us",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        _instance(InstanceCounter.QUEUE_NS, _NS_PER_US),
        is_latency=True,
    ),
    _counter(
        "nv_inference_compute_input_duration_us",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        _instance(InstanceCounter.INPUT_NS, _NS_PER_US),
        is_latency=True,
    ),
    _counter(
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        _instance(InstanceCounter.INFER_NS, _NS_PER_US),
        is_latency=True,
    ),
    _counter(
        "nv_inference_compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        _instance(InstanceCounter.OUTPUT_NS, _NS_PER_US),
        is_latency=True,
    ),
    _counter(
        "nv_cache_num_hits_per_model",
        "Number of cache hits per model",
        _producer(ProducerCounter.CACHE_HITS),
        needs_cache=True,
    ),
    _counter(
        "nv_cache_hit_duration_per_model",
        "Total cache hit duration per model, in microseconds",
        _producer(ProducerCounter.CACHE_HIT_NS, _NS_PER_US),
        needs_cache=True,
    ),
    _counter(
        "nv_cache_num_misses_per_model",
        "Number of cache misses per model",
        _producer(ProducerCounter.CACHE_MISSES),
        needs_cache=True,
    ),
    _counter(
        "nv_cache_miss_duration_per_model",
        "Total cache miss (insert+lookup) duration per model, in microseconds",
        _producer(ProducerCounter.CACHE_MISS_NS, _NS_PER_US),
        needs_cache=True,
    ),
    _gauge(
        PENDING,
        "Instantaneous number of pending requests awaiting execution per-model.",
        # In the scheduler's queue, or on the way there: a frontend keeps a few back under a grant.
        lambda totals: totals.scheduler[SchedulerCounter.PENDING] + totals.producers[ProducerCounter.REQUESTS_HELD],
    ),
    _gauge(
        "nv_model_load_duration_secs",
        "Model load time in seconds",
        lambda totals: totals.entry.load_ns / 1e9,
    ),
)


class DeviceFamily(msgspec.Struct, frozen=True):
    """A family with one series per instance on a GPU, or several told apart by one more label."""

    name: str
    help: str
    readers: tuple[tuple[str, InstanceCounter], ...]
    """(value of the further label, what it counts); one with an empty value if there is no further label."""
    label: str = ""
    unit: int = 1
    """What is shown is the count divided by this."""


#: Families of ours about what instances do on GPUs.
DEVICE_FAMILIES = (
    DeviceFamily(
        "forebay_device_copied_bytes_total",
        "Tensor bytes copied between host and GPU memory",
        (("to_device", InstanceCounter.DEVICE_BYTES_IN), ("from_device", InstanceCounter.DEVICE_BYTES_OUT)),
        label="direction",
    ),
    DeviceFamily(
        "forebay_device_copies_total",
        "Copies from host to GPU memory; of a model, divided by forebay_batch_segments_total: per segment",
        (("", InstanceCounter.DEVICE_COPIES_IN),),
    ),
    DeviceFamily(
        "forebay_device_busy_us_total",
        "Microseconds that the GPU spent on batches, copies included",
        (("", InstanceCounter.DEVICE_NS),),
        unit=_NS_PER_US,
    ),
    DeviceFamily(
        "forebay_cuda_graph_launches_total",
        "Batches that ran as a CUDA graph",
        (("", InstanceCounter.GRAPH_LAUNCHES),),
    ),
)

#: Families of ours, about what Triton does not show.
OUR_FAMILIES = (
    ModelFamily(
        "forebay_copied_bytes_total",
        "Tensor bytes copied in user space: ingress and egress in the frontends, gather and scatter in workers",
        "counter",
        (
            ("ingress", _producer(ProducerCounter.COPIED_IN_BYTES)),
            ("gather", _instance(InstanceCounter.GATHERED_BYTES)),
            ("scatter", _instance(InstanceCounter.SCATTERED_BYTES)),
            ("egress", _producer(ProducerCounter.COPIED_OUT_BYTES)),
        ),
        label="stage",
    ),
    _counter(
        "forebay_batch_segments_total",
        "Segments of executed batches; divided by nv_inference_exec_count: segments per batch, 1 is ideal",
        _instance(InstanceCounter.SEGMENTS),
    ),
    _counter(
        "forebay_batches_gathered_total",
        "Executed batches whose rows were not contiguous and had to be gathered",
        _instance(InstanceCounter.BATCHES_GATHERED),
    ),
    _counter(
        "forebay_worker_busy_us_total",
        "Microseconds that workers spent on batches, summed over instances",
        _instance(InstanceCounter.BUSY_NS, _NS_PER_US),
    ),
    _counter(
        "forebay_granted_batches_total",
        "Batches that a frontend sent to a worker by itself, with the scheduler's grant",
        _producer(ProducerCounter.GRANTED_BATCHES),
    ),
    _counter(
        "forebay_resubmitted_requests_total",
        "Requests sent a second time because the worker or scheduler that had them was lost",
        _producer(ProducerCounter.RESUBMITTED),
    ),
    _counter(
        "forebay_lost_batches_total",
        "Batches whose worker died while it had them",
        _scheduler(SchedulerCounter.LOST_BATCHES),
    ),
    _counter(
        "forebay_worker_restarts_total",
        "Workers that died and were replaced",
        lambda totals: totals.entry.worker_restart_count,
    ),
    _gauge("forebay_slab_rows_in_use", "Rows of slabs that hold requests", _producer(ProducerCounter.ROWS_IN_USE)),
    _gauge("forebay_slab_rows", "Rows of slabs, used or free", _producer(ProducerCounter.ROWS_CAPACITY)),
    _gauge(
        "forebay_arena_block_bytes_in_use",
        "Arena bytes outside of slabs that hold tensors of requests",
        _producer(ProducerCounter.BLOCK_BYTES_IN_USE),
    ),
    ModelFamily(
        "forebay_device_passed_bytes_total",
        "Output bytes that steps of ensembles, and callers of the model, got in the GPU's memory",
        "counter",
        (("", _producer(ProducerCounter.DEVICE_PASSED_BYTES)),),
        needs_device=True,
    ),
)


def cache_gauges(words: Words, offsets: Iterable[int]) -> list[tuple[str, str, Value]]:
    """Return (name, help, value) of each gauge of the local response cache, summed over frontends (spec M-054)."""
    totals = sum_blocks(words, offsets, CACHE_WORDS)
    size_bytes = totals[CacheCounter.SIZE_BYTES]
    return [
        (
            "nv_cache_util",
            "Cache utilization [0.0 - 1.0]",
            totals[CacheCounter.USED_BYTES] / size_bytes if size_bytes else 0.0,
        ),
        ("nv_cache_num_entries", "Number of responses stored in response cache", totals[CacheCounter.ENTRIES]),
        ("nv_cache_num_lookups", "Number of cache lookups in response cache", totals[CacheCounter.LOOKUPS]),
        ("nv_cache_num_hits", "Number of cache hits in response cache", totals[CacheCounter.HITS]),
        ("nv_cache_num_misses", "Number of cache misses in response cache", totals[CacheCounter.MISSES]),
        ("nv_cache_num_evictions", "Number of cache evictions in response cache", totals[CacheCounter.EVICTIONS]),
        (
            "nv_cache_lookup_duration",
            "Total cache lookup duration (hit and miss), in microseconds",
            totals[CacheCounter.LOOKUP_NS] // _NS_PER_US,
        ),
        (
            "nv_cache_insertion_duration",
            "Total cache insertion duration, in microseconds",
            totals[CacheCounter.INSERTION_NS] // _NS_PER_US,
        ),
    ]


#: Triton's summaries (spec M-031, M-032), in Triton's order.
SUMMARIES: tuple[tuple[str, str, Stage], ...] = (
    (
        "nv_inference_request_summary_us",
        "Summary of inference request duration in microseconds (includes cached requests)",
        Stage.REQUEST,
    ),
    (
        "nv_inference_queue_summary_us",
        "Summary of inference queuing duration in microseconds (includes cached requests)",
        Stage.QUEUE,
    ),
    (
        "nv_inference_compute_input_summary_us",
        "Summary of compute input duration in microseconds (does not include cached requests)",
        Stage.INPUT,
    ),
    (
        "nv_inference_compute_infer_summary_us",
        "Summary of compute inference duration in microseconds (does not include cached requests)",
        Stage.INFER,
    ),
    (
        "nv_inference_compute_output_summary_us",
        "Summary of inference compute output duration in microseconds (does not include cached requests)",
        Stage.OUTPUT,
    ),
)

#: Those of models with the response cache (spec M-032).
CACHE_SUMMARIES: tuple[tuple[str, str, Stage], ...] = (
    (
        "nv_cache_hit_summary_per_model",
        "Summary of cache hit duration per model, in microseconds",
        Stage.CACHE_HIT,
    ),
    (
        "nv_cache_miss_summary_per_model",
        "Summary of cache miss duration per model, in microseconds",
        Stage.CACHE_MISS,
    ),
)

FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"

#: Our histograms of durations, in seconds: name, help, what is counted, where the sum of the nanoseconds is.
DURATIONS: tuple[tuple[str, str, Callable[[ModelTotals], list[int]], Callable[[ModelTotals], int]], ...] = (
    (
        "forebay_request_duration_seconds",
        "Durations of answered requests, from their hand-over to the engine to the answer",
        lambda totals: _buckets(totals.producers, ProducerCounter.REQUEST_BUCKETS),
        lambda totals: totals.producers[ProducerCounter.SUCCESS_NS],
    ),
    (
        "forebay_queue_duration_seconds",
        "Time that executed requests waited for an instance; requests of one batch count with their mean",
        lambda totals: _buckets(totals.instances, InstanceCounter.QUEUE_BUCKETS),
        lambda totals: totals.instances[InstanceCounter.QUEUE_NS],
    ),
    (
        "forebay_compute_duration_seconds",
        "Durations of the executions that requests were part of",
        lambda totals: _buckets(totals.instances, InstanceCounter.COMPUTE_BUCKETS),
        lambda totals: sum(
            totals.instances[word]
            for word in (InstanceCounter.INPUT_NS, InstanceCounter.INFER_NS, InstanceCounter.OUTPUT_NS)
        ),
    ),
)

BATCH_SIZE = "forebay_batch_size"


def _buckets(words: list[int], first: int) -> list[int]:
    return words[first : first + DURATION_BUCKETS]
