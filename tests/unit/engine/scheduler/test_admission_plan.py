"""Who of those that come would be answered in time, behind what waits."""

from __future__ import annotations

from queues import MS, run

from forebay.engine.scheduler.admission_plan import AdmissionPlan
from forebay.engine.scheduler.cost_model import CostModel
from forebay.engine.scheduler.waiting import Waiting

#: How long every request has, ns.
GIVEN_NS = 10 * MS


def costing(base_ms: float, row_ms: float) -> CostModel:
    model = CostModel()
    for _ in range(200):
        for rows in (1, 8, 32):
            model.observe(rows, int((base_ms + row_ms * rows) * MS))
    return model


def due_ns(item: Waiting) -> int:
    return item.enqueue_ns + GIVEN_NS


def plan(free_ms: dict[int, float], costs: dict[int, CostModel] | None = None, *, useful: int = 1) -> AdmissionPlan:
    """Return a plan for batches of at most 32 rows, on instances that are free at these times."""
    known = costs or {instance: costing(1.0, 0.1) for instance in free_ms}
    return AdmissionPlan(
        known, {instance: int(at * MS) for instance, at in free_ms.items()}, 32, due_ns, lambda _cost: useful
    )


def test_requests_join_the_last_batch_until_it_is_full_then_begin_another() -> None:
    """From 3 ms on: 32 rows until 7.2 ms, then 17 rows until 9.9 ms."""
    made = plan({1: 3.05})
    assert made.admit(run(0, 30), 0) == (30, 0)
    admitted, answer_ns = made.admit(run(30, 30), 0)
    assert admitted == 19
    assert GIVEN_NS < answer_ns < GIVEN_NS + 1.2 * MS


def test_what_waits_already_is_counted_before_anybody_comes() -> None:
    made = plan({1: 3.05})
    made.seat([run(0, 40)])
    assert made.admit(run(40, 30), 0)[0] == 9


def test_what_waits_without_hope_takes_nobodys_place() -> None:
    made = plan({1: 3.05})
    made.seat([run(0, 40, at_ns=-9 * MS)])
    assert made.admit(run(40, 60), 0)[0] == 49


def test_a_batch_ends_in_time_for_the_first_of_its_requests() -> None:
    """The first one's time is up at 4.55 ms, 15 rows after the instance is free."""
    made = plan({1: 2.05})
    made.seat([run(0, 1, at_ns=int(-5.45 * MS))])
    assert made.admit(run(1, 20), 0) == (20, 0)
    # A second batch of 32 ends at 8.75 ms, and a third one has time for 2.
    assert made.admit(run(21, 40), 0)[0] == 14 + 32 + 2 - 20


def test_requests_go_to_the_instance_that_answers_first() -> None:
    slow_and_free, fast_and_busy = costing(9.5, 1.0), costing(1.0, 0.1)
    made = plan({1: 0.0, 2: 5.0}, {1: slow_and_free, 2: fast_and_busy})
    assert made.admit(run(0, 10), 0) == (10, 0)


def test_a_small_batch_is_not_begun_where_large_ones_are_needed() -> None:
    assert plan({1: 8.0}).admit(run(0, 5), 0) == (5, 0)
    admitted, answer_ns = plan({1: 8.0}, useful=20).admit(run(0, 5), 0)
    assert admitted == 0
    assert answer_ns > 10.9 * MS


def test_some_are_let_in_in_any_case() -> None:
    made = plan({1: 0.0}, {1: costing(30.0, 1.0)})
    assert made.admit(run(0, 5), 1)[0] == 1
