"""Unary calls in rows of a known plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from engine_scene import Surroundings, play, turn

from forebay.frontend.grpc.infer_call import InferCall
from forebay.frontend.grpc.status import Status
from forebay.ipc.errors import Code
from forebay.ipc.wire import Kind


class RowsCall(InferCall):
    """A call whose message has been placed; remembers how it ended."""

    def __init__(self, scene: Surroundings) -> None:
        self.ends: list[Status] = []
        frontend: Any = SimpleNamespace(loop=mock.Mock(), reply_encoding=lambda _head: "identity")
        head: Any = SimpleNamespace(timeout_ns=1)
        super().__init__(frontend, mock.Mock(), 1, head)
        plan: Any = SimpleNamespace(route=scene.route, rows=1)
        self._plan = plan
        self._slab, self._first = slab, first = scene.route.loan(1)
        scene.route.publish(slab, first, 1, self)

    def finish(self, status: Status = Status.OK, text: str = "") -> None:
        self.ends.append(status)
        self.is_local_closed = True

    def let_deadline_pass(self) -> None:
        self._deadline_passed()


def test_deadline_of_a_request_that_was_not_sent_yet_is_told_as_such() -> None:
    """G-089: not as the cancellation that it causes."""

    async def scenario(s: Surroundings) -> None:
        call = RowsCall(s)
        call.let_deadline_pass()
        assert call.ends == [Status.DEADLINE_EXCEEDED]
        assert s.engine.in_flight_count == 0

    play(scenario)


def test_what_the_scheduler_dropped_at_the_deadline_is_told_as_such() -> None:
    """G-089: its timer may be the first to go off."""

    async def scenario(s: Surroundings) -> None:
        call = RowsCall(s)
        await turn()
        await s.tell_runs(Kind.RUNS_FAILED, (0, 1), error=bytes((Code.CANCELLED,)) + b"its deadline passed")
        assert call.ends == [Status.DEADLINE_EXCEEDED]

    play(scenario)


def test_failure_of_the_model_is_told() -> None:
    async def scenario(s: Surroundings) -> None:
        call = RowsCall(s)
        await turn()
        await s.tell_runs(Kind.RUNS_FAILED, (0, 1), error=bytes((Code.UNAVAILABLE,)) + b"no")
        assert call.ends == [Status.UNAVAILABLE]

    play(scenario)
