"""The text that Prometheus scrapes: Triton's families and ours, from counters in shared memory. Metrics process.

Own renderer, because prometheus-client cannot print Triton's form: it appends ``_total`` to every counter's name and
writes ``3.0`` where prometheus-cpp writes ``3``; dashboards made for Triton would find nothing (spec M-001).

What does not change between two scrapes, names and label sets, is rendered once per catalog; a scrape sums words and
joins lines. Families, HELP texts and order: spec 9.2, 9.3, appendix G, and metrics.cc of triton-inference-server/core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from forebay.frontend.machine_metrics import Machine
from forebay.frontend.metric_families import (
    BATCH_SIZE,
    CACHE_SUMMARIES,
    DEVICE_FAMILIES,
    DURATIONS,
    FIRST_RESPONSE,
    OUR_FAMILIES,
    PENDING,
    SUMMARIES,
    TRITON_FAMILIES,
    ModelFamily,
    Reader,
    Value,
    cache_gauges,
)
from forebay.frontend.statistics import ModelTotals, Words, sum_blocks
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import LATENCY_WORDS, InstanceCounter, Stage

CONTENT_TYPE = "text/plain; charset=utf-8"


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
        place = next(index for index, family in enumerate(TRITON_FAMILIES) if family.name == PENDING)
        # Custom metrics stand between Triton's counters and its gauges (appendix G).
        self._counters = self._show(TRITON_FAMILIES[:place])
        self._gauges = self._show(TRITON_FAMILIES[place:])
        self._ours = self._show(OUR_FAMILIES)
        alive = {entry.route for entry in entries}
        self._windows = {key: window for key, window in self._windows.items() if key[0] in alive}

    def step_windows(self) -> None:
        """Move the windows of the summaries on."""
        for entry in self._entries:
            words = self._latencies(entry)
            for _name, _text, stage in (*SUMMARIES, *CACHE_SUMMARIES):
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
                    and (entry.device_id >= 0 or entry.gpu_uuid or not family.needs_device)
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
        self._render_gpu_instances(lines)
        self._render_durations(lines, totals)
        lines.append("")
        return "\n".join(lines).encode("utf-8", "replace")

    def _render_gpu_instances(self, lines: list[str]) -> None:
        if not any(entry.gpu_instances for entry in self._entries):
            return
        for family in DEVICE_FAMILIES:
            lines += (f"# HELP {family.name} {family.help}", f"# TYPE {family.name} counter")
            for entry in self._entries:
                for instance in entry.gpu_instances:
                    labels = {**model_labels(entry), "instance": instance.name}
                    if instance.gpu_uuid:
                        labels["gpu_uuid"] = instance.gpu_uuid
                    counts = sum_blocks(self._words, (instance.counter_offset,), InstanceCounter.BATCH_SIZES)
                    for value, counter in family.readers:
                        own = {**labels, family.label: value} if family.label else labels
                        lines.append(f"{family.name}{render_labels(own)} {counts[counter] // family.unit}")

    def _render_gpus(self, lines: list[str]) -> None:
        name = ""
        for sample in self._gpus.samples() if self._gpus is not None else ():
            if sample.name != name:
                name = sample.name
                lines += (f"# HELP {name} {sample.help}", f"# TYPE {name} {sample.kind}")
            lines.append(f"{name}{render_labels({'gpu_uuid': sample.uuid})} {format_value(sample.value)}")

    def _render_summaries(self, lines: list[str]) -> None:
        latencies = [self._latencies(entry) for entry in self._entries]
        for name, text, stage in (*SUMMARIES, *CACHE_SUMMARIES):
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
                lines += (f"# HELP {FIRST_RESPONSE} {text}", f"# TYPE {FIRST_RESPONSE} histogram")
            bounds = entry.first_response_buckets_ms or FIRST_RESPONSE_BOUNDS_MS
            totals = read_stage(self._latencies(entry), Stage.FIRST_RESPONSE)
            counts = rebucket_ms(totals, bounds)
            texts = [format_value(float(bound)) for bound in bounds]
            lines += histogram_lines(FIRST_RESPONSE, labels, texts, counts, totals.sum_us / 1000)

    def _render_durations(self, lines: list[str], totals: list[ModelTotals]) -> None:
        if not totals:
            return
        for name, text, buckets, sum_ns in DURATIONS:
            lines += (f"# HELP {name} {text}", f"# TYPE {name} histogram")
            for model, labels in zip(totals, self._labels, strict=True):
                lines += histogram_lines(name, labels, DURATION_BOUNDS, buckets(model), sum_ns(model) / 1e9)
        lines += (
            f"# HELP {BATCH_SIZE} Batch items of executed batches",
            f"# TYPE {BATCH_SIZE} histogram",
        )
        for model, labels in zip(totals, self._labels, strict=True):
            bounds = _powers_of_two(max(model.entry.max_batch_size, 1))
            counts = [0] * (len(bounds) + 1)
            items = 0
            for batch in model.batch_sizes():
                items += batch.batch_size * batch.executions
                counts[next(n for n, bound in enumerate(bounds) if batch.batch_size <= bound)] += batch.executions
            lines += histogram_lines(BATCH_SIZE, labels, [str(bound) for bound in bounds], counts, items)

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
