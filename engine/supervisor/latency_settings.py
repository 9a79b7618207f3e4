"""What ``--metrics-config`` and a model's ``model_metrics`` say about latencies (spec M-030..M-034, C-021)."""

from __future__ import annotations

from forebay.engine.option_values import TRUE_WORDS
from forebay.engine.repository.model_spec import ModelSpec
from forebay.engine.settings import MetricsSettings
from forebay.ipc.log import log

#: The only family whose buckets a model may choose.
FIRST_RESPONSE_FAMILY = "nv_inference_first_response_histogram_ms"


def measures_latencies(metrics: MetricsSettings) -> bool:
    """Whether frontends are to keep the distributions that summaries and Triton's histograms are made of."""
    options = ("summary_latencies", "histogram_latencies")
    return any((metrics.option(option) or "").lower() in TRUE_WORDS for option in options)


def first_response_buckets_ms(spec: ModelSpec) -> tuple[float, ...]:
    """Return the upper bounds that a model wants for its histogram of first responses; empty: the usual ones."""
    return next((found.buckets for found in spec.histograms if found.family == FIRST_RESPONSE_FAMILY), ())


def warn_of_unknown_families(spec: ModelSpec) -> None:
    """Log families that no model can customise."""
    for found in spec.histograms:
        if found.family != FIRST_RESPONSE_FAMILY:
            log.warning(
                f"Metric family '{found.family}' in 'metric_identifier' is not a customizable metric in Triton core."
            )
