"""What a batch costs on one instance: ``a * rows + b``, learned from the batches that it ran. Pure.

A weighted least-squares line that forgets: the last fifty batches or so count. One batch that took far longer than
others moves it little; several in a row, on the same side, mean that the instance has changed, and the line is scaled
to them at once. Beyond twice the largest batch that was ever seen nothing is claimed.
"""

from __future__ import annotations

#: What an observation still weighs when the next one comes.
_KEPT = 0.98

#: Pulls the slope towards what it was, in rows squared: batches of one size say nothing about it.
_SLOPE_PULL = 0.25

#: Weight of a new deviation in the mean deviation.
_DEVIATION_SHARE = 0.05

#: Mean deviations above the expectation within which most batches end. More would refuse what could well be in time:
#: under noise a few late answers cost less than many refusals.
_CEILING_DEVIATIONS = 1.0

#: A batch that is dearer by so many mean deviations, and this share of its expectation, is strange; so is one that is
#: cheaper by this share.
_STRANGE_DEVIATIONS = 5.0
_STRANGE_SHARE = 0.5

#: So many strange batches in a row are the new normal. Cheaper ones are believed sooner: while an instance is thought
#: to be slow, requests are refused that would teach better.
_DEARER_COUNT, _CHEAPER_COUNT = 6, 3

#: What :meth:`CostModel.rows_within` answers when any number of rows fits.
UNLIMITED_ROWS = 1 << 30


class CostModel:
    """The cost of batches on one instance. Nothing is expected to cost anything before the first one ended."""

    __slots__ = (
        "_base_ns",
        "_cost_sum",
        "_deviation_ns",
        "_largest_rows",
        "_product_sum",
        "_row_ns",
        "_rows_squared_sum",
        "_rows_sum",
        "_strange",
        "_weight",
    )

    def __init__(self) -> None:
        self._row_ns = 0.0
        self._base_ns = 0.0
        self._deviation_ns = 0.0
        self._largest_rows = 0
        #: Strange batches in a row; negative: they were cheaper than expected.
        self._strange = 0
        self._forget()

    def _forget(self) -> None:
        self._weight = self._rows_sum = self._rows_squared_sum = self._cost_sum = self._product_sum = 0.0

    @property
    def row_ns(self) -> float:
        """What one row more costs, ns."""
        return self._row_ns

    @property
    def base_ns(self) -> float:
        """What a batch costs however small it is, ns."""
        return self._base_ns

    @property
    def trusted_rows(self) -> int:
        """Rows up to which the line is believed: small batches must show what larger ones may cost."""
        return max(2 * self._largest_rows, 1)

    def expected_ns(self, rows: int) -> int:
        """Return what a batch of so many rows takes on average."""
        return int(self._row_ns * rows + self._base_ns)

    def ceiling_ns(self, rows: int) -> int:
        """Return what most batches of so many rows stay below; never more than twice the expectation."""
        expected_ns = self._row_ns * rows + self._base_ns
        return int(expected_ns + min(_CEILING_DEVIATIONS * self._deviation_ns, expected_ns))

    def rows_within(self, limit_ns: int) -> int:
        """Return the most rows whose :meth:`ceiling_ns` is at most ``limit_ns``; 0: not even one."""
        if limit_ns < self.ceiling_ns(1):
            return 0
        if self._row_ns <= 0:
            return UNLIMITED_ROWS
        # The ceiling is the lower one of two lines: what stays below either of them fits.
        room_ns = max(limit_ns - _CEILING_DEVIATIONS * self._deviation_ns, limit_ns / 2) - self._base_ns
        # A nanosecond more, so that what has exactly the time it takes is not lost to rounding.
        return min(max(int((room_ns + 1.0) / self._row_ns), 1), UNLIMITED_ROWS)

    def observe(self, rows: int, cost_ns: int) -> None:
        """Learn from a batch that ended."""
        self._largest_rows = max(self._largest_rows, rows)
        cost = float(max(cost_ns, 1))
        if self._weight:
            expected_ns = self._row_ns * rows + self._base_ns
            off_ns = cost - expected_ns
            bound_ns = _STRANGE_SHARE * expected_ns
            if off_ns > 0:
                bound_ns = max(bound_ns, _STRANGE_DEVIATIONS * self._deviation_ns)
            if abs(off_ns) <= bound_ns:
                self._strange = 0
            elif self._is_new_normal(off_ns > 0):
                self._scale(cost / expected_ns)
                off_ns = 0.0
            else:
                off_ns = bound_ns if off_ns > 0 else -bound_ns
                cost = expected_ns + off_ns
            self._deviation_ns += _DEVIATION_SHARE * (abs(off_ns) - self._deviation_ns)
        self._add(rows, cost)
        self._fit()

    def _is_new_normal(self, is_dearer: bool) -> bool:
        """Count a strange batch; return whether there were enough of its kind."""
        if is_dearer:
            self._strange = max(self._strange, 0) + 1
        else:
            self._strange = min(self._strange, 0) - 1
        return self._strange >= _DEARER_COUNT or self._strange <= -_CHEAPER_COUNT

    def _scale(self, factor: float) -> None:
        """Start anew with a line of the same form."""
        self._row_ns *= factor
        self._base_ns *= factor
        self._deviation_ns *= factor
        self._strange = 0
        self._forget()

    def _add(self, rows: int, cost_ns: float) -> None:
        self._weight = self._weight * _KEPT + 1.0
        self._rows_sum = self._rows_sum * _KEPT + rows
        self._rows_squared_sum = self._rows_squared_sum * _KEPT + rows * rows
        self._cost_sum = self._cost_sum * _KEPT + cost_ns
        self._product_sum = self._product_sum * _KEPT + rows * cost_ns

    def _fit(self) -> None:
        mean_rows = self._rows_sum / self._weight
        mean_ns = self._cost_sum / self._weight
        variance = max(self._rows_squared_sum / self._weight - mean_rows * mean_rows, 0.0)
        covariance = self._product_sum / self._weight - mean_rows * mean_ns
        slope = (covariance + _SLOPE_PULL * self._row_ns) / (variance + _SLOPE_PULL)
        # Neither a row nor a batch costs less than nothing.
        self._row_ns = min(max(slope, 0.0), mean_ns / mean_rows)
        self._base_ns = mean_ns - self._row_ns * mean_rows
