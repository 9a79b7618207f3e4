"""Metrics that models define themselves (spec P-119): kept in the worker, published through :class:`EngineAccess`.

The registry holds the truth of this worker. Families of the same name and kind are one family; who publishes sums the
counters of a model's workers and labels the rest by instance.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable, Mapping, Sequence

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.worker_messages import FamilySample, MetricSample

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


class StoredMetric:
    """One time series. Thread-safe."""

    def __init__(self, kind: str, labels: dict[str, str], buckets: Sequence[float], news: threading.Event) -> None:
        """
        Args:
            news: set when the value changes.
        """
        self.kind = kind
        self._news = news
        self.labels = labels
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._value = 0.0
        self._lock = threading.Lock()

    def increment(self, value: float) -> None:
        """Add ``value``.

        Raises:
            InvalidArgument: a counter would go down, or the metric is a histogram.
        """
        if self.kind == HISTOGRAM:
            raise InvalidArgument("TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Increment")
        if self.kind == COUNTER and value < 0:
            raise InvalidArgument(
                "TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically by non-negative values."
            )
        with self._lock:
            self._value += value
        self._news.set()

    def set(self, value: float) -> None:
        """Replace the value of a gauge.

        Raises:
            InvalidArgument: the metric is not a gauge.
        """
        if self.kind != GAUGE:
            raise InvalidArgument(f"TRITONSERVER_METRIC_KIND_{self.kind.upper()} does not support Set")
        with self._lock:
            self._value = value
        self._news.set()

    def observe(self, value: float) -> None:
        """Count ``value`` in its bucket.

        Raises:
            InvalidArgument: the metric is not a histogram.
        """
        if self.kind != HISTOGRAM:
            raise InvalidArgument(f"TRITONSERVER_METRIC_KIND_{self.kind.upper()} does not support Observe")
        with self._lock:
            self._value += value
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._news.set()

    def value(self) -> float:
        """Return the value of a counter or gauge.

        Raises:
            InvalidArgument: the metric is a histogram.
        """
        if self.kind == HISTOGRAM:
            raise InvalidArgument("TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Value")
        return self._value

    def sample(self) -> MetricSample:
        with self._lock:
            if self.kind != HISTOGRAM:
                return MetricSample(self.labels, self._value)
            cumulative = 0
            buckets: list[tuple[float, int]] = []
            for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
                cumulative += count
                buckets.append((bound, cumulative))
            return MetricSample(self.labels, self._value, tuple(buckets))


class StoredFamily:
    """All time series of one name."""

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name
        self.description = description
        self.kind = kind
        #: How many objects of the model stand for it; at 0 it is no longer published.
        self.references = 0
        self.metrics: dict[tuple[tuple[str, str], ...], StoredMetric] = {}


class MetricsRegistry:
    """Every custom metric of this worker."""

    def __init__(self) -> None:
        self._families: dict[str, StoredFamily] = {}
        # Re-entrant: families are released by destructors, which may run at any moment.
        self._lock = threading.RLock()
        #: Called after a change of the set of metrics, not of their values.
        self.on_change: Callable[[], None] | None = None
        #: Set when anything changes; whoever publishes clears it.
        self.news = threading.Event()

    def family(self, name: str, description: str, kind: str) -> StoredFamily:
        """Return the family called ``name``, new or shared.

        Raises:
            InvalidArgument: the name exists with another kind.
        """
        with self._lock:
            family = self._families.get(name)
            if family is None:
                family = self._families[name] = StoredFamily(name, description, kind)
            elif family.kind != kind:
                raise InvalidArgument(f"metric family '{name}' exists with kind {family.kind}, not {kind}")
            family.references += 1
        self._changed()
        return family

    def release(self, family: StoredFamily) -> None:
        """Undo one :meth:`family`."""
        with self._lock:
            family.references -= 1
            if family.references <= 0:
                self._families.pop(family.name, None)
        self._changed()

    def metric(self, family: StoredFamily, labels: Mapping[str, str], buckets: Sequence[float]) -> StoredMetric:
        """Return the family's metric with these labels, new or shared."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            metric = family.metrics.get(key)
            if metric is None:
                metric = family.metrics[key] = StoredMetric(family.kind, dict(labels), buckets, self.news)
        self._changed()
        return metric

    def _changed(self) -> None:
        self.news.set()
        if self.on_change is not None:
            self.on_change()

    def samples(self) -> tuple[FamilySample, ...]:
        """Return every family as it is now."""
        with self._lock:
            families = list(self._families.values())
        return tuple(
            FamilySample(
                family.name,
                family.description,
                family.kind,
                tuple(metric.sample() for metric in list(family.metrics.values())),
            )
            for family in families
        )


#: This worker's custom metrics.
registry = MetricsRegistry()
