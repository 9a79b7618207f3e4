"""Ensembles in a line whose requests lie in rows of overlapping slabs."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from engine_scene import Rows, Surroundings, play, turn

from forebay.frontend.data_plane.owners import OwnedSlab
from forebay.frontend.ensemble.chain import Chain, ChainRoute, ChainSlab, chain_of, find_links
from forebay.frontend.ensemble.run import ensemble_of
from forebay.ipc.catalog import Catalog, EnsembleStep, ModelEntry
from forebay.ipc.counters import InstanceCounter, ProducerCounter
from forebay.ipc.errors import Code
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import HEADER, MESSAGE_BYTES_MAX, Kind

ENSEMBLE = 20


def spec(name: str, *dims: int, datatype: str = "FP32") -> TensorSpec:
    return TensorSpec(name, datatype, dims)


def model(
    name: str, route: int, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **options: object
) -> ModelEntry:
    entry = {"version": 1, "max_batch_size": 8, "instance_counter_offsets": (64,), **options}
    return ModelEntry(name=name, state="READY", route=route, inputs=inputs, outputs=outputs, **entry)  # type: ignore[arg-type]


def ensemble(*steps: EnsembleStep, output: TensorSpec | None = None, **options: object) -> ModelEntry:
    outputs = (output or spec("OUT", 2),)
    return model("line", ENSEMBLE, (spec("IN", 4),), outputs, is_ensemble=True, steps=steps, **options)


FIRST = model("first", 21, (spec("a", 4),), (spec("left", 1), spec("b", 3)))
SECOND = model("second", 22, (spec("c", 3),), (spec("d", 2),))
STEP_1 = EnsembleStep("first", -1, {"a": "IN"}, {"left": "unused", "b": "between"})
STEP_2 = EnsembleStep("second", -1, {"c": "between"}, {"d": "OUT"})
LINE = ensemble(STEP_2, STEP_1)


class Line:
    """The ensemble ``line`` over ``first`` and ``second``, in an engine client."""

    def __init__(self, scene: Surroundings) -> None:
        self.scene = scene
        self.ensemble = scene.engine.routes[ENSEMBLE]
        found = chain_of(ensemble_of(self.ensemble))
        assert found is not None
        self.chain: Chain = found
        self.route = ChainRoute(found)

    def publish(self, rows: int = 1) -> tuple[Rows, ChainSlab, int]:
        slab, first = self.route.loan(rows)
        assert isinstance(slab, ChainSlab)
        owner = Rows(rows)
        self.route.publish(slab, first, rows, owner)
        return owner, slab, first

    async def answer(self, slab: OwnedSlab, first: int, rows: int = 1, *, kind: Kind = Kind.RUNS_DONE) -> None:
        error = bytes((Code.UNAVAILABLE,)) + b"no" if kind == Kind.RUNS_FAILED else b""
        await self.scene.tell_runs(kind, (first, rows), slab=slab, error=error, batch=time.monotonic_ns())

    def uses(self) -> list[int]:
        return [route.counters[ProducerCounter.ENSEMBLE_USES] for route in self.chain.routes]


def lines(*entries: ModelEntry) -> dict[str, tuple[ModelEntry, ...]]:
    return {"entries": entries}


def test_rows_pass_from_model_to_model_and_nothing_is_copied() -> None:
    """L-030: the second model's input rows are the first one's output rows."""

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        owner, slab, first = line.publish(2)
        await turn()
        (message,) = s.take_sent()
        assert [(run.route, run.base, run.first, run.rows_each) for run in message.runs] == [(21, slab.base, 0, 2)]
        made = line.chain.routes[0].output_slice(slab.links[0], first, 2, 1)
        read = line.chain.routes[1].input_slice(slab.links[1], first, 2, 0)
        made[:] = bytes(range(24))
        assert read == made
        await line.answer(slab.links[0], first, 2)
        (message,) = s.take_sent()
        assert [(run.route, run.base, run.first) for run in message.runs] == [(22, slab.links[1].base, 0)]
        assert owner.end == ""
        assert s.engine.in_flight_count == 2
        await line.answer(slab.links[1], first, 2)
        assert owner.end == "done"
        assert s.engine.in_flight_count == slab.live == 0
        assert line.ensemble.counters[ProducerCounter.COPIED_IN_BYTES] == 0
        assert line.ensemble.counters[ProducerCounter.SUCCESS] == 1
        assert line.ensemble.step_counters[InstanceCounter.INFERENCES] == 2

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_requests_that_finish_a_step_together_begin_the_next_together() -> None:
    """I-3: one run for all, not one message each."""

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        for _ in range(3):
            _owner, slab, _first = line.publish()
        await turn()
        s.take_sent()
        await line.answer(slab.links[0], 0, 3)
        (message,) = s.take_sent()
        assert [(run.first, run.requests) for run in message.runs] == [(0, 3)]

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_refusal_of_a_later_step_fails_the_request_at_once_in_the_name_of_the_ensemble() -> None:
    """S-107; core#466: a queue limit that a step hits must not hang the request."""

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        owner, slab, first = line.publish()
        await turn()
        await line.answer(slab.links[0], first)
        await line.answer(slab.links[1], first, kind=Kind.RUNS_FAILED)
        assert (owner.end, owner.text) == ("UNAVAILABLE ran", "in ensemble 'line', no")
        assert slab.live == s.engine.in_flight_count == 0
        assert line.ensemble.counters[ProducerCounter.FAILED] == 1

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_models_are_kept_while_requests_need_them() -> None:
    """S-108: also those of steps that are still to come."""

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        _owner, slab, first = line.publish()
        line.publish()
        assert line.uses() == [1, 1]
        await turn()
        s.engine.update_catalog(Catalog(generation=2, models=(LINE,)))
        await line.answer(slab.links[0], first, 2)
        await line.answer(slab.links[1], first)
        assert line.uses() == [1, 1]
        await line.answer(slab.links[1], first + 1)
        assert line.uses() == [0, 0]

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_lost_worker_of_a_later_step_has_only_that_step_tried_again() -> None:
    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        owner, slab, first = line.publish()
        await turn()
        await line.answer(slab.links[0], first)
        s.take_sent()
        await s.tell_runs(Kind.RUNS_LOST, (first, 1), slab=slab.links[1], batch=9)
        (message,) = s.take_sent()
        assert [(run.route, run.base, run.attempt) for run in message.runs] == [(22, slab.links[1].base, 1)]
        await line.answer(slab.links[1], first)
        assert owner.end == "done"

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_time_of_a_request_begins_when_it_comes_even_if_the_turn_before_sent_nothing() -> None:
    """S-112: a request that is rung at once leaves no turn behind whose time the next one could take for its own."""

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        await s.grant(route=21)
        real_ns = 0
        for _ in range(2):
            before_ns = time.monotonic_ns()
            _owner, slab, first = line.publish()
            for link in slab.links:
                await line.answer(link, first)
            real_ns += time.monotonic_ns() - before_ns
            await asyncio.sleep(0.01)
        assert line.ensemble.counters[ProducerCounter.SUCCESS_NS] <= real_ns

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_new_scheduler_gets_the_step_that_runs() -> None:
    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        _owner, slab, first = line.publish()
        await turn()
        await line.answer(slab.links[0], first)
        s.take_sent()
        await s.resync()
        (message,) = s.take_sent()
        assert [(run.route, run.first) for run in message.runs] == [(22, first)]

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_client_that_leaves_frees_the_step_that_waits() -> None:
    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        owner, slab, first = line.publish()
        line.route.cancel_rows(slab, first, Rows())
        assert owner.end == ""
        line.route.cancel_rows(slab, first, owner)
        await turn()
        assert owner.end == "CANCELLED ran"
        assert s.take_sent() == []
        owner, slab, first = line.publish()
        await turn()
        await line.answer(slab.links[0], first)
        await turn()
        s.take_sent()
        line.route.cancel_rows(slab, first, owner)
        await turn()
        (cancel,) = s.take_sent()
        assert [(rows.route, rows.base, rows.firsts) for rows in cancel.rows] == [(22, slab.links[1].base, (first,))]

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_request_of_a_client_that_left_goes_on_to_no_further_model() -> None:
    """S-183: what runs is awaited."""

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        owner, slab, first = line.publish()
        await turn()
        line.route.cancel_rows(slab, first, owner)
        await turn()
        s.take_sent()
        await line.answer(slab.links[0], first)
        assert owner.end == "CANCELLED ran"
        assert s.take_sent() == []
        assert slab.live == s.engine.in_flight_count == 0
        assert line.ensemble.counters[ProducerCounter.CANCELED] == 1

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_lone_request_is_rung_at_once_at_every_step_and_one_of_several_is_not() -> None:
    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        worker = await s.grant(route=22)
        _owner, slab, first = line.publish()
        await turn()
        s.take_sent()
        await line.answer(slab.links[0], first)
        assert worker.recv(MESSAGE_BYTES_MAX)[0] == Kind.RUNS
        await line.answer(slab.links[1], first)
        for _ in range(2):
            line.publish()
        await turn()
        await line.answer(slab.links[0], 0, 2)
        message = worker.recv(MESSAGE_BYTES_MAX)
        assert HEADER.unpack_from(message)[2] == 1, "two requests are one run"
        with pytest.raises(BlockingIOError):
            worker.recv(MESSAGE_BYTES_MAX)

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_new_version_of_a_step_gets_slabs_of_its_own() -> None:
    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        _owner, slab, first = line.publish()
        await turn()
        before = s.engine.used_bytes
        newer = model("second", 23, SECOND.inputs, SECOND.outputs, version=2)
        s.engine.update_catalog(Catalog(generation=2, models=(FIRST, newer, LINE)))
        again = Line(s)
        assert again.chain is not line.chain
        again.publish()
        assert s.engine.used_bytes > before
        for link in slab.links:
            await line.answer(link, first)
        assert s.engine.used_bytes == before, "the old slab is gone"

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_models_on_one_gpu_are_no_chain_unless_they_have_no_pool_there() -> None:
    """What passes between them stays on the GPU; rows are in host memory (F-151)."""
    on_gpu = [msgspec.structs.replace(entry, device_id=1) for entry in (FIRST, SECOND)]

    async def scenario(s: Surroundings) -> None:
        assert find_links(s.engine.routes[ENSEMBLE]) == ()
        s.engine.device_pools.excluded = {1}
        assert len(find_links(s.engine.routes[ENSEMBLE])) == 2

    play(scenario, **lines(*on_gpu, LINE))


def test_models_that_move_between_gpus_and_cpus_in_place_become_a_chain_or_cease_to_be_one() -> None:
    on_gpu = [msgspec.structs.replace(entry, device_id=0) for entry in (FIRST, SECOND)]

    async def scenario(s: Surroundings) -> None:
        line = Line(s)
        s.engine.update_catalog(Catalog(generation=2, models=(*on_gpu, LINE)))
        assert chain_of(ensemble_of(line.ensemble)) is None
        s.engine.update_catalog(Catalog(generation=3, models=(FIRST, SECOND, LINE)))
        assert chain_of(ensemble_of(line.ensemble)) is not None

    play(scenario, **lines(FIRST, SECOND, LINE))


def test_models_on_different_gpus_are_a_chain() -> None:
    first, second = (msgspec.structs.replace(entry, device_id=gpu) for gpu, entry in enumerate((FIRST, SECOND)))

    async def scenario(s: Surroundings) -> None:
        assert len(find_links(s.engine.routes[ENSEMBLE])) == 2

    play(scenario, **lines(first, second, LINE))


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        (model("first", 21, (spec("a", 4),), (spec("b", 3), spec("left", 1))), SECOND, LINE),
        (model("first", 21, (spec("a", 4),), (spec("b", 3, datatype="INT32"),)), SECOND, LINE),
        (model("first", 21, (spec("a", 4),), (spec("b", -1),)), SECOND, LINE),
        (FIRST, model("second", 22, (spec("c", 3),), (spec("d", 2),), response_cache=True), LINE),
        (FIRST, model("second", 22, (spec("c", 3),), (spec("d", 2),), decoupled=True), LINE),
        (FIRST, model("second", 22, (spec("c", 3),), (spec("d", 2),), max_batch_size=0), LINE),
        (model("first", 21, FIRST.inputs, (*FIRST.outputs, spec("x", 1)), sees_requests=True), SECOND, LINE),
        (FIRST, SECOND, ensemble(STEP_1, STEP_2, output=spec("between", 3))),
        (FIRST, SECOND, ensemble(EnsembleStep("first", -1, {"a": "IN"}, {"b": "OUT"}))),
        (FIRST, SECOND, ensemble(STEP_1, STEP_2, EnsembleStep("first", -1, {"a": "IN"}, {"b": "more"}))),
    ],
    ids=[
        "inputs are not the last outputs", "types differ", "size varies", "cached", "decoupled", "does not batch",
        "sees what is left out", "output of an earlier step", "one step", "branches",
    ],
)  # fmt: skip
def test_what_is_no_chain_of_rows_runs_as_a_graph(first: ModelEntry, second: ModelEntry, line: ModelEntry) -> None:
    async def scenario(s: Surroundings) -> None:
        assert find_links(s.engine.routes[ENSEMBLE]) == ()

    play(scenario, **lines(first, second, line))
