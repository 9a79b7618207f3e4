"""Ensembles of one step, whose requests lie in the model's own rows."""

from __future__ import annotations

import pytest
from engine_scene import Rows, Surroundings, play, turn

from forebay.frontend.ensemble.inference import OneStepInference
from forebay.frontend.ensemble.one_step import OneStep, OneStepRoute, one_step_of
from forebay.frontend.inference import InputTensor, RequestMeta, Response
from forebay.ipc.catalog import EnsembleStep, ModelEntry
from forebay.ipc.counters import ProducerCounter
from forebay.ipc.errors import Unavailable
from forebay.ipc.tensor import TensorSpec

ENSEMBLE, VARIABLE = 30, 31

#: Its requests are parcels.
PARCELS = ModelEntry(
    name="variable",
    version=1,
    state="READY",
    route=VARIABLE,
    max_batch_size=8,
    inputs=(TensorSpec("X", "FP32", (-1,)),),
    outputs=(TensorSpec("Y", "FP32", (-1,)),),
    instance_counter_offsets=(64,),
)


def ensemble(model: str, size: int) -> ModelEntry:
    return ModelEntry(
        name="one",
        version=1,
        state="READY",
        route=ENSEMBLE,
        max_batch_size=8,
        inputs=(TensorSpec("IN", "FP32", (size,)),),
        outputs=(TensorSpec("OUT", "FP32", (-1,)),),
        steps=(EnsembleStep(model, -1, {"X": "IN"}, {"Y": "OUT"}),),
        is_ensemble=True,
    )


def one_step(s: Surroundings) -> OneStep:
    found = one_step_of(s.engine.routes[ENSEMBLE])
    assert found is not None
    return found


def place(s: Surroundings) -> OneStepInference:
    tensors = [InputTensor("IN", "FP32", (1, 4), 16)]
    return OneStepInference(s.engine.routes[ENSEMBLE], one_step(s), tensors, 1, is_bare=True)


def failures(s: Surroundings) -> int:
    return s.engine.routes[ENSEMBLE].counters[ProducerCounter.FAILED]


def test_request_that_is_cancelled_twice_counts_once() -> None:
    """A call that is reset lets go of its request; so does the connection that ends with it."""

    async def scenario(s: Surroundings) -> None:
        inference = place(s)
        responses: list[Response] = []
        inference.submit(RequestMeta(), responses.append)
        await turn()
        inference.cancel()
        inference.cancel()
        assert failures(s) == 1
        assert responses == []

    play(scenario, entries=(ensemble("m", 4),))


def test_failure_that_ends_the_call_counts_once() -> None:
    """The call lets go of its request while it takes the error."""

    async def scenario(s: Surroundings) -> None:
        inference = place(s)
        inference.submit(RequestMeta(), lambda _response: inference.cancel())
        await turn()
        (message,) = s.take_sent()
        (parcel,) = message.parcels
        s.engine.parcels.fail(parcel.token, Unavailable("no"))
        assert failures(s) == 1

    play(scenario, entries=(PARCELS, ensemble("variable", -1)))


@pytest.mark.parametrize("name", ["sequence_id", "mine"])
def test_only_sequence_parameters_of_the_model_are_the_ensembles(name: str) -> None:
    """S-111."""
    expected = {"sequence_id": 0, "sequence_start": False, "sequence_end": False} | (
        {name: 7} if name == "sequence_id" else {}
    )

    async def rows(s: Surroundings) -> None:
        route = OneStepRoute(one_step(s))
        owner = Rows()
        slab, first = route.loan(1)
        route.publish(slab, first, 1, owner)
        waiting = slab.owners[first]
        assert waiting is not None
        waiting.rows_done(slab, first, {name: 7})
        assert {**route.reply_parameters, **owner.parameters} == expected

    async def parcels(s: Surroundings) -> None:
        inference = place(s)
        responses: list[Response] = []
        inference.submit(RequestMeta(), responses.append)
        await turn()
        (message,) = s.take_sent()
        await s.reply(message.parcels[0].token, parameters={name: 7})
        assert responses[0].parameters == expected

    play(rows, entries=(ensemble("m", 4),))
    play(parcels, entries=(PARCELS, ensemble("variable", -1)))
