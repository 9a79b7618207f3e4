"""A frontend's end of the engine, with this test as scheduler and worker: turns, cancellation, losses, restarts."""

from __future__ import annotations

import gc
import socket
import weakref
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from engine_scene import INSTANCE, PRODUCER, ROUTE, Parcel, Surroundings, play, turn

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.inference import Inference, InputTensor, RequestMeta
from forebay.ipc.catalog import Catalog
from forebay.ipc.counters import ProducerCounter
from forebay.ipc.errors import Code
from forebay.ipc.messages import Cancel, GrantReturned, ParcelSubmit, ReplyHead, Submit
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_GONE,
    GRANTED_BATCH,
    HEAD_BYTES_MAX,
    HEADER,
    MESSAGE_BYTES_MAX,
    NO_TIMES,
    PARCEL,
    REPLY,
    TOKEN,
    Kind,
    Run,
    pack_runs,
    unpack_runs,
)

# --- turns


def test_requests_of_one_turn_are_one_run_in_one_message() -> None:
    """I-3."""

    async def scenario(s: Surroundings) -> None:
        for _ in range(3):
            s.publish()
        s.publish(2)
        await turn()
        (message,) = s.take_sent()
        assert isinstance(message, Submit)
        assert [(run.first, run.requests, run.rows_each) for run in message.runs] == [(0, 3, 1), (3, 1, 2)]

    play(scenario)


def test_scheduler_that_does_not_read_is_a_prompt_refusal() -> None:
    """I-6."""

    async def scenario(s: Surroundings) -> None:
        s.sent.is_full = True
        owner, slab, _first = s.publish()
        parcel = s.submit(1)
        await turn()
        assert owner.end == "UNAVAILABLE never ran"
        assert parcel.answers == ["the scheduler does not keep up; try again later."]
        assert slab.live == 0
        assert s.count(ProducerCounter.REJECTED) == 2

    play(scenario)


def test_a_request_that_fits_into_no_message_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hands it over has the error, and cancels."""
    monkeypatch.setattr(RouteClient, "takes_rows", lambda _self, *, is_bare: False)

    async def scenario(s: Surroundings) -> None:
        before = s.engine.used_bytes
        inference = Inference(s.engine, ROUTE, [InputTensor("X", "FP32", (1, 4), 16)], 1)
        with pytest.raises(OverflowError):
            inference.submit(RequestMeta(deadline_ns=2**70), lambda _response: None)
        inference.cancel()
        assert s.engine.used_bytes == before

    play(scenario)


@pytest.mark.parametrize("end", ["failed", "left", "never published"])
def test_memory_of_a_model_that_was_unloaded_is_free_when_its_last_request_has_ended_somehow(end: str) -> None:
    async def scenario(s: Surroundings) -> None:
        before = s.engine.used_bytes
        if end == "never published":
            inference = Inference(s.engine, ROUTE, [InputTensor("X", "FP32", (1, 4), 16)], 1)
        else:
            owner, slab, first = s.publish()
        s.engine.update_catalog(Catalog(generation=2, models=()))
        assert s.engine.used_bytes > before
        if end == "failed":
            await turn()
            await s.tell_runs(Kind.RUNS_FAILED, (first, 1), error=bytes((Code.UNAVAILABLE,)) + b"no")
        elif end == "left":
            s.route.cancel_rows(slab, first, owner)
        else:
            inference.cancel()
        assert s.engine.used_bytes == before

    play(scenario)


def test_ends_are_counted_by_reason() -> None:
    """Spec M-021."""

    async def scenario(s: Surroundings) -> None:
        owners = [s.publish()[0] for _ in range(4)]
        await turn()
        await s.tell_runs(Kind.RUNS_DONE, (0, 1))
        await s.tell_runs(Kind.RUNS_FAILED, (1, 1), error=bytes((Code.INTERNAL,)) + b"x")
        await s.tell_runs(Kind.RUNS_FAILED, (2, 1), instance=0, error=bytes((Code.UNAVAILABLE,)) + b"x")
        await s.tell_runs(Kind.RUNS_FAILED, (3, 1), instance=0, error=bytes((Code.CANCELLED,)) + b"x")
        assert [owner.end for owner in owners] == [
            "done", "INTERNAL ran", "UNAVAILABLE never ran", "CANCELLED never ran",
        ]  # fmt: skip
        names = ("SUCCESS", "FAILED", "FAILED_BACKEND", "REJECTED", "CANCELED", "FAILED_OTHER")
        assert [s.count(ProducerCounter[name]) for name in names] == [1, 3, 1, 1, 1, 0]
        assert s.engine.in_flight_count == 0

    play(scenario)


# --- clients that leave


def test_cancelled_rows_that_were_not_sent_yet_never_are() -> None:
    async def scenario(s: Surroundings) -> None:
        owners = [s.publish() for _ in range(3)]
        owner, slab, first = owners[1]
        s.route.cancel_rows(slab, first, owner)
        await turn()
        (message,) = s.take_sent()
        assert [(run.first, run.requests) for run in message.runs] == [(0, 1), (2, 1)]
        assert [owner.end for owner, _slab, _first in owners] == ["", "CANCELLED never ran", ""]
        assert slab.live == 2

    play(scenario)


def test_cancelled_rows_are_told_to_the_scheduler_after_their_submission() -> None:
    async def scenario(s: Surroundings) -> None:
        owner, slab, first = s.publish()
        parcel_owner = s.submit(9)
        await turn()
        s.route.cancel_rows(slab, first, owner)
        s.engine.cancel(9)
        s.publish()
        await turn()
        submitted, later, cancel = s.take_sent()
        assert isinstance(submitted, Submit)
        assert isinstance(later, Submit)
        assert isinstance(cancel, Cancel)
        assert cancel.tokens == (9,)
        assert [(rows.route, rows.base, rows.firsts) for rows in cancel.rows] == [(ROUTE, slab.base, (first,))]
        assert slab.live == 2
        assert parcel_owner.answers == []

    play(scenario)


def test_rows_that_change_hands_in_the_turn_of_a_cancellation_are_not_cancelled() -> None:
    async def scenario(s: Surroundings) -> None:
        first_owner, slab, first = s.publish()
        await turn()
        s.take_sent()
        s.route.cancel_rows(slab, first, first_owner)
        # What the event loop finds in the same turn: the answer, and a new request.
        run = Run(PRODUCER, 1, slab.base, slab.capacity, first, 1, 0, 5)
        s.bell.send(pack_runs(Kind.RUNS_DONE, 0, INSTANCE, 1, [run], NO_TIMES))
        s.engine._on_completion()  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateUsage]
        second_owner, _slab, again = s.publish()
        assert again == first
        await turn()
        assert first_owner.end == "done"
        assert [type(message) for message in s.take_sent()] == [Submit]
        assert second_owner.end == ""

    play(scenario)


def test_cancelling_what_is_done_does_nothing() -> None:
    async def scenario(s: Surroundings) -> None:
        owner, slab, first = s.publish()
        await turn()
        await s.tell_runs(Kind.RUNS_DONE, (0, 1))
        s.take_sent()
        s.route.cancel_rows(slab, first, owner)
        await turn()
        assert s.take_sent() == []

    play(scenario)


# --- losses


def test_lost_rows_are_tried_again_each_by_itself_and_then_fail() -> None:
    async def scenario(s: Surroundings) -> None:
        owners = [s.publish()[0] for _ in range(2)]
        await turn()
        s.take_sent()
        await s.tell_runs(Kind.RUNS_LOST, (0, 2))
        (message,) = s.take_sent()
        assert [(run.first, run.requests, run.attempt) for run in message.runs] == [(0, 1, 1), (1, 1, 1)]
        await s.tell_runs(Kind.RUNS_LOST, (0, 1), attempt=1, batch=2)
        await s.tell_runs(Kind.RUNS_DONE, (1, 1), batch=3)
        assert [owner.end for owner in owners] == ["INTERNAL ran", "done"]

    play(scenario)


def test_loss_of_a_batch_that_was_answered_does_not_touch_who_has_its_rows_now() -> None:
    """A worker may die when it has told us and not yet the scheduler."""

    async def scenario(s: Surroundings) -> None:
        s.publish()
        await turn()
        await s.tell_runs(Kind.RUNS_DONE, (0, 1), batch=5)
        owner, _slab, first = s.publish()
        assert first == 0
        await turn()
        s.take_sent()
        await s.tell_runs(Kind.RUNS_LOST, (0, 1), batch=5)
        assert s.take_sent() == []
        assert owner.end == ""

    play(scenario)


def test_lost_parcel_is_tried_again_unless_its_client_has_part_of_the_answer() -> None:
    async def scenario(s: Surroundings) -> None:
        fresh, answered = s.submit(1), s.submit(2)
        await turn()
        s.take_sent()
        await s.reply(2, final=False)
        await s.lose_parcel(1)
        await s.lose_parcel(2)
        (message,) = s.take_sent()
        assert [(parcel.token, parcel.attempt) for parcel in message.parcels] == [(1, 1)]
        assert fresh.answers == []
        assert answered.answers == ["ok", "an instance of model 'm' ended unexpectedly before its last response."]

    play(scenario)


# --- crowds


def test_model_is_crowded_as_long_as_many_of_its_requests_arrive_together_now_and_then() -> None:
    async def scenario(s: Surroundings) -> None:
        for _ in range(3):
            for _ in range(8):
                s.publish()
            await turn()
            s.publish()
            await turn()
            s.engine.forget_crowds()
            assert s.engine.crowded_routes == {s.route}
        s.publish()
        await turn()
        s.engine.forget_crowds()
        assert not s.engine.crowded_routes

    play(scenario)


def test_requests_outside_slab_rows_are_a_crowd_too() -> None:
    async def scenario(s: Surroundings) -> None:
        for token in range(8):
            s.submit(token)
        await turn()
        assert s.engine.crowded_routes == {s.route}

    play(scenario)


def test_crowd_of_a_model_that_is_unloaded_keeps_nothing_of_it() -> None:
    """Not even where nobody reviews crowds, as in a gRPC frontend."""

    async def scenario(s: Surroundings) -> None:
        for token in range(8):
            s.submit(token)
        await turn()
        assert s.engine.crowded_routes == {s.route}
        for token in range(8):
            await s.reply(token)
        s.engine.update_catalog(Catalog(generation=2, models=()))
        route = weakref.ref(s.route)
        del s.route
        gc.collect()
        assert route() is None

    play(scenario)


def test_crowd_whose_clients_all_leave_at_once_is_forgotten() -> None:
    async def scenario(s: Surroundings) -> None:
        for _ in range(8):
            s.publish()
        await turn()
        s.engine.forget_crowds()
        assert s.engine.crowded_routes == {s.route}
        s.engine.forget_crowds()
        assert not s.engine.crowded_routes

    play(scenario)


# --- grants


def test_granted_worker_is_rung_at_once_with_a_number_of_its_own_kind() -> None:
    async def scenario(s: Surroundings) -> None:
        worker = await s.grant()
        owner, _slab, _first = s.publish()
        message = worker.recv(MESSAGE_BYTES_MAX)
        assert HEADER.unpack_from(message)[4] & GRANTED_BATCH
        assert [run.rows for run in unpack_runs(memoryview(message), 1, HEADER.size)] == [1]
        await s.revoke()
        assert s.take_sent() == []
        await s.tell_runs(Kind.RUNS_DONE, (0, 1), batch=GRANTED_BATCH | 1)
        assert owner.end == "done"
        assert [type(message) for message in s.take_sent()] == [GrantReturned]

    play(scenario)


def test_next_step_of_an_ensemble_that_begins_while_the_one_before_is_answered_is_no_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(s: Surroundings) -> None:
        crowds: list[str] = []
        monkeypatch.setattr(s.engine.cores, "crowded", lambda: crowds.append("crowded"))
        next_worker: Any = SimpleNamespace(instance=INSTANCE + 1, is_idle=True)
        await s.grant()
        owner, _slab, first = s.publish()
        monkeypatch.setattr(owner, "rows_done", lambda *_: s.engine.cores.begun(next_worker, 1))
        await s.tell_runs(Kind.RUNS_DONE, (first, 1))
        assert crowds == []
        s.publish()
        s.engine.cores.begun(next_worker, 1)
        assert crowds == ["crowded"]

    play(scenario)


def test_scheduler_that_does_not_keep_up_hears_all_the_same_that_a_grant_is_over() -> None:
    async def scenario(s: Surroundings) -> None:
        await s.grant()
        s.sent.is_full = True
        await s.revoke()
        assert s.take_sent() == []
        s.sent.is_full = False
        while not s.sent.messages:
            await turn()
        assert [type(message) for message in s.take_sent()] == [GrantReturned]

    play(scenario)


@pytest.mark.parametrize("generation", [1, 77])
def test_dead_granted_worker_loses_what_was_rung(generation: int) -> None:
    """Whatever generation the scheduler names: it may be a new one, which knows of no grants."""

    async def scenario(s: Surroundings) -> None:
        await s.grant()
        s.publish()
        await s.revoke(generation, FLAG_GONE)
        (message,) = s.take_sent()
        assert [(run.first, run.attempt) for run in message.runs] == [(0, 1)]

    play(scenario)


def test_head_that_no_doorbell_takes_goes_to_the_scheduler_to_be_refused() -> None:
    async def scenario(s: Surroundings) -> None:
        worker = await s.grant()
        s.route.submit_parcel(ParcelSubmit(ROUTE, 1, 1, 5, b"x" * (HEAD_BYTES_MAX + 1)), Parcel())
        await turn()
        (message,) = s.take_sent()
        assert [parcel.token for parcel in message.parcels] == [1]
        with pytest.raises(BlockingIOError):
            worker.recv(MESSAGE_BYTES_MAX)

    play(scenario)


def received_tokens(worker: socket.socket) -> list[int]:
    """Return the parcels of the batch that the worker was rung for."""
    message = worker.recv(MESSAGE_BYTES_MAX)
    kind, _flags, count, _producer, batch = HEADER.unpack_from(message)
    assert (kind, bool(batch & GRANTED_BATCH)) == (Kind.PARCELS, True)
    tokens, offset = [], HEADER.size
    for _ in range(count):
        _producer, _rows, token, _enqueue_ns, head_bytes = PARCEL.unpack_from(message, offset)
        tokens.append(token)
        offset += PARCEL.size + head_bytes
    return tokens


def test_parcels_of_one_turn_are_one_granted_batch_and_those_behind_wait_for_it() -> None:
    """I-3; as the scheduler would do with them."""

    async def scenario(s: Surroundings) -> None:
        worker = await s.grant()
        first, second = s.submit(1), s.submit(2)
        await turn()
        assert received_tokens(worker) == [1, 2]
        s.submit(3)
        s.submit(4)
        await turn()
        await s.reply(1)
        with pytest.raises(BlockingIOError):
            worker.recv(MESSAGE_BYTES_MAX)
        await s.reply(2)
        assert received_tokens(worker) == [3, 4]
        assert s.take_sent() == []
        assert first.answers == second.answers == ["ok."]

    play(scenario)


def test_answers_of_one_execution_come_in_one_message() -> None:
    """I-3."""

    async def scenario(s: Surroundings) -> None:
        owners = [s.submit(token) for token in (1, 2, 3)]
        await turn()
        heads = [msgspec.msgpack.encode(ReplyHead(code=4 if text else 0, text=text)) for text in ("", "no", "")]
        packed = [REPLY.pack(token, FLAG_FINAL, len(head)) + head for token, head in zip((1, 2, 3), heads, strict=True)]
        await s.tell(HEADER.pack(Kind.PARCEL_REPLIES, 0, 3, INSTANCE, 0) + NO_TIMES + b"".join(packed))
        assert [owner.answers for owner in owners] == [["ok."], ["no."], ["ok."]]
        assert s.engine.in_flight_count == 0

    play(scenario)


def test_parcels_that_are_no_single_batch_go_to_the_scheduler() -> None:
    async def scenario(s: Surroundings) -> None:
        await s.grant()
        s.submit(1, shape_key=1)
        s.submit(2, shape_key=2)
        await turn()
        for token in range(3, 12):
            s.submit(token)
        await turn()
        assert [len(message.parcels) for message in s.take_sent()] == [2, 9]

    play(scenario)


def test_parcels_of_a_model_that_sees_requests_do_not_wait_for_its_late_answers() -> None:
    async def scenario(s: Surroundings) -> None:
        s.route.update(msgspec.structs.replace(s.route.entry, sees_requests=True))
        worker = await s.grant()
        s.submit(1)
        await turn()
        assert received_tokens(worker) == [1]
        s.submit(2)
        await turn()
        (message,) = s.take_sent()
        assert [parcel.token for parcel in message.parcels] == [2]

    play(scenario)


def test_client_that_leaves_takes_back_a_held_parcel_and_tells_the_worker_of_a_running_one() -> None:
    async def scenario(s: Surroundings) -> None:
        worker = await s.grant()
        running = s.submit(1)
        await turn()
        assert received_tokens(worker) == [1]
        held = s.submit(2)
        await turn()
        s.engine.cancel(2)
        assert held.answers == ["request was cancelled."]
        s.engine.cancel(1)
        await turn()
        message = worker.recv(MESSAGE_BYTES_MAX)
        assert (message[0], TOKEN.unpack_from(message, HEADER.size)) == (Kind.CANCEL, (1,))
        await s.reply(1, text="cancelled")
        assert running.answers == ["cancelled."]
        with pytest.raises(BlockingIOError):
            worker.recv(MESSAGE_BYTES_MAX)

    play(scenario)


def test_late_revoke_of_an_earlier_grant_is_ignored() -> None:
    async def scenario(s: Surroundings) -> None:
        await s.grant(generation=2)
        await s.revoke(generation=1)
        assert s.take_sent() == []
        assert len(s.route.grants) == 1

    play(scenario)


# --- a restarted scheduler


def test_what_is_not_answered_is_handed_in_again_to_a_new_scheduler() -> None:
    async def scenario(s: Surroundings) -> None:
        s.publish()
        s.publish(2)
        s.submit(5)
        await turn()
        await s.tell_runs(Kind.RUNS_DONE, (0, 1))
        s.take_sent()
        await s.resync()
        (message,) = s.take_sent()
        assert message.epoch == 2
        assert [(run.first, run.requests, run.rows_each) for run in message.runs] == [(1, 1, 2)]
        assert [parcel.token for parcel in message.parcels] == [5]
        await s.resync()
        assert s.take_sent() == [], "the second call of the same scheduler would run everything twice"

    play(scenario)


def test_new_scheduler_gets_what_was_about_to_be_sent_once_even_if_its_model_was_just_unloaded() -> None:
    async def scenario(s: Surroundings) -> None:
        s.publish()
        s.submit(5)
        s.engine.update_catalog(Catalog(generation=2, models=()))
        s.bell.send(HEADER.pack(Kind.RESYNC, 0, 0, 0, 2))
        s.engine._on_completion()
        await turn()
        (message,) = s.take_sent()
        assert [(run.first, run.requests) for run in message.runs] == [(0, 1)]
        assert [parcel.token for parcel in message.parcels] == [5]

    play(scenario)


def test_what_was_rung_under_a_grant_is_not_handed_in_again_but_lost_with_its_worker() -> None:
    async def scenario(s: Surroundings) -> None:
        await s.grant()
        owner, _slab, _first = s.publish()
        await s.resync()
        assert s.take_sent() == []
        assert s.route.grants == []
        await s.revoke(99, FLAG_GONE)
        (message,) = s.take_sent()
        assert [(run.first, run.attempt) for run in message.runs] == [(0, 1)]
        assert owner.end == ""

    play(scenario)


def test_parcel_that_a_model_still_answers_is_not_handed_in_again() -> None:
    async def scenario(s: Surroundings) -> None:
        owners = [s.submit(token) for token in (1, 2, 3)]
        await turn()
        await s.reply(1, final=False)
        await s.reply(3, final=False)
        s.take_sent()
        await s.resync(2, 1)
        (message,) = s.take_sent()
        assert [parcel.token for parcel in message.parcels] == [2]
        assert [len(owner.answers) for owner in owners] == [1, 0, 2], "part of an answer cannot be given twice"

    play(scenario)


def test_last_held_request_may_be_cancelled() -> None:
    """With all instances granted and busy, what comes waits here."""

    async def scenario(s: Surroundings) -> None:
        worker = await s.grant()
        s.publish()
        owner, slab, first = s.publish()
        await turn()
        assert s.route.is_holding
        s.route.cancel_rows(slab, first, owner)
        assert owner.end == "CANCELLED never ran"
        worker.recv(MESSAGE_BYTES_MAX)
        await s.tell_runs(Kind.RUNS_DONE, (0, 1), batch=GRANTED_BATCH | 1)
        with pytest.raises(BlockingIOError):
            worker.recv(MESSAGE_BYTES_MAX)

    play(scenario)


# --- order


def test_answers_keep_the_order_of_their_requests() -> None:
    """Spec S-024."""

    async def scenario(s: Surroundings) -> None:
        owners = [s.submit(token) for token in (1, 2, 3)]
        await turn()
        await s.reply(2)
        await s.reply(3, text="no")
        assert [owner.answers for owner in owners] == [[], [], []]
        await s.lose_parcel(1)
        await s.reply(1)
        assert [owner.answers for owner in owners] == [["ok."], ["ok."], ["no."]]

    play(scenario, ordered=True)


def test_ensembles_in_flight_are_counted_while_their_model_goes_and_comes_back() -> None:
    async def scenario(s: Surroundings) -> None:
        before = s.route
        before.count_ensemble_use(+1)
        s.engine.update_catalog(Catalog(generation=2, models=()))
        s.engine.update_catalog(Catalog(generation=3, models=(before.entry,)))
        after = s.engine.routes[ROUTE]
        assert after is not before
        assert s.count(ProducerCounter.ENSEMBLE_USES) == 1
        after.count_ensemble_use(+1)
        before.count_ensemble_use(-1)
        after.count_ensemble_use(-1)
        assert s.count(ProducerCounter.ENSEMBLE_USES) == 0

    play(scenario)
