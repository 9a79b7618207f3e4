"""The sequence batcher (spec 6.3, appendix C), through the core: ids, slots, backlog, idleness, losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scheduler_harness import MS, ROUTE, Answer, SchedulerHarness

from forebay.ipc.errors import Code
from forebay.ipc.messages import Cancel
from forebay.ipc.scheduler_messages import BatchingPolicy, Drained, InstanceDrain, ProducerDown
from forebay.ipc.wire import FLAG_RESCHEDULE, SLOT_END, SLOT_START

IDLE_MS = 1000


class SequenceModel(SchedulerHarness):
    """A sequence model with instances 1..n. Requests are written ``("s7", 1)``: S start, E end, id 7, token 1."""

    def __init__(
        self, strategy: dict[str, Any] | None = None, *, max_batch: int = 2, instances: int = 1, **f: Any
    ) -> None:
        super().__init__()
        policy = {"strategy": {"type": "direct", **(strategy or {})}, "max_sequence_idle_us": IDLE_MS * 1000, **f}
        self.add_route(BatchingPolicy(max_batch_size=max_batch), extra={"sequence": policy})
        for instance in range(1, instances + 1):
            self.add_instance(instance)
        self.add_producer()

    def ask(self, token: int, correlation_id: int | str, flags: str = "", **fields: Any) -> None:
        self.submit_parcels(
            token, correlation_id=correlation_id, sequence_start="S" in flags, sequence_end="E" in flags, **fields
        )

    def refusal(self) -> Answer:
        (answer,) = self.answers()
        return answer


@pytest.fixture
def direct() -> Iterator[SequenceModel]:
    """Two slots of one instance."""
    model = SequenceModel()
    yield model
    model.close()


@pytest.fixture
def oldest() -> Iterator[SequenceModel]:
    """Batches of up to two out of three candidate sequences."""
    model = SequenceModel({"type": "oldest", "max_candidate_sequences": 3})
    yield model
    model.close()


# --- what is refused


def test_correlation_id_is_required(direct: SequenceModel) -> None:
    """Spec S-050."""
    for nothing in (0, ""):
        direct.ask(1, nothing, "S")
        answer = direct.refusal()
        assert answer.code == Code.INVALID_ARG
        assert answer.text == (
            "inference request to model 'model3' must specify a non-zero or non-empty correlation ID"
        )


def test_batch_1_only(direct: SequenceModel) -> None:
    """Spec S-051."""
    direct.ask(1, 7, "S", rows=2)
    assert direct.refusal().text == (
        "inference request to model 'model3' must specify batch-size 1 due to requirements of sequence batcher"
    )


def test_first_request_must_start(direct: SequenceModel) -> None:
    """Spec S-052."""
    direct.ask(1, 7)
    answer = direct.refusal()
    assert answer.code == Code.INVALID_ARG
    assert answer.text == (
        "inference request for sequence 7 to model 'model3' must specify the START flag on the first request of the "
        "sequence"
    )


def test_string_ids_have_a_limit(direct: SequenceModel) -> None:
    """Spec S-059."""
    direct.ask(1, "x" * 128, "S")
    assert direct.batch().tokens == [1]
    direct.ask(2, "x" * 129, "S")
    assert direct.refusal().text == "string correlation ID cannot be longer than 128 characters"


# --- slots


def test_sequences_keep_their_slots(direct: SequenceModel) -> None:
    """Spec S-053, S-054, S-064: the lowest slot first."""
    direct.ask(1, 7, "S")
    batch = direct.batch()
    assert batch.slots == [(0, SLOT_START, 0)]
    direct.ask(2, "b", "S")
    direct.ask(3, 7)
    direct.finish(batch)
    batch = direct.batch()
    assert sorted(zip(batch.tokens, batch.slots, strict=True)) == [(2, (1, SLOT_START, 0)), (3, (0, 0, 0))]
    direct.ask(4, "b", "E")
    direct.finish(batch)
    assert direct.batch().slots == [(1, SLOT_END, 0)]


def test_slots_are_balanced_over_instances() -> None:
    """Spec S-054."""
    model = SequenceModel(instances=2)
    for number in (1, 2, 3, 4):
        model.ask(number, number, "S")
    given = {instance: model.batches(instance)[0] for instance in (1, 2)}
    assert [given[instance].slots[0].slot for instance in (1, 2)] == [0, 0]
    for instance in (1, 2):
        model.finish(given[instance], instance)
        assert model.batch(instance).slots[0].slot == 1
    model.close()


def test_an_instance_runs_one_batch_at_a_time(direct: SequenceModel) -> None:
    """Spec S-066."""
    direct.ask(1, 7, "S")
    direct.ask(2, 7)
    batch = direct.batch()
    assert batch.tokens == [1]
    direct.finish(batch)
    assert direct.batch().tokens == [2]


def test_third_sequence_waits_whole_for_an_end(direct: SequenceModel) -> None:
    """Spec S-055: direct frees the slot as soon as END is taken for execution."""
    direct.ask(1, 1, "S")
    batch = direct.batch()
    direct.ask(2, 2, "S")
    direct.ask(3, 3, "S")
    direct.ask(4, 3)
    direct.ask(5, 1, "E")
    direct.finish(batch)
    batch = direct.batch()
    assert sorted(batch.tokens) == [2, 5]
    direct.finish(batch)
    batch = direct.batch()
    assert (batch.tokens, batch.slots) == ([3], [(0, SLOT_START, 0)])
    direct.finish(batch)
    assert direct.batch().tokens == [4]


def test_sequence_of_one_request_leaves_at_once(direct: SequenceModel) -> None:
    """Spec S-058."""
    for token in (1, 2, 3):
        direct.ask(token, token, "SE")
    batch = direct.batch()
    assert batch.slots == [(0, SLOT_START | SLOT_END, 0)]
    direct.finish(batch)
    direct.finish(direct.batch())
    direct.ask(4, 1)
    assert direct.refusal().code == Code.INVALID_ARG


def test_start_again_keeps_the_slot(direct: SequenceModel) -> None:
    """Spec S-056."""
    direct.ask(1, 1, "S")
    direct.finish(direct.batch())
    direct.ask(2, 1, "S")
    assert direct.batch().slots == [(0, SLOT_START, 0)]


def test_a_sequence_that_begins_twice_is_warned_of(direct: SequenceModel, capfd: pytest.CaptureFixture[str]) -> None:
    """Spec S-056, in Triton's words; a client that does it all the time does not fill the log."""
    direct.ask(1, "a", "S")
    assert capfd.readouterr().err == ""
    for token in (2, 3, 4):
        direct.ask(token, "a", "S")
    warning = (
        "sequence a for model 'model3' has a conflict. The previous sequence did not end before this sequence start. "
        "Previous sequence will be terminated early."
    )
    assert capfd.readouterr().err.count(warning) == 1
    direct.advance(1_000 * MS)
    direct.ask(5, "a", "S")
    assert capfd.readouterr().err.count(warning) == 1


def test_id_can_be_used_again_before_its_end_has_run(direct: SequenceModel) -> None:
    direct.ask(1, 1, "S")
    batch = direct.batch()
    direct.ask(2, 1, "E")
    direct.ask(3, 1, "SE")
    direct.finish(batch)
    batch = direct.batch()
    assert sorted(zip(batch.tokens, batch.slots, strict=True)) == [(2, (0, 2, 0)), (3, (1, 3, 0))]


# --- direct


def test_slots_of_another_shape_wait_for_the_next_execution(direct: SequenceModel) -> None:
    """Spec S-070."""
    direct.ask(1, 1, "S")
    batch = direct.batch()
    direct.ask(2, 1, shape_key=5)
    direct.advance(MS)
    direct.ask(3, 2, "S", shape_key=6)
    direct.finish(batch)
    batch = direct.batch()
    assert batch.tokens == [2]
    direct.finish(batch)
    assert direct.batch().tokens == [3]


def test_direct_waits_until_enough_slots_have_a_request() -> None:
    """Spec S-065."""
    model = SequenceModel({"minimum_slot_utilization": 1.0, "max_queue_delay_us": 100_000})
    model.ask(1, 1, "S")
    assert model.batches() == []
    model.ask(2, 2, "S")
    batch = model.batch()
    assert batch.tokens == [1, 2]
    model.finish(batch)
    model.ask(3, 1)
    assert model.alarm_ns == model.now_ns + 100 * MS
    model.advance(100 * MS)
    assert model.batch().tokens == [3]
    model.close()


# --- oldest


def test_oldest_batches_one_request_of_each_sequence(oldest: SequenceModel) -> None:
    """Spec S-067."""
    oldest.ask(1, 1, "S")
    batch = oldest.batch()
    for token, correlation_id, flags in ((2, 2, "S"), (3, 2, ""), (4, 3, "S"), (5, 1, "")):
        oldest.advance(MS)
        oldest.ask(token, correlation_id, flags)
    oldest.finish(batch)
    batch = oldest.batch()
    assert batch.tokens == [2, 4]
    oldest.finish(batch)
    assert oldest.batch().tokens == [3, 5]


def test_oldest_frees_the_slot_when_end_is_answered(oldest: SequenceModel) -> None:
    """Appendix C."""
    for number in (1, 2, 3):
        oldest.ask(number, number, "S")
    batch = oldest.batch()
    oldest.finish(batch)
    oldest.finish(oldest.batch())
    oldest.ask(4, 1, "E")
    batch = oldest.batch()
    oldest.ask(5, 4, "S")
    assert oldest.batches() == []
    oldest.finish(batch)
    assert oldest.batch().tokens == [5]


def test_oldest_has_one_request_of_a_sequence_under_way(oldest: SequenceModel) -> None:
    """Also if a decoupled model answers after its batch."""
    oldest.ask(1, 1, "S")
    oldest.ask(2, 1)
    oldest.finish(oldest.batch(), left_open=[(7, 1)])
    assert oldest.batches() == []
    oldest.close_request(1)
    assert oldest.batch().tokens == [2]


def test_oldest_waits_for_a_preferred_size() -> None:
    """Spec S-067."""
    model = SequenceModel(
        {"type": "oldest", "max_candidate_sequences": 3, "preferred_batch_sizes": [2], "max_queue_delay_us": 50_000}
    )
    model.ask(1, 1, "S")
    assert model.batches() == []
    model.advance(50 * MS)
    batch = model.batch()
    model.finish(batch)
    model.ask(2, 1)
    model.ask(3, 2, "S")
    assert model.batch().tokens == [2, 3]
    model.close()


# --- the end of sequences


def test_idle_sequence_gives_its_slot_away(direct: SequenceModel) -> None:
    """Spec S-057."""
    direct.ask(1, 1, "S")
    direct.finish(direct.batch())
    direct.advance((IDLE_MS - 1) * MS)
    direct.ask(2, 1)
    direct.finish(direct.batch())
    direct.advance(IDLE_MS * MS)
    direct.ask(3, 1)
    assert direct.refusal().code == Code.INVALID_ARG


def test_sequence_whose_request_runs_is_not_idle(direct: SequenceModel) -> None:
    direct.ask(1, 1, "S")
    batch = direct.batch()
    direct.advance(5 * IDLE_MS * MS)
    direct.ask(2, 1)
    direct.finish(batch)
    assert direct.batch().tokens == [2]


def test_backlog_has_a_timeout(direct: SequenceModel) -> None:
    """Spec S-068: only there, and for the whole sequence."""
    direct.ask(1, 1, "S", timeout_us=10_000)
    direct.ask(2, 2, "S", timeout_us=10_000)
    direct.ask(3, 3, "S", timeout_us=10_000)
    direct.ask(4, 3)
    direct.advance(10 * MS)
    answers = direct.answers()
    assert [answer.tokens for answer in answers] == [[3], [4]]
    assert {(answer.code, answer.text) for answer in answers} == {
        (Code.UNAVAILABLE, "timeout of the corresponding sequence has been expired")
    }


def test_cancelled_request_ends_its_sequence(direct: SequenceModel) -> None:
    """Spec S-069."""
    direct.ask(1, 1, "S")
    batch = direct.batch()
    direct.ask(2, 1)
    direct.ask(3, 1)
    direct.accept(Cancel(producer=7, tokens=(2,)))
    assert [(answer.tokens, answer.code) for answer in direct.answers()] == [
        ([2], Code.CANCELLED),
        ([3], Code.CANCELLED),
    ]
    direct.finish(batch)
    direct.ask(4, 1)
    assert direct.refusal().code == Code.INVALID_ARG
    direct.ask(5, 9, "S")
    assert direct.batch().slots[0].slot == 0


def test_dead_producer_ends_its_sequences(direct: SequenceModel) -> None:
    direct.add_producer(8)
    direct.ask(1, 1, "S")
    direct.ask(2, 1, producer=8)
    direct.ask(3, 1)
    direct.handle(ProducerDown(producer=8))
    assert direct.refusal().tokens == [3]


def test_lost_worker_ends_its_sequences_with_a_clear_error() -> None:
    """Issue: a lost worker ends its sequences with a clear error on their next request."""
    model = SequenceModel(instances=2, max_batch=1)
    for number in (1, 2, 3):
        model.ask(number, number, "S")
    assert (model.batch(1).tokens, model.batch(2).tokens) == ([1], [2])
    model.ask(4, 1)
    model.kill_instance(1)
    answers = {answer.tokens[0]: answer for answer in model.answers() if answer.tokens}
    assert set(answers) == {1, 4}
    assert "exited unexpectedly" in answers[1].text
    model.ask(5, 1)
    answer = model.refusal()
    assert (answer.code, answer.text) == (
        Code.UNAVAILABLE,
        "sequence 1 to model 'model3' has ended because the model instance that held it exited unexpectedly; start the "
        "sequence again",
    )
    model.add_instance(3)
    assert model.batch(3).tokens == [3]
    model.ask(6, 1, "S")
    assert model.answers() == []
    model.close()


# --- iterative sequences


def test_iterative_requests_get_an_id_and_come_again_until_done() -> None:
    """Spec S-060."""
    model = SequenceModel({"type": "oldest", "max_candidate_sequences": 2}, iterative_sequence=True)
    model.ask(1, 0)
    batch = model.batch()
    ((slot, flags, assigned_id),) = batch.slots
    assert (slot, flags) == (0, SLOT_START)
    assert assigned_id
    model.ask(2, 0)
    model.finish(batch, left_open=[(7, 1)], flags=FLAG_RESCHEDULE)
    batch = model.batch()
    again = dict(zip(batch.tokens, batch.slots, strict=True))
    assert again[1] == (0, 0, assigned_id)
    assert again[2].flags == SLOT_START
    model.finish(batch)
    model.ask(3, 0)
    assert model.batch().slots[0].slot == 0
    model.close()


def test_an_instance_that_is_to_go_finishes_its_sequences_and_gets_no_others() -> None:
    """Spec S-072."""
    model = SequenceModel(max_batch=1, instances=2)
    model.ask(1, 7, "S")
    model.finish(model.batch())
    model.handle(InstanceDrain(instance=1))
    assert model.told == []
    # A sequence that begins now goes to the other instance, and a further one waits.
    model.ask(2, 8, "S")
    model.finish(model.batch(2), 2)
    model.ask(3, 9, "SE")
    assert model.batches(1) == []
    model.ask(4, 7)
    model.finish(model.batch())
    assert model.told == []
    model.ask(5, 7, "E")
    model.finish(model.batch())
    assert Drained(instance=1) in model.told
    assert model.batches(1) == []
    model.close()


def test_an_instance_that_is_to_go_does_not_wait_for_a_sequence_that_is_idle_for_too_long() -> None:
    """Spec S-057, S-072."""
    model = SequenceModel(max_batch=1)
    model.ask(1, 7, "S")
    model.finish(model.batch())
    model.handle(InstanceDrain(instance=1))
    assert model.told == []
    model.advance(IDLE_MS * MS)
    assert Drained(instance=1) in model.told
    model.close()


def test_route_with_sequences_is_drained_when_nothing_of_them_is_under_way(direct: SequenceModel) -> None:
    direct.ask(1, 1, "S")
    route = direct.core.route_of(ROUTE)
    assert route is not None
    assert not route.is_quiescent
    direct.finish(direct.batch())
    assert route.is_quiescent
