"""How much is asked for, as it looks a moment later."""

from __future__ import annotations

import pytest
from queues import MS

from forebay.engine.scheduler.arrival_rate import ArrivalRate


def test_the_rate_forgets() -> None:
    rate = ArrivalRate()
    for index in range(1000):
        rate.note(1, index * MS)
    assert rate.at(1000 * MS) == pytest.approx(1 / MS, rel=0.05)
    assert rate.at(1500 * MS) < 0.01 / MS


def test_few_arrivals_are_not_taken_for_many() -> None:
    """Just after one of them, too."""
    rate = ArrivalRate()
    for index in range(20):
        rate.note(1, index * 80 * MS)
    assert rate.at(19 * 80 * MS) == pytest.approx(1 / (80 * MS), rel=0.1)


def test_nothing_asked_for_is_no_rate() -> None:
    assert ArrivalRate().at(5 * MS) == 0.0
