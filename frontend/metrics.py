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
from forebay.frontend.statistics import ModelTotals, Words, sum_blocks
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.clock import Clock, MonotonicClock
from forebay.ipc.counters import CACHE_WORDS, CacheCounter, InstanceCounter, ProducerCounter, SchedulerCounter

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
    counter_latencies: bool = True
    pinned_pool_byte_size: int = 268_435_456

    @classmethod
    def from_groups(cls, groups: Mapping[str, Any]) -> MetricsSettings:
        """Pick them from the settings groups of `FrontendStart.settings`; what is missing keeps its default."""
        metrics: Mapping[str, Any] = groups.get("metrics", {})
        memory: Mapping[str, Any] = groups.get("memory", {})
        options = {str(entry["setting"]): str(entry["value"]) for entry in metrics.get("config", ())}
        found: dict[str, Any] = {
            "allow_cpu": metrics.get("allow_cpu"),
            "interval_ms": metrics.get("interval_ms"),
            "pinned_pool_byte_size": memory.get("pinned_pool_byte_size"),
        }
        if "counter_latencies" in options:
            found["counter_latencies"] = options["counter_latencies"].lower() in ("true", "on", "1")
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
        "nv_inference_pending_request_count",
        "Instantaneous number of pending requests awaiting execution per-model.",
        _scheduler(SchedulerCounter.PENDING),
    ),
    _gauge(
        "nv_model_load_duration_secs",
        "Model load time in seconds",
        lambda totals: totals.entry.load_ns / 1e9,
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
    return labels


class _ShownFamily(msgspec.Struct, frozen=True):
    """A family with everything but its values."""

    header: tuple[str, str]
    series: list[tuple[str, int, Reader]]
    """(the line up to the value, number of the model, how to read it)."""


class MetricsPage:
    """Renders ``/metrics``. Give it each new catalog; only READY versions have series (spec M-006, M-007)."""

    def __init__(self, words: Words, settings: MetricsSettings, *, machine: Machine | None = None) -> None:
        """Start with no models.

        Args:
            words: uint64, the whole counters file.
            machine: for tests; by default /proc, if the settings allow it.
        """
        self._words = words
        self._settings = settings
        self._machine = machine or (Machine(settings.interval_ms) if settings.allow_cpu else None)
        self._entries: tuple[ModelEntry, ...] = ()
        self._cache_offsets: tuple[int, ...] = ()
        self._triton = self._show(_TRITON_FAMILIES)
        self._ours = self._show(_OUR_FAMILIES)

    def take_catalog(self, view: CatalogView) -> None:
        """Use the READY models of a catalog from now on."""
        self._entries = view.ready_models
        self._cache_offsets = view.catalog.cache_counter_offsets
        self._triton = self._show(_TRITON_FAMILIES)
        self._ours = self._show(_OUR_FAMILIES)

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
                    if entry.response_cache or not family.needs_cache
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
        _render_models(lines, self._triton, totals)
        # Triton's gauges of the server stand behind its models' (appendix G).
        self._render_server(lines)
        _render_models(lines, self._ours, totals)
        lines.append("")
        return "\n".join(lines).encode("utf-8", "replace")

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


def _render_models(lines: list[str], families: Iterable[_ShownFamily], totals: list[ModelTotals]) -> None:
    for family in families:
        lines += family.header
        lines += [prefix + format_value(read(totals[model])) for prefix, model, read in family.series]


def format_value(value: Value) -> str:
    """Return a number as prometheus-cpp prints it: whole numbers without decimals (spec M-001)."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
