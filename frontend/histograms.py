"""Histograms and summaries of durations as Prometheus reads them, out of buckets in the counters file.

Ours are native histograms of every stage, which can be added up over models and servers (better than L-039, P14);
Triton's are the summaries over a sliding window and the histogram of first responses (spec M-030..M-034).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from forebay.ipc.counters import FINE_BUCKETS, LAST_BUCKET, STAGE_WORDS, Stage, fine_bucket_range
from forebay.ipc.log import log

#: The quantiles that Triton shows unless told otherwise, with the errors that it allows (spec M-031).
DEFAULT_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
#: A summary tells of so many seconds, by so many steps (prometheus-cpp's defaults).
WINDOW_SECS = 60.0
WINDOW_STEPS = 5

#: Upper bounds of our buckets, seconds.
DURATION_BOUNDS = tuple(format(1024e-9 * 2**index, ".6g") for index in range(LAST_BUCKET))

#: Upper bounds of the histogram of first responses unless the model sets its own (spec M-030).
FIRST_RESPONSE_BOUNDS_MS = (100.0, 500.0, 2000.0, 5000.0)


def parse_quantiles(text: str) -> tuple[float, ...]:
    """Return the quantiles of ``summary_quantiles``, ``0.5:0.05,0.99:0.001``; a bad pair is logged and skipped.

    The errors need no attention: our buckets are finer than what is usually asked for.
    """
    found: list[float] = []
    for pair in text.split(","):
        quantile, _, error = pair.partition(":")
        try:
            value, _allowed = float(quantile), float(error)
        except ValueError:
            log.error(f"failed to parse quantile pair '{pair}', expected <quantile>:<error>")
            continue
        if not 0.0 <= value <= 1.0:
            log.error(f"failed to parse quantile pair '{pair}', the quantile must be from 0 to 1")
            continue
        found.append(value)
    return tuple(found)


def with_label(series: str, name: str, value: str) -> str:
    """Return ``{a="b",...}`` with one more label at the end."""
    return f'{series[:-1]}{"," if len(series) > 2 else ""}{name}="{value}"}}'


def histogram_lines(
    name: str, labels: str, bounds: Sequence[str], counts: Sequence[int], total: int | float
) -> list[str]:
    """Return the samples of one histogram.

    Args:
        labels: rendered, braces included.
        bounds: upper bounds; there is one more bucket than these.
        counts: per bucket, not cumulated.
        total: sum of all observations.
    """
    lines = [f"{name}_count{labels} {sum(counts)}", f"{name}_sum{labels} {format(total, '.10g')}"]
    cumulative = 0
    for bound, count in zip((*bounds, "+Inf"), counts, strict=True):
        cumulative += count
        lines.append(f"{name}_bucket{with_label(labels, 'le', bound)} {cumulative}")
    return lines


class StageTotals(msgspec.Struct, frozen=True):
    """What one stage of one model version took, summed over the frontends."""

    sum_us: int
    buckets: list[int]

    @property
    def count(self) -> int:
        return sum(self.buckets)


def read_stage(words: Sequence[int], stage: Stage) -> StageTotals:
    """Pick a stage out of a block of details."""
    first = stage * STAGE_WORDS
    return StageTotals(words[first], list(words[first + 1 : first + STAGE_WORDS]))


def rebucket_ms(stage: StageTotals, bounds_ms: Sequence[float]) -> list[int]:
    """Return the counts of a stage in coarser buckets; a fine bucket goes where its middle lies."""
    counts = [0] * (len(bounds_ms) + 1)
    for index, count in enumerate(stage.buckets):
        if count:
            low, high = fine_bucket_range(index)
            middle_ms = (low + high) / 2000
            counts[next((n for n, bound in enumerate(bounds_ms) if middle_ms <= bound), len(bounds_ms))] += count
    return counts


def quantile_us(buckets: Sequence[int], quantile: float) -> int | None:
    """Return a quantile of what the buckets count, in microseconds, within 6 %; None: they count nothing."""
    total = sum(buckets)
    if total <= 0:
        return None
    rank = max(quantile * total, 1)
    seen = 0
    for index in range(FINE_BUCKETS):
        seen += buckets[index]
        if seen >= rank:
            low, high = fine_bucket_range(index)
            return (low + high - 1) // 2
    return fine_bucket_range(FINE_BUCKETS - 1)[0]


class SlidingWindow:
    """What buckets counted in the last :data:`WINDOW_SECS`: the difference to what they were then."""

    def __init__(self) -> None:
        """Begin with a window in which nothing has happened."""
        self._former: deque[list[int]] = deque([[0] * FINE_BUCKETS], maxlen=WINDOW_STEPS)

    def step(self, buckets: list[int]) -> None:
        """A step of the window has passed."""
        self._former.append(buckets)

    def since_begin(self, buckets: Sequence[int]) -> list[int]:
        """Return the counts of the window."""
        return [max(now - then, 0) for now, then in zip(buckets, self._former[0], strict=True)]
