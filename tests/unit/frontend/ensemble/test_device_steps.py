"""Tensors between steps on one GPU: where they lie, who may have them there, and when their room is free again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeRoute, spec

from forebay.frontend.device_places import DevicePlace
from forebay.frontend.ensemble.inference import EnsembleInference
from forebay.frontend.inference import InputTensor, RequestMeta, Response
from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.counters import ProducerCounter
from forebay.ipc.errors import Code
from forebay.ipc.messages import DeviceMemory, InlineTensor, ReplyHead, TensorPlace

MEMORY = DeviceMemory(owner=1, number=5, device_id=0, byte_size=1024, handle=b"h")
FIRST = EnsembleStep("first", -1, {"X": "x"}, {"Y": "y"})
SECOND = EnsembleStep("second", -1, {"X": "y"}, {"Y": "z"})


@pytest.fixture
def emptied() -> list[int]:
    """Numbers of the pools that were retired and are not used any more."""
    return []


@pytest.fixture
def engine(emptied: list[int]) -> Iterator[FakeEngine]:
    """Whatever a test does, nothing stays allocated once every request has been answered."""
    engine = FakeEngine()
    engine.device_pools.add(MEMORY)
    engine.device_pools.on_empty = emptied.append
    yield engine
    while engine.pending:
        engine.reply(0, ReplyHead(code=int(Code.CANCELLED), text="cancelled"), final=True)
    assert engine.blocks.used_bytes == 0
    engine.device_pools.remove(MEMORY.number)
    assert emptied == [MEMORY.number]


def add(engine: FakeEngine, name: str, **options: Any) -> FakeRoute:
    """Add a model on a GPU, which answers when the test says so."""
    dims = options.pop("dims", (4,))
    return engine.add(name, (spec("X", dims),), (spec("Y", dims),), **{"device_id": 0, **options})


def add_ensemble(engine: FakeEngine, *steps: EnsembleStep, outputs: tuple[str, ...] = ("z",)) -> FakeRoute:
    named = tuple(spec(name) for name in outputs)
    return engine.add("ens", (spec("x"),), named, steps=steps or (FIRST, SECOND), is_ensemble=True)


def ask(route: FakeRoute, **meta: Any) -> tuple[EnsembleInference, list[Response]]:
    inference = EnsembleInference(route.client, [InputTensor("x", "FP32", (4,), 16)], 0)
    responses: list[Response] = []
    inference.submit(RequestMeta(**meta), responses.append)
    return inference, responses


def reply_on_device(engine: FakeEngine, route: FakeRoute, *, final: bool = True) -> None:
    """Answer the oldest request, whose output is where it was to go."""
    [target] = route.heads[-1].targets
    place = TensorPlace("Y", "FP32", (4,), target.offset, 16, memory=target.memory)
    engine.reply(0, ReplyHead(outputs=(place,)), final=final)


def reply_inline(engine: FakeEngine) -> None:
    data = np.arange(4, dtype=np.float32).tobytes()
    engine.reply(0, ReplyHead(inline=(InlineTensor("Y", "FP32", (4,), data),)), final=True)


def test_a_step_reads_on_the_gpu_where_the_one_before_has_written(engine: FakeEngine) -> None:
    """Issue 8, 4: by handle and offset; the last step answers on the host."""
    first, second = add(engine, "first"), add(engine, "second")
    _, responses = ask(add_ensemble(engine))
    [target] = first.heads[0].targets
    assert (first.heads[0].memories, target.name, target.byte_size, target.memory) == ((MEMORY,), "Y", 16, 1)
    reply_on_device(engine, first)
    [source] = second.heads[0].inputs
    assert second.heads[0].memories == (MEMORY,)
    assert source == TensorPlace("X", "FP32", (4,), target.offset, 16, memory=1)
    assert second.heads[0].targets == ()
    assert first.counters[ProducerCounter.DEVICE_PASSED_BYTES] == 16
    reply_inline(engine)
    assert [view.name for view in responses[0].outputs] == ["z"]


@pytest.mark.parametrize(
    ("of_first", "of_second"),
    [
        ({"device_id": -1}, {}),
        ({}, {"device_id": -1}),
        ({}, {"device_id": 1}),
        ({"response_cache": True}, {}),
        ({}, {"response_cache": True}),
        ({"decoupled": True}, {}),
    ],
    ids=["from the host", "to the host", "to another GPU", "kept", "looked up", "many answers"],
)
def test_what_must_be_on_the_host_goes_there(
    engine: FakeEngine, of_first: dict[str, Any], of_second: dict[str, Any]
) -> None:
    first, second = add(engine, "first", **of_first), add(engine, "second", **of_second)
    ask(add_ensemble(engine))
    assert (first.heads[0].memories, first.heads[0].targets) == ((), ())
    reply_inline(engine)
    assert (second.heads[0].memories, second.heads[0].inputs[0].memory) == ((), 0)


def add_varying(engine: FakeEngine) -> tuple[FakeRoute, FakeRoute, FakeRoute]:
    """Add two models whose tensors may have any size, and the ensemble of them."""
    return add(engine, "first", dims=(-1,)), add(engine, "second", dims=(-1,)), add_ensemble(engine)


def lend(engine: FakeEngine, needs: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Have the oldest request's worker ask for room; return offset and bytes of what it gets, by output."""
    owner = engine.pending[0][2]
    return {name: (room.offset, room.byte_size) for name, room in owner.lend_rooms(needs).items()}


def reply_at(engine: FakeEngine, offset: int, byte_size: int) -> None:
    place = TensorPlace("Y", "FP32", (byte_size // 4,), offset, byte_size, memory=1)
    engine.reply(0, ReplyHead(outputs=(place,)), final=True)


def test_an_output_of_any_size_gets_its_room_when_the_model_knows_it(engine: FakeEngine) -> None:
    """The next one has as much from the beginning, and gives back what it does not need."""
    first, second, route = add_varying(engine)
    ask(route)
    head = first.heads[0]
    assert (head.may_wait, head.memories, head.targets) == (True, (), (TensorPlace("Y", "", (), 0, 0),))
    assert lend(engine, {"Y": 400}) == {"Y": (0, 400)}
    reply_at(engine, 0, 400)
    assert second.heads[0].inputs == (TensorPlace("X", "FP32", (100,), 0, 400, memory=1),)
    reply_inline(engine)
    ask(route)
    [target] = first.heads[1].targets
    assert (target.offset, target.byte_size, target.memory) == (0, 400, 1)
    reply_at(engine, 0, 16)
    ask(route)
    assert first.heads[2].targets[0].offset == 256
    # The worker that was given room has died, and the next one needs more.
    engine.pending.rotate(-1)
    assert lend(engine, {"Y": 600}) == {"Y": (256, 600)}
    reply_at(engine, 256, 600)


def test_an_output_of_any_size_that_finds_no_room_goes_to_the_host(engine: FakeEngine) -> None:
    first, second, route = add_varying(engine)
    ask(route)
    assert lend(engine, {"Y": 1025, "Z": 4}) == {}
    assert lend(engine, {"Y": 0}) == {}
    reply_inline(engine)
    assert (second.heads[0].memories, second.heads[0].inputs[0].memory) == ((), 0)
    reply_inline(engine)
    # What was learned is too much for what is left: it may still ask for what it really needs.
    ask(route)
    assert lend(engine, {"Y": 1024}) == {"Y": (0, 1024)}
    ask(route)
    reply_at(engine, 0, 1024)
    ask(route)
    assert [target.memory for target in first.heads[3].targets] == [0]


def test_room_for_a_waiting_output_is_kept_until_its_worker_lets_go(engine: FakeEngine, emptied: list[int]) -> None:
    _first, _second, route = add_varying(engine)
    inference, _ = ask(route)
    lend(engine, {"Y": 64})
    inference.cancel()
    engine.device_pools.remove(MEMORY.number)
    assert emptied == []
    engine.reply(0, ReplyHead(code=int(Code.CANCELLED), text="cancelled"), final=True)
    assert emptied == [MEMORY.number]


def test_tensors_pass_on_the_gpu_into_an_ensemble_that_is_a_step_and_out_of_it(engine: FakeEngine) -> None:
    first, second, third = (add(engine, name) for name in ("first", "second", "third"))
    inner = EnsembleStep("second", -1, {"X": "p"}, {"Y": "q"})
    engine.add("inner", (spec("p"),), (spec("q"),), steps=(inner,), is_ensemble=True)
    steps = (
        FIRST,
        EnsembleStep("inner", -1, {"p": "y"}, {"q": "w"}),
        EnsembleStep("third", -1, {"X": "w"}, {"Y": "z"}),
    )
    ask(add_ensemble(engine, *steps))
    for model in (first, second):
        reply_on_device(engine, model)
    assert [model.heads[0].inputs[0].memory for model in (first, second, third)] == [0, 1, 1]
    reply_inline(engine)


@pytest.mark.parametrize("of_inner", [{"response_cache": True}, {"outputs": ("q", "p")}], ids=["cached", "handed on"])
def test_what_an_ensemble_that_is_a_step_needs_on_the_host_goes_there(
    engine: FakeEngine, of_inner: dict[str, Any]
) -> None:
    first = add(engine, "first")
    add(engine, "second")
    inner = EnsembleStep("second", -1, {"X": "p"}, {"Y": "q"})
    outputs = tuple(spec(name) for name in of_inner.pop("outputs", ("q",)))
    engine.add("inner", (spec("p"),), outputs, steps=(inner,), is_ensemble=True, **of_inner)
    ask(add_ensemble(engine, FIRST, EnsembleStep("inner", -1, {"p": "y"}, {"q": "z"})))
    assert first.heads[0].targets == ()


def test_what_a_client_gets_goes_to_the_host_unless_it_did_not_ask(engine: FakeEngine) -> None:
    """S-105."""
    first = add(engine, "first")
    add(engine, "second")
    route = add_ensemble(engine, outputs=("y", "z"))
    ask(route)
    assert first.heads[0].targets == ()
    ask(route, outputs=("z",))
    assert len(first.heads[1].targets) == 1


REGION = DeviceMemory(owner=0, number=9, device_id=0, byte_size=4096, handle=b"r")


def ask_in_region(engine: FakeEngine, **options: Any) -> list[Response]:
    """Ask for an ensemble whose input and output lie in a client's region."""
    route = add_ensemble(engine, **options)
    courier = route.entry
    source, target = (DevicePlace(REGION, offset, 16, courier) for offset in (512, 1024))
    tensor = InputTensor("x", "FP32", (4,), 16, device=source)
    inference = EnsembleInference(route.client, [tensor], 0, targets={"z": target})
    responses: list[Response] = []
    inference.submit(RequestMeta(), responses.append)
    return responses


def test_a_clients_region_is_read_by_the_first_step_and_written_by_the_last(engine: FakeEngine) -> None:
    """H-196: by handle and offset, as a model that is no step does."""
    first, second = add(engine, "first"), add(engine, "second")
    responses = ask_in_region(engine)
    assert first.heads[0].memories == (REGION, MEMORY)
    assert first.heads[0].inputs == (TensorPlace("X", "FP32", (4,), 512, 16, memory=1),)
    reply_on_device(engine, first)
    [target] = second.heads[0].targets
    assert (second.heads[0].memories[target.memory - 1], target.offset, target.byte_size) == (REGION, 1024, 16)
    reply_on_device(engine, second)
    [view] = responses[0].outputs
    assert (view.name, view.is_placed, bytes(view.data)) == ("z", True, b"")
    assert second.counters[ProducerCounter.DEVICE_PASSED_BYTES] == 0


def test_an_output_that_does_not_fit_its_region_comes_to_the_host(engine: FakeEngine) -> None:
    """H-198: where who carries it says so."""
    first = add(engine, "first")
    add(engine, "second", dims=(-1,))
    responses = ask_in_region(engine)
    reply_on_device(engine, first)
    assert lend(engine, {"Y": 64}) == {}
    reply_inline(engine)
    assert not responses[0].outputs[0].is_placed


def test_an_answer_elsewhere_in_the_region_is_refused(engine: FakeEngine) -> None:
    first = add(engine, "first")
    add(engine, "second")
    responses = ask_in_region(engine)
    reply_on_device(engine, first)
    place = TensorPlace("Y", "FP32", (4,), 2048, 16, memory=1)
    engine.reply(0, ReplyHead(outputs=(place,)), final=True)
    assert responses[0].error is not None


def test_without_room_or_pool_the_host_is_taken(engine: FakeEngine) -> None:
    """F-151: blocks begin at multiples of 256."""
    first = add(engine, "first")
    add(engine, "second")
    route = add_ensemble(engine)
    for _ in range(5):
        ask(route)
    assert [head.targets[0].offset for head in first.heads[:4]] == [0, 256, 512, 768]
    assert (first.heads[4].memories, first.heads[4].targets) == ((), ())
    reply_inline(engine)  # The first one came to the host all the same; its room is free now.
    ask(route)
    assert first.heads[5].targets[0].offset == 0
    engine.device_pools.remove(MEMORY.number)
    ask(route)
    assert first.heads[6].targets == ()


def test_room_is_kept_until_the_last_reader_has_answered(engine: FakeEngine, emptied: list[int]) -> None:
    first = add(engine, "first")
    add(engine, "second")
    add(engine, "third")
    third = EnsembleStep("third", -1, {"X": "y"}, {"Y": "w"})
    ask(add_ensemble(engine, FIRST, SECOND, third, outputs=("z", "w")))
    reply_on_device(engine, first)
    engine.device_pools.remove(MEMORY.number)
    assert engine.waiting == ["second", "third"]
    reply_inline(engine)
    assert emptied == []
    reply_inline(engine)
    assert emptied == [MEMORY.number]


def test_who_cancels_leaves_the_room_to_the_worker_that_may_write_there(engine: FakeEngine, emptied: list[int]) -> None:
    add(engine, "first")
    add(engine, "second")
    inference, _ = ask(add_ensemble(engine))
    inference.cancel()
    engine.device_pools.remove(MEMORY.number)
    assert emptied == []
    engine.reply(0, ReplyHead(code=int(Code.CANCELLED), text="cancelled"), final=True)
    assert emptied == [MEMORY.number]


def test_what_passes_through_an_older_pool_is_named_beside_the_newer_one(engine: FakeEngine) -> None:
    """As when a courier was replaced between two steps."""
    first, second = add(engine, "first"), add(engine, "second")
    add(engine, "third")
    newer = DeviceMemory(owner=1, number=6, device_id=0, byte_size=1024, handle=b"i")
    third = EnsembleStep("third", -1, {"X": "z"}, {"Y": "w"})
    ask(add_ensemble(engine, FIRST, SECOND, third, outputs=("w",)))
    engine.device_pools.remove(MEMORY.number)
    engine.device_pools.add(newer)
    reply_on_device(engine, first)
    head = second.heads[0]
    assert head.memories == (MEMORY, newer)
    assert (head.inputs[0].memory, head.targets[0].memory) == (1, 2)


@pytest.mark.parametrize(
    "place", [TensorPlace("Y", "FP32", (4,), 0, 4096, memory=1), TensorPlace("Z", "", (), 0, 4, memory=1)]
)
def test_an_answer_elsewhere_on_the_device_is_refused(engine: FakeEngine, place: TensorPlace) -> None:
    add(engine, "first")
    add(engine, "second")
    _, responses = ask(add_ensemble(engine))
    engine.reply(0, ReplyHead(outputs=(place,)), final=True)
    assert responses[0].error is not None
    assert "could not be read" in responses[0].error.text
