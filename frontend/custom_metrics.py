"""Metrics that models define themselves, of all workers together (spec M-055, P-119). Metrics process."""

from __future__ import annotations

import math
from collections.abc import Iterable

from forebay.ipc.worker_messages import FamilySample, MetricSample, ModelMetrics

#: Time series that are shown at most; models make them, so their number is bounded.
SERIES_MAX = 10_000


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    inner = ",".join(f'{name}="{_escape(value)}"' for name, value in labels)
    return f"{{{inner}}}" if inner else ""


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value.is_integer() else repr(value)


class CustomMetrics:
    """What every worker said last."""

    def __init__(self) -> None:
        self._by_instance: dict[int, tuple[FamilySample, ...]] = {}

    def take(self, message: ModelMetrics) -> None:
        """Show these from now on."""
        self._by_instance.pop(message.instance, None)
        if message.families:
            # The newest last: of a gauge, its value is shown.
            self._by_instance[message.instance] = message.families

    def lines(self) -> list[str]:
        """Return every family: counters and histograms summed over the workers, of gauges the value set last."""
        families: dict[str, FamilySample] = {}
        series: dict[str, dict[tuple[tuple[str, str], ...], MetricSample]] = {}
        count = 0
        for samples in self._by_instance.values():
            for family in samples:
                known = families.setdefault(family.name, family)
                if known.kind != family.kind:
                    continue
                own = series.setdefault(family.name, {})
                for sample in family.metrics:
                    key = tuple(sorted(sample.labels.items()))
                    if key not in own:
                        count += 1
                        if count > SERIES_MAX:
                            continue
                    own[key] = _merge(own.get(key), sample, family.kind)
        lines: list[str] = []
        for name, family in families.items():
            description = family.description.replace("\\", "\\\\").replace("\n", "\\n")
            lines += (f"# HELP {name} {description}", f"# TYPE {name} {family.kind}")
            for key, sample in series[name].items():
                lines += _sample_lines(name, key, sample)
        return lines


def _merge(former: MetricSample | None, sample: MetricSample, kind: str) -> MetricSample:
    if former is None or kind == "gauge":
        return sample
    if len(former.buckets) != len(sample.buckets):
        return former
    buckets = tuple(
        (bound, count + more) for (bound, count), (_bound, more) in zip(former.buckets, sample.buckets, strict=True)
    )
    return MetricSample(sample.labels, former.value + sample.value, buckets)


def _sample_lines(name: str, key: tuple[tuple[str, str], ...], sample: MetricSample) -> list[str]:
    if not sample.buckets:
        return [f"{name}{_labels(key)} {_number(sample.value)}"]
    lines = [
        f"{name}_count{_labels(key)} {sample.buckets[-1][1]}",
        f"{name}_sum{_labels(key)} {_number(sample.value)}",
    ]
    lines += (f"{name}_bucket{_labels((*key, ('le', _number(bound))))} {count}" for bound, count in sample.buckets)
    return lines
