"""Buckets, quantiles and their rendering (spec M-030, M-031, M-034)."""

from __future__ import annotations

import itertools

import pytest

from forebay.frontend.histograms import (
    DURATION_BOUNDS,
    WINDOW_STEPS,
    SlidingWindow,
    StageTotals,
    histogram_lines,
    parse_quantiles,
    quantile_us,
    rebucket_ms,
    with_label,
)
from forebay.ipc.counters import DURATION_BUCKETS, FINE_BUCKETS, fine_bucket, fine_bucket_range


def _counted(*durations_us: int) -> list[int]:
    buckets = [0] * FINE_BUCKETS
    for us in durations_us:
        buckets[fine_bucket(us)] += 1
    return buckets


@pytest.mark.parametrize("us", [0, 1, 7, 15, 16, 17, 31, 32, 33, 1000, 123_456, 10**7, 2**32 - 1])
def test_a_duration_lies_in_its_bucket(us: int) -> None:
    low, high = fine_bucket_range(fine_bucket(us))
    assert low <= us < high
    assert high - low <= max(us // 8, 1)


def test_what_is_longer_than_all_buckets_is_in_the_last() -> None:
    assert fine_bucket(2**50) == FINE_BUCKETS - 1


def test_buckets_follow_each_other_without_gaps() -> None:
    ranges = [fine_bucket_range(index) for index in range(FINE_BUCKETS)]
    assert all(high == low for (_low, high), (low, _high) in itertools.pairwise(ranges))


def test_quantiles_are_within_six_percent() -> None:
    buckets = _counted(*range(1, 10_001))
    for quantile in (0.5, 0.9, 0.99):
        found = quantile_us(buckets, quantile)
        assert found is not None
        assert abs(found - quantile * 10_000) <= 0.07 * quantile * 10_000
    assert quantile_us([0] * FINE_BUCKETS, 0.5) is None
    assert quantile_us(_counted(5), 0.999) == 5


def test_a_window_forgets_what_is_long_past() -> None:
    window = SlidingWindow()
    early = _counted(10)
    assert window.since_begin(early) == early
    for _ in range(WINDOW_STEPS):
        window.step(early)
    later = [a + b for a, b in zip(early, _counted(1000), strict=True)]
    assert window.since_begin(later) == _counted(1000)


def test_bad_pairs_of_quantiles_are_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    """M-034."""
    assert parse_quantiles("0.5:0.05,x,0.9,2:0.1,0.99:0.001") == (0.5, 0.99)
    assert capfd.readouterr().err.count("failed to parse quantile pair") == 3


def test_histograms_are_cumulative() -> None:
    assert histogram_lines("h", '{m="a"}', ("1", "2"), [3, 0, 2], 1.5) == [
        'h_count{m="a"} 5',
        'h_sum{m="a"} 1.5',
        'h_bucket{m="a",le="1"} 3',
        'h_bucket{m="a",le="2"} 3',
        'h_bucket{m="a",le="+Inf"} 5',
    ]
    assert with_label("{}", "le", "1") == '{le="1"}'


def test_our_bounds_go_from_microseconds_to_seconds() -> None:
    """P14: from 1 us to 10 s."""
    assert len(DURATION_BOUNDS) == DURATION_BUCKETS - 1
    assert DURATION_BOUNDS[0] == "1.024e-06"
    assert float(DURATION_BOUNDS[-1]) > 10


def test_first_responses_in_coarse_buckets() -> None:
    stage = StageTotals(0, _counted(50_000, 90_000, 300_000, 9_000_000))
    assert rebucket_ms(stage, (100.0, 500.0, 2000.0, 5000.0)) == [2, 1, 0, 0, 1]
