"""Metrics that models define themselves, of several workers (spec M-055, P-119)."""

from __future__ import annotations

import math

from forebay.frontend.custom_metrics import CustomMetrics
from forebay.ipc.worker_messages import FamilySample, MetricSample, ModelMetrics


def _family(kind: str, *samples: MetricSample, name: str = "f") -> FamilySample:
    return FamilySample(name, "what\nit is", kind, samples)


def test_counters_are_summed_and_gauges_are_the_last_set() -> None:
    custom = CustomMetrics()
    one, two = MetricSample({"b": "x", "a": 'q"'}, 2.0), MetricSample({"a": 'q"', "b": "x"}, 3.5)
    custom.take(ModelMetrics(instance=1, families=(_family("counter", one), _family("gauge", one, name="g"))))
    custom.take(ModelMetrics(instance=2, families=(_family("counter", two), _family("gauge", two, name="g"))))
    assert custom.lines() == [
        "# HELP f what\\nit is",
        "# TYPE f counter",
        'f{a="q\\"",b="x"} 5.5',
        "# HELP g what\\nit is",
        "# TYPE g gauge",
        'g{a="q\\"",b="x"} 3.5',
    ]
    custom.take(ModelMetrics(instance=2, families=()))
    assert 'f{a="q\\"",b="x"} 2' in custom.lines()
    custom.take(ModelMetrics(instance=1, families=()))
    assert custom.lines() == []


def test_histograms_are_summed_bucket_by_bucket() -> None:
    custom = CustomMetrics()
    sample = MetricSample({}, 4.5, ((0.5, 1), (2.0, 3), (math.inf, 4)))
    for instance in (1, 2):
        custom.take(ModelMetrics(instance=instance, families=(_family("histogram", sample),)))
    assert custom.lines()[2:] == [
        "f_count 8",
        "f_sum 9",
        'f_bucket{le="0.5"} 2',
        'f_bucket{le="2"} 6',
        'f_bucket{le="+Inf"} 8',
    ]


def test_a_family_of_another_kind_is_left_out() -> None:
    custom = CustomMetrics()
    custom.take(ModelMetrics(instance=1, families=(_family("counter", MetricSample({}, 1.0)),)))
    custom.take(ModelMetrics(instance=2, families=(_family("gauge", MetricSample({}, 7.0)),)))
    assert custom.lines()[1:] == ["# TYPE f counter", "f 1"]
