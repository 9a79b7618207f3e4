"""What a request of a shared-memory client carries besides its tensors."""

from __future__ import annotations

import math
import time

import pytest

from forebay.frontend.client.options import deadline_after


def test_a_deadline_lies_ahead() -> None:
    before_ns = time.monotonic_ns()
    assert before_ns + 10**9 <= deadline_after(1.0) <= time.monotonic_ns() + 10**9


@pytest.mark.parametrize("timeout_s", [None, math.inf, 1e300])
def test_a_timeout_that_never_comes_is_none(timeout_s: float | None) -> None:
    """As a number of nanoseconds it would not fit into a message."""
    assert deadline_after(timeout_s) == 0
