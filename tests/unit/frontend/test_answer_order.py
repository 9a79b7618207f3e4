"""Answers leave in the order of their requests (spec S-024)."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.answer_order import AnswerOrder


class Desk:
    """Three requests, and what has been given."""

    def __init__(self, *tokens: int) -> None:
        self.order = AnswerOrder()
        self.given: list[str] = []
        for token in tokens:
            self.order.expect(token)

    def answer(self, token: int, label: str = "", *, final: bool = True) -> None:
        give: Callable[[], None] = lambda: self.given.append(f"{token}{label}")  # noqa: E731
        self.order.answer(token, give, final=final)


def test_later_answers_wait_for_the_first() -> None:
    desk = Desk(1, 2, 3)
    desk.answer(3)
    desk.answer(2)
    assert desk.given == []
    desk.answer(1)
    assert desk.given == ["1", "2", "3"]


def test_the_next_in_turn_is_answered_at_once() -> None:
    desk = Desk(1, 2)
    desk.answer(1)
    desk.answer(2)
    assert desk.given == ["1", "2"]


def test_a_request_with_several_answers_keeps_its_turn_until_the_last() -> None:
    desk = Desk(1, 2, 3)
    desk.answer(2, "a", final=False)
    desk.answer(1)
    desk.answer(3)
    desk.answer(2, "b", final=False)
    assert desk.given == ["1", "2a", "2b"]
    desk.answer(2, "c")
    assert desk.given == ["1", "2a", "2b", "2c", "3"]


def test_a_request_that_is_handed_in_again_keeps_its_place() -> None:
    desk = Desk(1, 2)
    desk.order.expect(1)
    desk.answer(2)
    assert desk.given == []
    desk.answer(1)
    assert desk.given == ["1", "2"]


def test_giving_an_answer_may_submit_another_request() -> None:
    desk = Desk(1, 2)
    desk.answer(2)

    def give() -> None:
        desk.given.append("1")
        desk.order.expect(3)

    desk.order.answer(1, give, final=True)
    desk.answer(3)
    assert desk.given == ["1", "2", "3"]


@given(st.permutations(list(range(8))))
def test_any_order_of_execution_gives_the_order_of_submission(executed: list[int]) -> None:
    desk = Desk(*range(8))
    for token in executed:
        desk.answer(token)
    assert desk.given == [str(token) for token in range(8)]
