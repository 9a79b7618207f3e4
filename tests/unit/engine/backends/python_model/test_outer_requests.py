"""When nested calls end with the requests that they are made for (spec L-026)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest

from forebay.engine.backends.python_model.outer_requests import OuterRequest, Watch, are_abandoned
from forebay.ipc.errors import Unavailable


@dataclass
class Outer:
    is_cancelled: bool = False
    is_final: bool = False


class Call:
    """Tells when it is abandoned; the server may be ``gone`` by then."""

    def __init__(self, *, is_over: bool = False, is_server_gone: bool = False) -> None:
        self.is_over = is_over
        self.abandoned = threading.Event()
        self._is_server_gone = is_server_gone

    def abandon(self) -> None:
        self.abandoned.set()
        if self._is_server_gone:
            raise Unavailable("gone")


ALIVE, LEFT = Outer(), Outer(is_cancelled=True)
ANSWERED, ANSWERED_TOO_LATE = Outer(is_final=True), Outer(is_cancelled=True, is_final=True)


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([LEFT], True),
        ([LEFT, LEFT], True),
        ([LEFT, ALIVE], False),
        ([LEFT, ANSWERED], True),
        ([ALIVE], False),
        ([ANSWERED, ANSWERED_TOO_LATE], False),
        ([], False),
    ],
    ids=["left", "all_left", "one_left", "others_are_answered", "alive", "work_after_the_answers", "nobody"],
)
def test_calls_are_for_the_requests_that_are_not_answered(requests: list[OuterRequest], expected: bool) -> None:
    assert are_abandoned(requests) is expected


def test_calls_are_abandoned_when_their_requests_are() -> None:
    watch, outer = Watch(), Outer()
    one, other, forgotten, over = (Call(is_server_gone=True), Call(), Call(), Call(is_over=True))
    calls: list[Any] = [one, other, forgotten, over]
    for call in calls:
        watch.add(call, [ALIVE if call is other else outer])
    watch.forget(calls[2])
    outer.is_cancelled = True
    assert one.abandoned.wait(60)
    # The thread goes on after a server that was gone.
    late: Any = Call()
    watch.add(late, [LEFT])
    assert late.abandoned.wait(60)
    assert not any(call.abandoned.is_set() for call in (other, forgotten, over))


def test_the_thread_that_looks_wakes_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.engine.backends.python_model.outer_requests._LOOKS_IN_VAIN_MAX", 0)
    watch = Watch()
    for _ in range(3):
        call: Any = Call()
        watch.add(call, [LEFT])
        assert call.abandoned.wait(60)
        while watch._is_looking.is_set():
            threading.Event().wait(0.005)
