"""Which answers a frontend gives before those that have come ahead of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from engine_scene import Rows, Surroundings, play, turn

from forebay.ipc.counters import ProducerCounter
from forebay.ipc.wire import Kind


@pytest.mark.parametrize("late", [1, 2])
def test_answer_of_one_request_passes_those_of_a_crowd_and_that_of_a_batch_does_not(late: int) -> None:
    async def scenario(s: Surroundings) -> None:
        crowd = [s.publish()[0] for _ in range(8)]
        await turn()
        others = [s.publish()[0] for _ in range(late)]
        await turn()
        s.engine.crowded_routes.add(s.route)
        order: list[str] = []

        def look() -> None:
            s.engine.take_answer_now()
            order.append(f"{sum(not owner.end for owner in crowd)} {sum(not owner.end for owner in others)}")

        s.engine.between_answers = look
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (0, 8)))
        await s.tell_runs(Kind.RUNS_DONE, (8, late), batch=2)
        assert order[0] == ("7 0" if late == 1 else "7 2")
        assert order[-1][0] == "0"
        assert all(owner.end for owner in (*crowd, *others))

    play(scenario)


@dataclass
class Waiting:
    """Two batches of two requests, and one request, none of them answered."""

    first: list[Rows]
    second: list[Rows]
    lone: Rows

    @property
    def answered(self) -> tuple[bool, bool, bool]:
        return (all(o.end for o in self.first), all(o.end for o in self.second), bool(self.lone.end))


def two_batches_and_one_request(s: Surroundings) -> Waiting:
    owners = [s.publish()[0] for _ in range(5)]
    return Waiting(owners[:2], owners[2:4], owners[4])


def test_answer_of_one_request_passes_those_of_batches_that_wait() -> None:
    """They are given in the turns that follow, with nothing more to be told."""

    async def scenario(s: Surroundings) -> None:
        waiting = two_batches_and_one_request(s)
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (0, 2)))
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (2, 2), batch=2))
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (4, 1), instance=9))
        s.engine.take_answer_now()
        assert waiting.answered == (False, False, True)
        await turn()
        await turn()
        assert waiting.answered == (True, True, True)

    play(scenario)


def test_answers_of_one_instance_keep_their_order() -> None:
    async def scenario(s: Surroundings) -> None:
        waiting = two_batches_and_one_request(s)
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (0, 2)))
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (4, 1), batch=2))
        s.engine.take_answer_now()
        assert waiting.answered == (False, False, False)
        await turn()
        await turn()
        assert waiting.answered == (True, False, True)

    play(scenario)


def test_nothing_passes_what_is_no_answer() -> None:
    """An answer before the news that a worker is gone is one that it gave; behind it, it would be of the next one."""

    async def scenario(s: Surroundings) -> None:
        waiting = two_batches_and_one_request(s)
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (2, 2), batch=2))
        s.bell.send(s.packed_runs(Kind.RUNS_LOST, (0, 2)))
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (4, 1), instance=9))
        for _ in range(3):
            s.engine.take_answer_now()
        assert waiting.answered == (False, False, False)
        for _ in range(3):
            await turn()
        assert waiting.answered == (False, True, True)
        assert s.count(ProducerCounter.RESUBMITTED) == 2

    play(scenario)


def test_answer_of_a_parcel_is_given_between_requests_and_not_while_others_are() -> None:
    async def scenario(s: Surroundings) -> None:
        waiting = two_batches_and_one_request(s)
        early, late = s.submit(1), s.submit(2)
        await turn()
        s.bell.send(s.packed_reply(1))
        s.engine.take_answer_now()
        assert early.answers
        s.engine.between_answers = s.engine.take_answer_now
        s.engine.crowded_routes.add(s.route)
        s.bell.send(s.packed_runs(Kind.RUNS_DONE, (0, 2)))
        s.bell.send(s.packed_reply(2))
        s.engine.take_answer_now()
        assert waiting.answered == (False, False, False)
        assert not late.answers
        await turn()
        await turn()
        assert waiting.answered == (True, False, False)
        assert late.answers

    play(scenario)


def test_as_many_batches_as_come_wait_in_the_doorbell() -> None:
    count = 12

    async def scenario(s: Surroundings) -> None:
        owners = [s.publish()[0] for _ in range(2 * count)]
        for batch in range(count):
            s.bell.send(s.packed_runs(Kind.RUNS_DONE, (2 * batch, 2), batch=batch + 1))
        for _ in range(count):
            s.engine.take_answer_now()
        assert not any(owner.end for owner in owners)
        for _ in range(count + 1):
            await turn()
        assert all(owner.end for owner in owners)

    play(scenario)
