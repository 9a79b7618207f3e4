"""Which cores instances are pinned to."""

from __future__ import annotations

from forebay.engine.supervisor.core_pool import CorePool, usable_cores


def test_instances_get_distinct_cores_beside_the_reserved_ones() -> None:
    pool = CorePool((0, 1, 2, 3, 4))
    pool.expect(3)
    assert pool.take(2) == [(2,), (3,)]
    assert pool.take(1) == [(4,)]


def test_nobody_is_pinned_where_cores_do_not_suffice_for_all() -> None:
    pool = CorePool((0, 1, 2, 3))
    pool.expect(3)
    assert pool.take(1) == [()]
    assert pool.take(2) == [(), ()]


def test_cores_are_lent_again() -> None:
    pool = CorePool((0, 1, 2))
    (core,) = pool.take(1)
    assert pool.take(1) == [()]
    pool.give_back(core)
    assert pool.take(1) == [(2,)]


def test_quota_limits_the_cores() -> None:
    assert usable_cores({4, 5, 6, 7}, 2.5) == (4, 5)
    assert usable_cores({4, 5}, 0.2) == (4,)
    assert usable_cores({4, 5}, float("inf")) == (4, 5)
