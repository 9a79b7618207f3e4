"""``pb_utils.MetricFamily`` and its metrics (spec P-119, P-120)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from forebay.engine.backends.python_model.errors import TritonModelException
from forebay.engine.backends.python_model.metrics import COUNTER, GAUGE, HISTOGRAM, StoredFamily, registry
from forebay.ipc.errors import ServingError

_KINDS = (COUNTER, GAUGE, HISTOGRAM)


class Owner:
    """The instance whose model makes the metrics, which their errors name."""

    name = ""


def _failure(what: str, error: ServingError) -> TritonModelException:
    return TritonModelException(
        f"Failed to {what}: Failed to process the request for model '{Owner.name}', message: {error}"
    )


class Metric:
    """One time series; made by :meth:`MetricFamily.Metric`."""

    def __init__(self, family: MetricFamily, labels: Mapping[str, str] | None, buckets: Sequence[float] | None) -> None:
        if labels is not None and not isinstance(labels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TritonModelException("Failed to create metric. Labels must be a dictionary.")
        is_histogram = family.stored.kind == HISTOGRAM
        if is_histogram and not buckets:
            raise TritonModelException("Failed to create metric. Missing required buckets.")
        if buckets and not is_histogram:
            raise TritonModelException("Failed to create metric. Unexpected buckets found.")
        self._life = family.life
        texts = {str(key): str(value) for key, value in (labels or {}).items()}
        self._stored = registry.metric(family.stored, texts, tuple(sorted(buckets or ())))

    def increment(self, value: float) -> None:
        """Add ``value`` to a counter or gauge."""
        self._check()
        try:
            self._stored.increment(float(value))
        except ServingError as error:
            raise _failure("increment metric value", error) from None

    def set(self, value: float) -> None:
        """Replace the value of a gauge."""
        self._check()
        try:
            self._stored.set(float(value))
        except ServingError as error:
            raise _failure("set metric value", error) from None

    def observe(self, value: float) -> None:
        """Count ``value`` in a histogram."""
        self._check()
        try:
            self._stored.observe(float(value))
        except ServingError as error:
            raise _failure("observe metric value", error) from None

    def value(self) -> float:
        """Return the value of a counter or gauge."""
        self._check()
        try:
            return self._stored.value()
        except ServingError as error:
            raise _failure("get metric value", error) from None

    def _check(self) -> None:
        if not self._life:
            raise TritonModelException(
                "Invalid metric operation as the corresponding 'MetricFamily' has been deleted. The 'MetricFamily' "
                "object should be kept as long as the metrics are being used."
            )


class MetricFamily:
    """Time series of one name and kind; of several instances of a model they are one family."""

    COUNTER: ClassVar[int] = 0
    GAUGE: ClassVar[int] = 1
    HISTOGRAM: ClassVar[int] = 2

    def __init__(self, name: str, description: str, kind: int) -> None:
        if kind not in (0, 1, 2):
            raise TritonModelException("Unknown metric kind")
        try:
            self.stored: StoredFamily = registry.family(name, description, _KINDS[kind])
        except ServingError as error:
            raise _failure("create metric family", error) from None
        #: Non-empty as long as the family exists; its metrics hold it, not the family.
        self.life: list[bool] = [True]

    def Metric(  # Triton's name
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """Return the metric with these labels; a histogram needs the upper bounds of its buckets."""
        return Metric(self, labels, buckets)

    def __del__(self) -> None:
        if hasattr(self, "life"):
            self.life.clear()
            registry.release(self.stored)
