"""What the scheduler learns about the cost of batches."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from forebay.engine.scheduler.cost_model import UNLIMITED_ROWS, CostModel

MS = 1_000_000


def learned(base_ms: float, row_ms: float, *, batches: int = 100, noise: float = 0.0, seed: int = 1) -> CostModel:
    """Return a model that saw batches of 1 to 32 rows."""
    model = CostModel()
    observe(model, base_ms, row_ms, batches=batches, noise=noise, seed=seed)
    return model


def observe(
    model: CostModel, base_ms: float, row_ms: float, *, batches: int, noise: float = 0.0, seed: int = 1
) -> None:
    dice = random.Random(seed)
    for _ in range(batches):
        rows = dice.randint(1, 32)
        model.observe(rows, int((base_ms + row_ms * rows) * MS * (1 + noise * dice.uniform(-1, 1))))


def is_near(actual_ns: float, expected_ms: float, share: float = 0.1) -> bool:
    return abs(actual_ns - expected_ms * MS) <= share * expected_ms * MS


def test_nothing_costs_anything_before_the_first_batch() -> None:
    model = CostModel()
    assert model.expected_ns(64) == model.ceiling_ns(64) == 0
    assert model.rows_within(0) == UNLIMITED_ROWS
    assert model.trusted_rows == 1


def test_base_and_slope_are_found_in_spite_of_noise() -> None:
    model = learned(1.0, 0.2, noise=0.2)
    assert is_near(model.base_ns, 1.0, 0.3)
    assert is_near(model.row_ns, 0.2)
    assert is_near(model.expected_ns(20), 5.0)


def test_batches_of_one_size_leave_the_slope_alone_and_move_the_base() -> None:
    model = learned(1.0, 0.2)
    for _ in range(200):
        model.observe(8, int(3.0 * MS))
    assert is_near(model.row_ns, 0.2, 0.2)
    assert is_near(model.expected_ns(8), 3.0, 0.05)


def test_one_batch_that_took_far_longer_moves_little() -> None:
    model = learned(1.0, 0.2)
    model.observe(8, 500 * MS)
    assert is_near(model.expected_ns(8), 2.6)


def test_an_instance_that_has_changed_is_learned_anew_after_a_few_batches() -> None:
    model = learned(1.0, 0.2)
    observe(model, 10.0, 2.0, batches=8)
    assert is_near(model.expected_ns(16), 42.0, 0.2)
    observe(model, 1.0, 0.2, batches=5)
    assert is_near(model.expected_ns(16), 4.2, 0.2)


def test_what_is_old_is_forgotten() -> None:
    model = learned(1.0, 0.2)
    # Little by little, so that no batch is strange.
    for step in range(40):
        observe(model, 1.0 + step * 0.1, 0.2, batches=20, seed=step)
    assert is_near(model.base_ns, 4.9, 0.15)


def test_only_twice_the_largest_batch_seen_is_trusted() -> None:
    model = CostModel()
    model.observe(3, MS)
    assert model.trusted_rows == 6


@given(
    st.lists(st.tuples(st.integers(1, 256), st.integers(1, 10**10)), min_size=1, max_size=40), st.integers(0, 10**10)
)
def test_any_observations_leave_a_line_that_makes_sense(seen: list[tuple[int, int]], limit_ns: int) -> None:
    """Costs are positive, grow with the rows, and the two questions agree."""
    model = CostModel()
    for rows, cost_ns in seen:
        model.observe(rows, cost_ns)
    assert model.row_ns >= 0
    assert model.base_ns >= -1
    costs = [model.expected_ns(rows) for rows in (1, 2, 8, 64)]
    assert costs == sorted(costs)
    assert costs[0] >= 0
    for rows in (1, 5, 64):
        assert model.expected_ns(rows) <= model.ceiling_ns(rows) <= 2 * model.expected_ns(rows) + 2
    within = model.rows_within(limit_ns)
    if within:
        assert within == UNLIMITED_ROWS or model.ceiling_ns(within) <= limit_ns * (1 + 1e-6) + 2
    else:
        assert model.ceiling_ns(1) > limit_ns


@given(st.integers(1, 10**7), st.integers(0, 10**8), st.integers(1, 500))
def test_what_has_exactly_the_time_it_takes_fits(row_ns: int, base_ns: int, rows: int) -> None:
    model = CostModel()
    for seen in (1, 2, 64):
        model.observe(seen, base_ns + row_ns * seen)
    assert model.rows_within(model.ceiling_ns(rows) + 1) >= rows
