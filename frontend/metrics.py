"""The text that Prometheus scrapes: Triton's families and ours, from counters in shared memory. Metrics process.

Own renderer, because prometheus-client cannot print Triton's form: it appends ``_total`` to every counter's name and
writes ``3.0`` where prometheus-cpp writes ``3``; dashboards made for Triton would find nothing (spec M-001).

What does not change between two scrapes, names and label sets, is rendered once per catalog; a scrape sums words and
joins lines. Families, HELP texts and order: spec 9.2, 9.3, appendix G, and metrics.cc of triton-inference-server/core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.custom_metrics import CustomMetrics
from forebay.frontend.gpu_metrics import Gpus, find_gpus
from forebay.frontend.histograms import (
    DEFAULT_QUANTILES,
    DURATION_BOUNDS,
    FIRST_RESPONSE_BOUNDS_MS,
    SlidingWindow,
    histogram_lines,
    parse_quantiles,
    quantile_us,
    read_stage,
    rebucket_ms,
    with_label,
)
from forebay.frontend.statistics import ModelTotals, Words, sum_blocks
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.clock import Clock, MonotonicClock
from forebay.ipc.counters import (
    CACHE_WORDS,
    DURATION_BUCKETS,
    LATENCY_WORDS,
    CacheCounter,
    InstanceCounter,
    ProducerCounter,
    SchedulerCounter,
    Stage,
)

CONTENT_TYPE = "text/plain; charset=utf-8"

_NS_PER_US = 1_000
_NS_PER_MS = 1_000_000

#: A number as prometheus-cpp prints it.
Value = int | float

#: One model version's value in a family.
Reader = Callable[[ModelTotals], Value]


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that the metrics process obeys; spec F-111..F-116."""

    allow_cpu: bool = True
    interval_ms: int = 2000
    allow_gpu: bool = True
    cpu_only: bool = False
    """Use no GPU, and so show none."""
    counter_latencies: bool = True
    summary_latencies: bool = False
    summary_quantiles: tuple[float, ...] = DEFAULT_QUANTILES
    histogram_latencies: bool = False
    pinned_pool_byte_size: int = 268_435_456

    @classmethod
    def from_groups(cls, groups: Mapping[str, Any]) -> MetricsSettings:
        """Pick them from the settings groups of `FrontendStart.settings`; what is missing keeps its default."""
        metrics: Mapping[str, Any] = groups.get("metrics", {})
        memory: Mapping[str, Any] = groups.get("memory", {})
        gpu: Mapping[str, Any] = groups.get("gpu", {})
        options = {str(entry["setting"]): str(entry["value"]) for entry in metrics.get("config", ())}
        found: dict[str, Any] = {
            "allow_cpu": metrics.get("allow_cpu"),
            "allow_gpu": metrics.get("allow_gpu"),
            "cpu_only": gpu.get("cpu_only"),
            "interval_ms": metrics.get("interval_ms"),
            "pinned_pool_byte_size": memory.get("pinned_pool_byte_size"),
        }
        for name in ("counter_latencies", "summary_latencies", "histogram_latencies"):
            if name in options:
                found[name] = options[name].lower() in ("true", "on", "1")
        if "summary_quantiles" in options:
            found["summary_quantiles"] = parse_quantiles(options["summary_quantiles"])
        return msgspec.convert({name: value for name, value in found.items() if value is not None}, cls)


# --- families ---------------------------------------------------------------------------------------------------------


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


_PENDING = "nv_inference_pending_request_count"

#: Triton's families of models, in Triton's order; `_us` families cumulate nanoseconds and print microseconds.
_TRITON_FAMILIES = (
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
        _PENDING,
        "Instantaneous number of pending requests awaiting execution per-model.",
        _scheduler(SchedulerCounter.PENDING),
    ),
    _gauge(
        "nv_model_load_duration_secs",
        "Model load time in seconds",
        lambda totals: totals.entry.load_ns / 1e9,
    ),
)

#: Families of ours about models on GPUs.
_DEVICE_FAMILIES = (
    ModelFamily(
        "forebay_device_copied_bytes_total",
        "Tensor bytes copied between host and GPU memory",
        "counter",
        (
            ("to_device", _instance(InstanceCounter.DEVICE_BYTES_IN)),
            ("from_device", _instance(InstanceCounter.DEVICE_BYTES_OUT)),
        ),
        label="direction",
        needs_device=True,
    ),
    ModelFamily(
        "forebay_device_copies_total",
        "Copies from host to GPU memory; divided by forebay_batch_segments_total: per segment",
        "counter",
        (("", _instance(InstanceCounter.DEVICE_COPIES_IN)),),
        needs_device=True,
    ),
    ModelFamily(
        "forebay_device_passed_bytes_total",
        "Output bytes of ensembles' steps that the next steps read on the GPU",
        "counter",
        (("", _producer(ProducerCounter.DEVICE_PASSED_BYTES)),),
        needs_device=True,
    ),
    ModelFamily(
        "forebay_device_busy_us_total",
        "Microseconds that GPUs spent on batches, copies included, summed over instances",
        "counter",
        (("", _instance(InstanceCounter.DEVICE_NS, _NS_PER_US)),),
        needs_device=True,
    ),
    ModelFamily(
        "forebay_cuda_graph_launches_total",
        "Batches that ran as a CUDA graph",
        "counter",
        (("", _instance(InstanceCounter.GRAPH_LAUNCHES)),),
        needs_device=True,
    ),
)

#: Families of ours, about what Triton does not show.
_OUR_FAMILIES = (
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
    *_DEVICE_FAMILIES,
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
_SUMMARIES: tuple[tuple[str, str, Stage], ...] = (
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
_CACHE_SUMMARIES: tuple[tuple[str, str, Stage], ...] = (
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

_FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"

#: Our histograms of durations, in seconds: name, help, what is counted, where the sum of the nanoseconds is.
_DURATIONS: tuple[tuple[str, str, Callable[[ModelTotals], list[int]], Callable[[ModelTotals], int]], ...] = (
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

_BATCH_SIZE = "forebay_batch_size"


def _buckets(words: list[int], first: int) -> list[int]:
    return words[first : first + DURATION_BUCKETS]


# --- the machine ------------------------------------------------------------------------------------------------------


class MachineReading(msgspec.Struct, frozen=True):
    """What /proc said."""

    busy_ticks: int
    total_ticks: int
    memory_total_bytes: int
    memory_available_bytes: int


def read_machine() -> MachineReading:
    """Read /proc/stat and /proc/meminfo."""
    with open("/proc/stat", "rb") as file:
        # user nice system idle iowait irq softirq steal; guest time is part of user already
        ticks = [int(word) for word in file.readline().split()[1:9]]
    memory_bytes: dict[bytes, int] = {}
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            name, _, rest = line.partition(b":")
            if name in (b"MemTotal", b"MemAvailable"):
                memory_bytes[name] = int(rest.split()[0]) * 1024
    idle_ticks = ticks[3] + ticks[4]
    return MachineReading(sum(ticks) - idle_ticks, sum(ticks), memory_bytes[b"MemTotal"], memory_bytes[b"MemAvailable"])


class Machine:
    """CPU and memory of the machine, read when scraped but not more often than every interval (spec M-005).

    Nothing wakes up between scrapes. Utilisation is that since the reading before, which is at least one interval old.
    """

    def __init__(
        self,
        interval_ms: int,
        *,
        read: Callable[[], MachineReading] = read_machine,
        clock: Clock | None = None,
    ) -> None:
        self._interval_ns = interval_ms * _NS_PER_MS
        self._read = read
        self._clock = clock or MonotonicClock()
        self._last = read()
        self._last_ns = self._clock.now_ns()
        self._utilization = 0.0

    def gauges(self) -> list[tuple[str, str, Value]]:
        """Return (name, help, value) of each gauge (spec M-050, M-051)."""
        now_ns = self._clock.now_ns()
        if now_ns - self._last_ns >= self._interval_ns:
            # In a container that hides /proc the old values stay.
            with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
                self._advance(self._read(), now_ns)
        last = self._last
        return [
            ("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", self._utilization),
            ("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", last.memory_total_bytes),
            (
                "nv_cpu_memory_used_bytes",
                "CPU used memory (RAM), in bytes",
                max(last.memory_total_bytes - last.memory_available_bytes, 0),
            ),
        ]

    def _advance(self, reading: MachineReading, now_ns: int) -> None:
        passed = reading.total_ticks - self._last.total_ticks
        if passed > 0:
            busy = reading.busy_ticks - self._last.busy_ticks
            self._utilization = min(max(busy / passed, 0.0), 1.0)
        self._last = reading
        self._last_ns = now_ns


# --- rendering --------------------------------------------------------------------------------------------------------


def escape_label(value: str) -> str:
    """Escape a label's value as the text format wants it."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def render_labels(labels: Mapping[str, str]) -> str:
    """Return ``{a="b",...}``, sorted by name (spec M-001)."""
    return "{" + ",".join(f'{name}="{escape_label(labels[name])}"' for name in sorted(labels)) + "}"


def model_labels(entry: ModelEntry) -> dict[str, str]:
    """Return the labels of a model version's series (spec 9.2)."""
    labels = {f"_{tag}": value for tag, value in entry.metric_tags.items()}
    labels |= {"model": entry.name, "version": str(entry.version)}
    if entry.namespace:
        labels["namespace"] = entry.namespace
    if entry.gpu_uuid:
        labels["gpu_uuid"] = entry.gpu_uuid
    return labels


class _ShownFamily(msgspec.Struct, frozen=True):
    """A family with everything but its values."""

    header: tuple[str, str]
    series: list[tuple[str, int, Reader]]
    """(the line up to the value, number of the model, how to read it)."""


class MetricsPage:
    """Renders ``/metrics``. Give it each new catalog; only READY versions have series (spec M-006, M-007)."""

    def __init__(
        self,
        words: Words,
        settings: MetricsSettings,
        *,
        machine: Machine | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        """Start with no models.

        Args:
            words: uint64, the whole counters file.
            machine: for tests; by default /proc, if the settings allow it.
            gpus: for tests; by default what NVML finds, if the settings allow it.
        """
        self._words = words
        self._settings = settings
        self._machine = machine or (Machine(settings.interval_ms) if settings.allow_cpu else None)
        wants_gpus = settings.allow_gpu and not settings.cpu_only
        self._gpus = gpus or (find_gpus(settings.interval_ms) if wants_gpus else None)
        self._cache_offsets: tuple[int, ...] = ()
        #: What models define themselves.
        self.custom = CustomMetrics()
        self._windows: dict[tuple[int, Stage], SlidingWindow] = {}
        self._take(())

    @property
    def has_summaries(self) -> bool:
        """Whether :meth:`step_windows` wants to be called every ``WINDOW_SECS / WINDOW_STEPS``."""
        return self._settings.summary_latencies

    def take_catalog(self, view: CatalogView) -> None:
        """Use the READY models of a catalog from now on."""
        self._take(view.ready_models)
        self._cache_offsets = view.catalog.cache_counter_offsets

    def _take(self, entries: tuple[ModelEntry, ...]) -> None:
        self._entries = entries
        self._labels = [render_labels(model_labels(entry)) for entry in entries]
        place = next(index for index, family in enumerate(_TRITON_FAMILIES) if family.name == _PENDING)
        # Custom metrics stand between Triton's counters and its gauges (appendix G).
        self._counters = self._show(_TRITON_FAMILIES[:place])
        self._gauges = self._show(_TRITON_FAMILIES[place:])
        self._ours = self._show(_OUR_FAMILIES)
        alive = {entry.route for entry in entries}
        self._windows = {key: window for key, window in self._windows.items() if key[0] in alive}

    def step_windows(self) -> None:
        """Move the windows of the summaries on."""
        for entry in self._entries:
            words = self._latencies(entry)
            for _name, _text, stage in (*_SUMMARIES, *_CACHE_SUMMARIES):
                self._window(entry, stage).step(read_stage(words, stage).buckets)

    def _window(self, entry: ModelEntry, stage: Stage) -> SlidingWindow:
        return self._windows.setdefault((entry.route, stage), SlidingWindow())

    def _latencies(self, entry: ModelEntry) -> list[int]:
        return sum_blocks(self._words, entry.detail_offsets if entry.has_latencies else (), LATENCY_WORDS)

    def _show(self, families: Iterable[ModelFamily]) -> list[_ShownFamily]:
        """Return what does not change until the next catalog; a family without series is not shown at all."""
        labels = [model_labels(entry) for entry in self._entries]

        def prefix(family: ModelFamily, value: str, own: dict[str, str]) -> str:
            return f"{family.name}{render_labels({**own, family.label: value} if family.label else own)} "

        shown = [
            _ShownFamily(
                (f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"),
                [
                    (prefix(family, value, labels[model]), model, read)
                    for value, read in family.readers
                    for model, entry in enumerate(self._entries)
                    if (entry.response_cache or not family.needs_cache)
                    and (entry.device_id >= 0 or not family.needs_device)
                ],
            )
            for family in families
            if self._settings.counter_latencies or not family.is_latency
        ]
        return [family for family in shown if family.series]

    def render(self) -> bytes:
        """Return the page, with every counter as it is now."""
        totals = [ModelTotals(self._words, entry) for entry in self._entries]
        lines: list[str] = []
        _render_models(lines, self._counters, totals)
        lines += self.custom.lines()
        _render_models(lines, self._gauges, totals)
        # Triton's gauges of the server stand behind its models' (appendix G).
        self._render_server(lines)
        self._render_gpus(lines)
        if self._settings.summary_latencies:
            self._render_summaries(lines)
        if self._settings.histogram_latencies:
            self._render_first_responses(lines)
        _render_models(lines, self._ours, totals)
        self._render_durations(lines, totals)
        lines.append("")
        return "\n".join(lines).encode("utf-8", "replace")

    def _render_gpus(self, lines: list[str]) -> None:
        name = ""
        for sample in self._gpus.samples() if self._gpus is not None else ():
            if sample.name != name:
                name = sample.name
                lines += (f"# HELP {name} {sample.help}", f"# TYPE {name} {sample.kind}")
            lines.append(f"{name}{render_labels({'gpu_uuid': sample.uuid})} {format_value(sample.value)}")

    def _render_summaries(self, lines: list[str]) -> None:
        latencies = [self._latencies(entry) for entry in self._entries]
        for name, text, stage in (*_SUMMARIES, *_CACHE_SUMMARIES):
            is_of_cache = stage in (Stage.CACHE_HIT, Stage.CACHE_MISS)
            # Times in a queue and in all mean little where most requests are answered from a cache (spec M-031).
            is_mixed = stage in (Stage.REQUEST, Stage.QUEUE)
            shown = [
                (entry, labels, words)
                for entry, labels, words in zip(self._entries, self._labels, latencies, strict=True)
                if (entry.response_cache or not is_of_cache) and not (entry.response_cache and is_mixed)
            ]
            if shown:
                lines += (f"# HELP {name} {text}", f"# TYPE {name} summary")
            for entry, labels, words in shown:
                totals = read_stage(words, stage)
                lines += (f"{name}_count{labels} {totals.count}", f"{name}_sum{labels} {totals.sum_us}")
                recent = self._window(entry, stage).since_begin(totals.buckets)
                for quantile in self._settings.summary_quantiles:
                    value = quantile_us(recent, quantile)
                    series = with_label(labels, "quantile", format_value(quantile))
                    lines.append(f"{name}{series} {'Nan' if value is None else value}")

    def _render_first_responses(self, lines: list[str]) -> None:
        has_header = False
        for entry, labels in zip(self._entries, self._labels, strict=True):
            if not entry.decoupled or entry.is_ensemble:
                continue
            if not has_header:
                has_header = True
                text = "Duration from request to first response in milliseconds"
                lines += (f"# HELP {_FIRST_RESPONSE} {text}", f"# TYPE {_FIRST_RESPONSE} histogram")
            bounds = entry.first_response_buckets_ms or FIRST_RESPONSE_BOUNDS_MS
            totals = read_stage(self._latencies(entry), Stage.FIRST_RESPONSE)
            counts = rebucket_ms(totals, bounds)
            texts = [format_value(float(bound)) for bound in bounds]
            lines += histogram_lines(_FIRST_RESPONSE, labels, texts, counts, totals.sum_us / 1000)

    def _render_durations(self, lines: list[str], totals: list[ModelTotals]) -> None:
        if not totals:
            return
        for name, text, buckets, sum_ns in _DURATIONS:
            lines += (f"# HELP {name} {text}", f"# TYPE {name} histogram")
            for model, labels in zip(totals, self._labels, strict=True):
                lines += histogram_lines(name, labels, DURATION_BOUNDS, buckets(model), sum_ns(model) / 1e9)
        lines += (
            f"# HELP {_BATCH_SIZE} Batch items of executed batches",
            f"# TYPE {_BATCH_SIZE} histogram",
        )
        for model, labels in zip(totals, self._labels, strict=True):
            bounds = _powers_of_two(max(model.entry.max_batch_size, 1))
            counts = [0] * (len(bounds) + 1)
            items = 0
            for batch in model.batch_sizes():
                items += batch.batch_size * batch.executions
                counts[next(n for n, bound in enumerate(bounds) if batch.batch_size <= bound)] += batch.executions
            lines += histogram_lines(_BATCH_SIZE, labels, [str(bound) for bound in bounds], counts, items)

    def _render_server(self, lines: list[str]) -> None:
        gauges: Iterable[tuple[str, str, Value]] = (
            (
                "nv_pinned_memory_pool_total_bytes",
                "Pinned memory pool total memory size, in bytes",
                self._settings.pinned_pool_byte_size,
            ),
            # Slabs are page-locked where they lie, so no tensor is ever staged in a pool of its own.
            ("nv_pinned_memory_pool_used_bytes", "Pinned memory pool used memory size, in bytes", 0),
            *(cache_gauges(self._words, self._cache_offsets) if self._cache_offsets else ()),
            *(self._machine.gauges() if self._machine is not None else ()),
        )
        for name, text, value in gauges:
            lines += (f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {format_value(value)}")


def _powers_of_two(last: int) -> list[int]:
    """Return 1, 2, 4, ... and ``last``."""
    return [*(1 << power for power in range(last.bit_length()) if 1 << power < last), last]


def _render_models(lines: list[str], families: Iterable[_ShownFamily], totals: list[ModelTotals]) -> None:
    for family in families:
        lines += family.header
        lines += [prefix + format_value(read(totals[model])) for prefix, model, read in family.series]


def format_value(value: Value) -> str:
    """Return a number as prometheus-cpp prints it: whole numbers without decimals (spec M-001)."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
