"""When a process that died is started again."""

from __future__ import annotations

from forebay.engine.supervisor.backoff import HEALTHY_S, LAST_DELAY_S, LOOP_COUNT, LOOP_WINDOW_S, Backoff


def test_first_restart_is_at_once_and_then_delays_double_up_to_a_limit() -> None:
    backoff = Backoff()
    delays = [backoff.died(float(n), 0.0) for n in range(9)]
    assert delays[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == LAST_DELAY_S


def test_healthy_life_starts_over() -> None:
    backoff = Backoff()
    for n in range(4):
        backoff.died(float(n), 0.0)
    assert backoff.died(100.0, HEALTHY_S) == 0.0
    assert not backoff.is_looping


def test_five_deaths_within_a_minute_are_a_loop() -> None:
    backoff = Backoff()
    for n in range(LOOP_COUNT):
        assert not backoff.is_looping
        backoff.died(float(n), 0.0)
    assert backoff.is_looping


def test_slow_deaths_are_no_loop() -> None:
    backoff = Backoff()
    for n in range(2 * LOOP_COUNT):
        backoff.died(n * LOOP_WINDOW_S / (LOOP_COUNT - 1), 0.0)
        assert not backoff.is_looping
