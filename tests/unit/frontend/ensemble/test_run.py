"""How a request runs through an ensemble's graph: order, pruning, decoupling, errors, and who frees what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_engine import FakeEngine, FakeRoute, spec, words

from forebay.frontend.ensemble.inference import EnsembleInference
from forebay.frontend.inference import InputTensor, RequestMeta, Response
from forebay.frontend.response_cache import ResponseCache
from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.counters import CACHE_WORDS, InstanceCounter, ProducerCounter
from forebay.ipc.errors import ArenaFull, Code, Unavailable
from forebay.ipc.messages import InlineTensor, ReplyHead

Arrays = Mapping[str, npt.NDArray[np.float32]]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """Whatever a test does, nothing stays allocated once every request has been answered."""
    engine = FakeEngine()
    yield engine
    while engine.pending:
        engine.reply(0, ReplyHead(code=int(Code.CANCELLED), text="cancelled"), final=True)
    assert engine.blocks.used_bytes == 0
    for route in engine.routes.values():
        assert route.block_bytes == 0
        assert route.counters[ProducerCounter.ENSEMBLE_USES] == 0


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> EnsembleStep:
    return EnsembleStep(model, -1, inputs, outputs)


def ensemble(
    engine: FakeEngine, inputs: tuple[str, ...], outputs: tuple[str, ...], *steps: EnsembleStep, **options: Any
) -> FakeRoute:
    return engine.add(
        options.pop("name", "ens"),
        tuple(spec(name, optional=name in options.get("optional", ())) for name in inputs),
        tuple(spec(name) for name in outputs),
        steps=steps,
        is_ensemble=True,
        **{key: value for key, value in options.items() if key != "optional"},
    )


def plus_one(inputs: Arrays) -> Arrays:
    return {"Y": inputs["X"] + 1}


def add_plus_one(engine: FakeEngine, name: str = "plus_one") -> FakeRoute:
    return engine.add(name, (spec("X"),), (spec("Y"),), plus_one)


class Asked:
    """A request and what came back."""

    def __init__(self, route: FakeRoute, inputs: Arrays, **meta: Any) -> None:
        tensors = [InputTensor(name, "FP32", array.shape, array.nbytes) for name, array in inputs.items()]
        self.inference = EnsembleInference(route.client, tensors, 0)
        for place, array in zip(self.inference.places, inputs.values(), strict=True):
            place[:] = array.tobytes()
        self.responses: list[Response] = []
        self.outputs: list[dict[str, list[float]]] = []
        self.inference.submit(RequestMeta(**meta), self._take)

    def _take(self, response: Response) -> None:
        self.responses.append(response)
        self.outputs.append({view.name: np.frombuffer(view.data, np.float32).tolist() for view in response.outputs})

    @property
    def error(self) -> str:
        (response,) = self.responses
        assert response.error is not None
        return f"{response.error.code.name} {response.error.text}"


def row(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def test_a_step_starts_when_all_its_inputs_are_there(engine: FakeEngine) -> None:
    """S-100: by tensors, not by the listed order; independent steps run at the same time."""
    add_plus_one(engine, "left")
    add_plus_one(engine, "right")
    engine.add("join", (spec("A"), spec("B")), (spec("S"),), lambda given: {"S": given["A"] + given["B"]})
    route = ensemble(
        engine,
        ("x",),
        ("s",),
        step("join", {"A": "l", "B": "r"}, {"S": "s"}),
        step("right", {"X": "x"}, {"Y": "r"}),
        step("left", {"X": "x"}, {"Y": "l"}),
    )
    asked = Asked(route, {"x": row(1, 2)})
    assert sorted(engine.waiting) == ["left", "right"]
    engine.step("right")
    assert engine.waiting == ["left"]
    engine.step()
    assert engine.waiting == ["join"]
    engine.step()
    assert asked.outputs == [{"s": [4.0, 6.0]}]


def test_a_step_reads_where_the_one_before_has_written(engine: FakeEngine) -> None:
    """L-030: the same place in the same arena; nothing is copied."""
    route_a, route_b = add_plus_one(engine, "a"), add_plus_one(engine, "b")
    route = ensemble(engine, ("x",), ("z",), step("a", {"X": "x"}, {"Y": "y"}), step("b", {"X": "y"}, {"Y": "z"}))
    asked = Asked(route, {"x": row(1)})
    engine.run_all()
    assert asked.outputs == [{"z": [3.0]}]
    assert route_b.heads[0].inputs[0].offset == route_a.heads[0].reply_offset
    assert route.copied_in_bytes == route_a.copied_in_bytes == route_b.copied_in_bytes == 0


def test_an_output_inside_the_message_is_placed_for_the_next_step(engine: FakeEngine) -> None:
    add_plus_one(engine, "a")
    add_plus_one(engine, "b")
    route = ensemble(engine, ("x",), ("z",), step("a", {"X": "x"}, {"Y": "y"}), step("b", {"X": "y"}, {"Y": "z"}))
    asked = Asked(route, {"x": row(1)})
    engine.reply(0, ReplyHead(inline=(InlineTensor("Y", "FP32", (1,), row(9).tobytes()),)), final=True)
    assert route.copied_in_bytes == 4
    engine.run_all()
    assert asked.outputs == [{"z": [10.0]}]


def test_only_what_was_asked_for_runs(engine: FakeEngine) -> None:
    """S-105: neither the step behind another output nor that output of a shared step."""
    both = engine.add("both", (spec("X"),), (spec("P"), spec("Q")), lambda given: {"P": given["X"], "Q": given["X"]})
    add_plus_one(engine)
    route = ensemble(
        engine,
        ("x",),
        ("p", "y"),
        step("both", {"X": "x"}, {"P": "p", "Q": "q"}),
        step("plus_one", {"X": "q"}, {"Y": "y"}),
    )
    asked = Asked(route, {"x": row(1)}, outputs=("p",))
    engine.run_all()
    assert asked.outputs == [{"p": [1.0]}]
    assert both.heads[0].outputs == ("P",)


def test_the_first_failing_step_ends_the_request(engine: FakeEngine) -> None:
    """S-107: its code and text with a prefix; other steps are cancelled, their results ignored."""

    def fail(_inputs: Arrays) -> Arrays:
        raise Unavailable("not today")

    engine.add("bad", (spec("X"),), (spec("Y"),), fail)
    add_plus_one(engine, "slow")
    route = ensemble(
        engine, ("x",), ("a", "b"), step("bad", {"X": "x"}, {"Y": "a"}), step("slow", {"X": "x"}, {"Y": "b"})
    )
    asked = Asked(route, {"x": row(1)})
    engine.step("bad")
    assert asked.error == "UNAVAILABLE in ensemble 'ens', not today"
    assert engine.cancelled == {2}
    engine.step("slow")
    assert len(asked.responses) == 1
    assert route.counters[ProducerCounter.FAILED] == 1


def test_a_step_that_is_not_loaded_fails_the_request(engine: FakeEngine) -> None:
    route = ensemble(engine, ("x",), ("y",), step("gone", {"X": "x"}, {"Y": "y"}))
    assert "in ensemble 'ens', Request for unknown model: 'gone'" in Asked(route, {"x": row(1)}).error


def test_inputs_that_do_not_fit_a_step_fail_the_request(engine: FakeEngine) -> None:
    engine.add("three", (spec("X", (3,)),), (spec("Y"),), plus_one)
    route = ensemble(engine, ("x",), ("y",), step("three", {"X": "x"}, {"Y": "y"}))
    error = Asked(route, {"x": row(1)}, id="i").error
    assert error.startswith("INVALID_ARG in ensemble 'ens', [request id: i] unexpected shape for input 'X'")


def test_a_full_arena_fails_the_request(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_plus_one(engine)
    route = ensemble(engine, ("x",), ("y",), step("plus_one", {"X": "x"}, {"Y": "y"}))
    tensors = [InputTensor("x", "FP32", (1,), 4)]
    inference = EnsembleInference(route.client, tensors, 0)

    def full(_byte_size: int) -> int:
        raise ArenaFull("no room")

    monkeypatch.setattr(engine, "allocate", full)
    found: list[Response] = []
    inference.submit(RequestMeta(), found.append)
    assert found[0].error is not None
    assert found[0].error.text == "in ensemble 'ens', no room"


def test_an_optional_input_is_passed_through_or_deadlocks(engine: FakeEngine) -> None:
    """S-115, S-116."""
    engine.add(
        "takes_one", (spec("X"), spec("O", optional=True)), (spec("Y"),), lambda given: {"Y": given["X"] * len(given)}
    )
    route = ensemble(
        engine, ("x", "o"), ("y",), step("takes_one", {"X": "x", "O": "o"}, {"Y": "y"}), optional=("x", "o")
    )
    asked = Asked(route, {"x": row(3)})
    engine.run_all()
    assert asked.outputs == [{"y": [3.0]}]
    assert Asked(route, {"o": row(3)}, id="7").error == (
        "INVALID_ARG in ensemble 'ens', [request id: 7] unexpected deadlock, at least one output is not set while no "
        "more ensemble steps can be made"
    )


def test_a_step_that_leaves_out_an_output_is_a_deadlock(engine: FakeEngine) -> None:
    """S-116."""
    engine.add("silent", (spec("X"),), (spec("Y"),), lambda _given: {})
    route = ensemble(engine, ("x",), ("y",), step("silent", {"X": "x"}, {"Y": "y"}))
    asked = Asked(route, {"x": row(1)})
    engine.run_all()
    assert "unexpected deadlock" in asked.error


def test_a_request_goes_on_to_every_step(engine: FakeEngine) -> None:
    """S-106; S-111: a step's response parameters of these names hold for the steps behind it."""
    first, second = add_plus_one(engine, "a"), add_plus_one(engine, "b")
    route = ensemble(engine, ("x",), ("z",), step("a", {"X": "x"}, {"Y": "y"}), step("b", {"X": "y"}, {"Y": "z"}))
    asked = Asked(
        route, {"x": row(1)}, id="me", parameters={"p": 1}, sequence_id=5, sequence_start=True, priority=2, timeout_us=9
    )
    reply = engine.place(0, {"Y": row(2)})
    engine.reply(0, ReplyHead(outputs=reply.outputs, parameters={"sequence_id": 6, "sequence_end": True}), final=True)
    engine.run_all()
    for head in (first.heads[0], second.heads[0]):
        assert (head.id, head.parameters, head.priority, head.timeout_us) == ("me", {"p": 1}, 2, 9)
    assert (first.heads[0].correlation_id, first.heads[0].sequence_end) == (5, False)
    assert (second.heads[0].correlation_id, second.heads[0].sequence_end) == (6, True)
    assert asked.responses[0].parameters == {"sequence_id": 6, "sequence_start": True, "sequence_end": True}


def test_an_ensemble_in_an_ensemble(engine: FakeEngine) -> None:
    """S-119: the inner one's tensors are passed on by place too."""
    add_plus_one(engine)
    ensemble(engine, ("u",), ("v",), step("plus_one", {"X": "u"}, {"Y": "v"}), name="inner")
    outer = ensemble(
        engine, ("x",), ("z",), step("inner", {"u": "x"}, {"v": "y"}), step("inner", {"u": "y"}, {"v": "z"})
    )
    asked = Asked(outer, {"x": row(1)})
    engine.run_all()
    assert asked.outputs == [{"z": [3.0]}]


def test_cancelling_stops_what_runs_and_starts_nothing_more(engine: FakeEngine) -> None:
    """S-183."""
    add_plus_one(engine, "a")
    add_plus_one(engine, "b")
    route = ensemble(engine, ("x",), ("z",), step("a", {"X": "x"}, {"Y": "y"}), step("b", {"X": "y"}, {"Y": "z"}))
    asked = Asked(route, {"x": row(1)})
    asked.inference.cancel()
    assert engine.cancelled == {1}
    engine.step()
    assert engine.waiting == []
    assert asked.responses == []
    assert route.counters[ProducerCounter.CANCELED] == 1


def test_cancelling_before_submitting_frees_the_room(engine: FakeEngine) -> None:
    route = ensemble(engine, ("x",), ("y",), step("plus_one", {"X": "x"}, {"Y": "y"}))
    EnsembleInference(route.client, [InputTensor("x", "FP32", (1,), 4)], 0).cancel()


def test_statistics_are_sums_of_the_steps(engine: FakeEngine) -> None:
    """S-112."""
    add_plus_one(engine, "a")
    add_plus_one(engine, "b")
    route = ensemble(engine, ("x",), ("z",), step("a", {"X": "x"}, {"Y": "y"}), step("b", {"X": "y"}, {"Y": "z"}))
    Asked(route, {"x": row(1)})
    engine.run_all()
    steps = route.step_counters
    assert route.counters[ProducerCounter.SUCCESS] == 1
    assert (steps[InstanceCounter.EXECUTIONS], steps[InstanceCounter.INFERENCES]) == (1, 1)
    assert steps[InstanceCounter.QUEUE_NS] == 200
    assert steps[InstanceCounter.INPUT_NS] == 20
    assert steps[InstanceCounter.INFER_NS] == 100
    assert steps[InstanceCounter.OUTPUT_NS] == 20


class Decoupled:
    """A decoupled model, then plus_one."""

    def __init__(self, engine: FakeEngine, **options: Any) -> None:
        self.engine = engine
        engine.add("many", (spec("X"),), (spec("Y"),), decoupled=True)
        add_plus_one(engine)
        self.route = ensemble(
            engine,
            ("x",),
            ("z",),
            step("many", {"X": "x"}, {"Y": "y"}),
            step("plus_one", {"X": "y"}, {"Y": "z"}),
            decoupled=True,
            **options,
        )
        self.asked = Asked(self.route, {"x": row(0)})

    def respond(self, value: float, *, final: bool = False) -> None:
        index = self.engine.waiting.index("many")
        self.engine.reply(
            index, ReplyHead(inline=(InlineTensor("Y", "FP32", (1,), row(value).tobytes()),)), final=final
        )

    def finish(self) -> None:
        self.engine.reply(self.engine.waiting.index("many"), ReplyHead(index=-1), final=True)

    @property
    def values(self) -> list[float]:
        return [value for outputs in self.asked.outputs for value in outputs.get("z", [])]


def test_each_response_of_a_decoupled_step_runs_the_rest(engine: FakeEngine) -> None:
    """S-109."""
    many = Decoupled(engine)
    many.respond(1)
    many.respond(2)
    assert engine.waiting.count("plus_one") == 2
    engine.step("plus_one")
    engine.step("plus_one")
    assert many.values == [2.0, 3.0]
    assert not any(response.final for response in many.asked.responses)
    many.finish()
    assert (many.asked.responses[-1].final, many.asked.responses[-1].is_empty) == (True, True)


def test_the_last_response_is_final_if_nothing_can_follow(engine: FakeEngine) -> None:
    many = Decoupled(engine)
    many.respond(1)
    many.respond(2, final=True)
    engine.run_all()
    assert many.values == [2.0, 3.0]
    assert [response.final for response in many.asked.responses] == [False, True]


def test_a_decoupled_step_may_answer_nothing(engine: FakeEngine) -> None:
    many = Decoupled(engine)
    many.finish()
    (response,) = many.asked.responses
    assert (response.final, response.is_empty, response.error) == (True, True, None)


def test_no_more_responses_are_worked_on_than_allowed(engine: FakeEngine) -> None:
    """S-110."""
    many = Decoupled(engine, max_inflight_requests=2)
    for value in range(5):
        many.respond(value)
    many.finish()
    seen = []
    while engine.pending:
        seen.append(len(engine.pending))
        engine.step()
    assert max(seen) == 2
    assert many.values == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_cancelling_a_decoupled_ensemble_frees_what_waits(engine: FakeEngine) -> None:
    many = Decoupled(engine, max_inflight_requests=1)
    for value in range(3):
        many.respond(value)
    many.asked.inference.cancel()
    assert len(engine.cancelled) == 2


def test_steps_that_are_answered_from_the_cache_leave_time_for_the_others(engine: FakeEngine) -> None:
    """S-114: the answer of one comes before the next has begun, which is no deadlock."""
    engine.response_cache = ResponseCache(engine.client, 1 << 16, words(CACHE_WORDS))
    for name in ("left", "right"):
        engine.add(name, (spec("X"),), (spec("Y"),), plus_one, response_cache=True)
    route = ensemble(
        engine, ("x",), ("l", "r"), step("left", {"X": "x"}, {"Y": "l"}), step("right", {"X": "x"}, {"Y": "r"})
    )
    first = Asked(route, {"x": row(1)})
    engine.run_all()
    again = Asked(route, {"x": row(1)})
    assert engine.waiting == []
    assert first.outputs == again.outputs == [{"l": [2.0], "r": [2.0]}]
    engine.routes.clear()
    engine.response_cache.forget_retired()


class DecoupledBeside:
    """A decoupled model and plus_one, side by side: each response of the one is answered with the other's output."""

    def __init__(self, engine: FakeEngine) -> None:
        engine.add("many", (spec("X"),), (spec("Y"),), decoupled=True)
        add_plus_one(engine)
        route = ensemble(
            engine,
            ("x",),
            ("y", "z"),
            step("many", {"X": "x"}, {"Y": "y"}),
            step("plus_one", {"X": "x"}, {"Y": "z"}),
            decoupled=True,
        )
        self.asked = Asked(route, {"x": row(0)})


def test_every_response_is_answered_when_the_output_that_they_share_comes_last(engine: FakeEngine) -> None:
    """S-109."""
    beside = DecoupledBeside(engine)
    for value in range(3):
        reply = ReplyHead(inline=(InlineTensor("Y", "FP32", (1,), row(value).tobytes()),))
        engine.reply(0, reply, final=value == 2)
    engine.run_all()
    assert [outputs for outputs in beside.asked.outputs if outputs] == [{"y": [v], "z": [1.0]} for v in (0.0, 1.0, 2.0)]
    assert [response.final for response in beside.asked.responses].count(True) == 1
    assert beside.asked.responses[-1].final


class DecoupledTwice:
    """A decoupled model behind a decoupled model."""

    def __init__(self, engine: FakeEngine, **options: Any) -> None:
        self.engine = engine
        for name in ("outer", "inner"):
            engine.add(name, (spec("X"),), (spec("Y"),), decoupled=True)
        add_plus_one(engine)
        route = ensemble(
            engine,
            ("x",),
            ("z",),
            step("outer", {"X": "x"}, {"Y": "y"}),
            step("inner", {"X": "y"}, {"Y": "w"}),
            step("plus_one", {"X": "w"}, {"Y": "z"}),
            decoupled=True,
            **options,
        )
        self.asked = Asked(route, {"x": row(0)})

    def respond(self, model: str, value: float, *, final: bool = False) -> None:
        reply = ReplyHead(inline=(InlineTensor("Y", "FP32", (1,), row(value).tobytes()),))
        self.engine.reply(self.engine.waiting.index(model), reply, final=final)


def test_responses_of_responses_end_together(engine: FakeEngine) -> None:
    """S-109."""
    runs = [DecoupledTwice(engine) for _ in range(8)]
    for twice in runs:
        twice.respond("outer", 1)
        twice.respond("inner", 2, final=True)
        engine.step("plus_one")
        twice.respond("outer", 3, final=True)
        twice.respond("inner", 4, final=True)
        engine.step("plus_one")
        assert twice.asked.outputs == [{"z": [3.0]}, {"z": [5.0]}]
        assert twice.asked.responses[-1].final


def test_responses_of_responses_wait_for_each_other_and_all_are_answered(engine: FakeEngine) -> None:
    """S-110: what waits keeps what it is made of, and goes on when nothing else does."""
    twice = DecoupledTwice(engine, max_inflight_requests=1)
    twice.respond("outer", 1, final=True)
    for value in range(3):
        twice.respond("inner", value, final=value == 2)
    engine.run_all()
    assert [outputs["z"] for outputs in twice.asked.outputs if outputs] == [[1.0], [2.0], [3.0]]
    assert twice.asked.responses[-1].final
