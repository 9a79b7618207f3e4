"""Ensembles through shared memory: the client runs the steps, tensors pass by place in its arena (spec S-100)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import ensemble_models
import numpy as np
import numpy.typing as npt
import pytest
from forebay_server import ForebayServer

import forebay.client.shm_asyncio
from forebay.client import shm
from forebay.client.shm import Cancelled, DeadlineExceeded, Engine, InvalidArgument, NotFound, Options, Unavailable

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    repository = tmp_path_factory.mktemp("ensembles")
    ensemble_models.write_repository(repository)
    with ForebayServer(repository, protocols=("http",)) as running:
        yield running


@pytest.fixture
def engine(server: ForebayServer) -> Iterator[Engine]:
    with shm.connect(server.runtime_base) as connected:
        yield connected


def fill(model: shm.Model, rows: int = 1, first: float = 0) -> Floats:
    """Fill the only input with rising numbers; return them."""
    [spec] = model.inputs
    place = model.input(spec.name, rows=rows)
    place[:] = np.arange(place.size, dtype=np.float32).reshape(place.shape) + np.float32(first)
    return np.array(place, np.float32)


def test_steps_run_in_the_order_of_their_tensors(engine: Engine) -> None:
    """S-100."""
    model = engine.model("two_steps")
    for rows in (1, 3, 8):
        given = fill(model, rows)
        np.testing.assert_array_equal(model.infer(), (given + 1) * 2)


def test_nothing_is_copied_between_steps(engine: Engine) -> None:
    """L-030: a step's output block is the next step's input block."""
    model = engine.model("two_steps")
    fill(model)
    for _ in range(3):
        model.infer()
    assert engine.statistics().copied_bytes == 0


def test_outputs_of_branches_and_unrequested_ones(engine: Engine) -> None:
    """S-105."""
    model = engine.model("branches")
    given = fill(model)
    future = model.submit()
    outputs = future.outputs()
    np.testing.assert_array_equal(outputs["LEFT"], given + 1)
    np.testing.assert_array_equal(outputs["RIGHT"], given * 2)
    given = fill(model)
    only = model.submit(options=Options(outputs=("RIGHT",)))
    np.testing.assert_array_equal(only.result(output="RIGHT"), given * 2)
    with pytest.raises(InvalidArgument, match="no output 'LEFT'"):
        only.result(output="LEFT")


def test_ensembles_within_ensembles(engine: Engine) -> None:
    model = engine.model("nested")
    given = fill(model, 2)
    assert model.infer().shape == given.shape


def test_many_in_flight(engine: Engine) -> None:
    """More steps than a client may have requests in flight wait for their turn."""
    model = engine.model("two_steps")
    expected: list[Floats] = []
    futures: list[shm.Future] = []
    for index in range(600):
        expected.append((fill(model, 1, index) + 1) * 2)
        futures.append(model.submit())
    for future, values in zip(futures, expected, strict=True):
        np.testing.assert_array_equal(future.result(30), values)
    assert engine.statistics().in_flight == 0


def test_a_step_error_keeps_its_code_and_names_the_ensemble(engine: Engine) -> None:
    """S-107."""
    model = engine.model("two_steps")
    model.input("A", rows=1)[:] = -1
    with pytest.raises(Unavailable, match=r"^in ensemble 'two_steps', no negative numbers$"):
        model.infer()
    fill(model)
    model.infer()


def test_each_response_of_a_decoupled_step_runs_the_rest(engine: Engine) -> None:
    """S-109."""
    model = engine.model("decoupled")
    model.input(model.inputs[0].name)[:] = 4
    answers = [float(next(iter(outputs.values()))[0]) for outputs in model.stream(timeout_s=20)]
    assert answers == [1.0, 2.0, 3.0, 4.0]


def test_deadline_and_cancellation_end_the_steps(engine: Engine) -> None:
    model = engine.model("two_steps")
    model.input("A", rows=1)[:] = -2
    with pytest.raises(DeadlineExceeded):
        model.infer(timeout_s=0.1)
    model.input("A", rows=1)[:] = -2
    future = model.submit()
    assert future.cancel()
    with pytest.raises(Cancelled):
        future.result()
    give_up = time.monotonic() + 20
    while engine.statistics().in_flight:
        assert time.monotonic() < give_up
        engine.connection.completions.wait_any()
    given = fill(model)
    np.testing.assert_array_equal(model.infer(), (given + 1) * 2)


def test_memory_comes_back(engine: Engine) -> None:
    model = engine.model("two_steps")
    fill(model)
    model.infer()
    used = engine.statistics().arena_used_bytes
    for _ in range(50):
        model.infer()
    assert engine.statistics().arena_used_bytes == used


def test_an_ensemble_that_is_loaded_anew_is_followed(tmp_path: Path) -> None:
    ensemble_models.write_repository(tmp_path)
    arguments = ("--model-control-mode=explicit", "--load-model=two_steps")
    with (
        ForebayServer(tmp_path, *arguments, protocols=("http",)) as server,
        shm.connect(server.runtime_base) as engine,
    ):
        model = engine.model("two_steps")
        fill(model)
        model.infer()
        (tmp_path / "two_steps" / "config.pbtxt").unlink()
        (tmp_path / "two_steps" / "1").rmdir()
        (tmp_path / "two_steps").rmdir()
        once = ensemble_models.step("scale", {"X": "A"}, {"Y": "b"})
        again = ensemble_models.step("scale", {"X": "b"}, {"Y": "C"})
        ensemble_models.write_ensemble(tmp_path, "two_steps", ensemble_models.pair("A", "C"), once, again)
        assert server.post("/v2/repository/models/two_steps/load")[0] == 200
        given = fill(model)
        np.testing.assert_array_equal(model.infer(), given * 4)
        assert server.post("/v2/repository/models/two_steps/unload")[0] == 200
        fill(model)
        with pytest.raises((NotFound, Unavailable)):
            model.infer()


def test_requests_are_counted_as_those_of_other_protocols_are(engine: Engine, server: ForebayServer) -> None:
    """S-112, H-231: the ensemble's own statistics and those of its models."""

    def counts(model: str) -> tuple[int, int, int, int]:
        document = json.loads(server.get(f"/v2/models/{model}/stats")[1])["model_stats"][0]
        inference = document["inference_stats"]
        assert inference["queue"]["count"] == inference["success"]["count"]
        return (
            inference["success"]["count"],
            inference["fail"]["count"],
            document["inference_count"],
            document["execution_count"],
        )

    before = {model: counts(model) for model in ("two_steps", "scale", "add_one")}
    model = engine.model("two_steps")
    for _ in range(3):
        fill(model, 2)
        model.infer()
    model.input("A", rows=1)[:] = -1
    with pytest.raises(Unavailable):
        model.infer()

    def grown(model: str) -> tuple[int, ...]:
        return tuple(now - then for now, then in zip(counts(model), before[model], strict=True))

    server.wait_for(lambda: grown("two_steps")[:3] == (3, 1, 6), "the ensemble's requests to be counted")
    server.wait_for(lambda: grown("scale")[:3] == (3, 0, 6), "a step's requests to be counted")
    server.wait_for(lambda: grown("add_one")[:2] == (3, 1), "the failing step's requests to be counted")


def test_what_a_client_counted_stays_when_it_leaves(server: ForebayServer) -> None:
    def successes() -> int:
        document = json.loads(server.get("/v2/models/scale/stats")[1])["model_stats"][0]
        count: int = document["inference_stats"]["success"]["count"]
        return count

    before = successes()
    with shm.connect(server.runtime_base) as engine:
        model = engine.model("scale")
        fill(model)
        for _ in range(5):
            model.infer()
    server.wait_for(lambda: successes() == before + 5, "the requests to be counted")


@pytest.mark.parametrize("role", ["worker scale:1", "scheduler"])
def test_steps_in_flight_survive(server: ForebayServer, engine: Engine, role: str) -> None:
    """What was lost of a request is handed in again, like any other."""
    model = engine.model("two_steps")
    fill(model)
    model.infer()
    expected: list[Floats] = []
    futures: list[shm.Future] = []
    for index in range(200):
        expected.append((fill(model, 1, index) + 1) * 2)
        futures.append(model.submit())
        if index == 100:
            os.kill(server.pid_of(role), signal.SIGKILL)
    for future, values in zip(futures, expected, strict=True):
        try:
            np.testing.assert_array_equal(future.result(30), values)
        except shm.ServingError:
            # Without any worker there is nobody to hand a step to.
            assert role != "scheduler"
    assert engine.statistics().in_flight == 0

    def answers() -> bool:
        given = fill(model)
        try:
            return bool((model.infer() == (given + 1) * 2).all())
        except shm.ServingError:
            return False

    server.wait_for(answers, "an answer after the restart")


def test_asyncio(server: ForebayServer) -> None:
    async def main() -> None:
        async with await forebay.client.shm_asyncio.connect(server.runtime_base) as engine:
            model = await engine.model("two_steps")

            async def one(value: int) -> Floats:
                model.input("A", rows=1)[:] = value
                return np.array(await model.infer(timeout_s=30), np.float32)

            for value, answer in enumerate(await asyncio.gather(*(one(value) for value in range(50)))):
                np.testing.assert_array_equal(answer, np.full((1, 4), (value + 1) * 2, np.float32))

    asyncio.run(main())
