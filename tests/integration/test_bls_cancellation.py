"""Nested calls (BLS) end with the requests that they are made for (spec L-026, S-180, S-184), over real processes."""

from __future__ import annotations

import http.client
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ensemble_models
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import ForebayServer, wait_until
from tritonclient.utils import InferenceServerException

#: Runs until its client leaves, and says so; asked for a negative number it is deaf, until a file appears.
SLOW = """
import os
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        number = int(pb_utils.get_input_tensor_by_name(requests[0], "X").as_numpy()[0])
        print(f"slow {number} began", flush=True)
        if number < 0:
            while not os.path.exists(f"{pb_utils.get_model_dir()}/{-number}"):
                time.sleep(0.01)
        else:
            while not requests[0].is_cancelled():
                time.sleep(0.01)
        print(f"slow {number} ended", flush=True)
        answers = [pb_utils.Tensor("Y", pb_utils.get_input_tensor_by_name(requests[0], "X").as_numpy())]
        return [pb_utils.InferenceResponse(answers)]
"""

#: Calls it as the first number says, with the second one.
CALLING = """
import asyncio
import triton_python_backend_utils as pb_utils

MODELS = ["slow", "slow_anywhere", "slow_ensemble"]

def call(model, number):
    return pb_utils.InferenceRequest(
        model_name=model, requested_output_names=["Y"], inputs=[pb_utils.Tensor("X", number)]
    )

def report(number, response):
    error = response.error()
    print(f"call {int(number[0])} got {error.code()} {error.message()}" if error else "it ended", flush=True)

def given(requests):
    how, number = pb_utils.get_input_tensor_by_name(requests[0], "X").as_numpy().copy()
    return int(how), number.reshape(1)

def answers(requests):
    return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", given(requests)[1])])]
"""

CALLER = (
    CALLING
    + """
class TritonPythonModel:
    def execute(self, requests):
        how, number = given(requests)
        if how == 3:
            report(number, asyncio.run(self.ask(number)))
        elif how == 4:
            for response in call("slow", number).exec(decoupled=True):
                report(number, response)
        else:
            report(number, call(MODELS[how], number).exec())
        return answers(requests)

    async def ask(self, number):
        # In a task of its own.
        return (await asyncio.gather(call("slow", number).async_exec()))[0]
"""
)

AWAITING = (
    CALLING
    + """
class TritonPythonModel:
    async def execute(self, requests):
        how, number = given(requests)
        report(number, await call(MODELS[how], number).async_exec())
        return answers(requests)
"""
)

TENSORS = (
    'input [ { name: "X" data_type: TYPE_FP32 dims: [ %d ] } ] '
    'output [ { name: "Y" data_type: TYPE_FP32 dims: [ %d ] } ]'
)
INSTANCES = "instance_group [ { count: 2 kind: KIND_CPU } ]"


def write_model(repository: Path, name: str, source: str, inputs: int, outputs: int) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(textwrap.dedent(source))
    (repository / name / "config.pbtxt").write_text(f'backend: "python"\n{TENSORS % (inputs, outputs)}\n{INSTANCES}\n')


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("bls")
    write_model(repository, "slow", SLOW, 1, 1)
    write_model(repository, "slow_anywhere", SLOW, -1, -1)
    ensemble_models.write_ensemble(
        repository,
        "slow_ensemble",
        TENSORS % (1, 1),
        ensemble_models.step("slow", {"X": "X"}, {"Y": "Y"}),
        batch=0,
    )
    write_model(repository, "caller", CALLER, 2, 1)
    write_model(repository, "caller_anywhere", CALLER, -1, -1)
    write_model(repository, "awaiting", AWAITING, 2, 1)
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(repository, protocols=("http", "grpc")) as running:
        yield running


def printed(server: ForebayServer, line: str) -> None:
    try:
        wait_until(lambda: f"{line}\n" in server.stdout, f"'{line}'")
    except AssertionError as error:
        raise AssertionError(f"{error}; there is {server.stdout[-1000:]!r}") from None


def ask_and_leave(server: ForebayServer, model: str, how: int, number: int) -> None:
    """Ask over HTTP, and hang up when the model that is called runs."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port)
    tensor = {"name": "X", "datatype": "FP32", "shape": [2], "data": [how, number]}
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
    printed(server, f"slow {number} began")
    connection.close()


def grpc_inputs(how: int, number: int) -> list[Any]:
    tensor = grpcclient.InferInput("X", [2], "FP32")
    tensor.set_data_from_numpy(np.array([how, number], np.float32))
    return [tensor]


@pytest.fixture(scope="module")
def grpc_client(server: ForebayServer) -> Iterator[grpcclient.InferenceServerClient]:
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
    yield client
    client.close()


@pytest.mark.parametrize(
    ("model", "how", "number"),
    [
        ("caller", 0, 10),
        ("caller", 1, 11),
        ("caller", 2, 12),
        ("caller", 3, 13),
        ("caller", 4, 14),
        ("caller_anywhere", 0, 15),
        ("awaiting", 0, 16),
        ("awaiting", 1, 17),
    ],
    ids=["rows", "parcel", "ensemble", "asyncio", "iterator", "outer_parcel", "async_execute", "async_execute_parcel"],
)
def test_who_hangs_up_ends_what_is_called_for_him(server: ForebayServer, model: str, how: int, number: int) -> None:
    ask_and_leave(server, model, how, number)
    printed(server, f"call {number} got 7 request was cancelled")
    printed(server, f"slow {number} ended")


def test_cancelled_grpc_requests_end_what_is_called_for_them(
    server: ForebayServer, grpc_client: grpcclient.InferenceServerClient
) -> None:
    asked: Any = grpc_client.async_infer("caller", grpc_inputs(0, 20), lambda result, error: None)
    printed(server, "slow 20 began")
    asked.cancel()
    printed(server, "call 20 got 7 request was cancelled")
    printed(server, "slow 20 ended")


def test_deadline_of_a_request_ends_what_is_called_for_it(
    server: ForebayServer, grpc_client: grpcclient.InferenceServerClient
) -> None:
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        grpc_client.infer("caller", grpc_inputs(0, 30), client_timeout=2)
    printed(server, "call 30 got 7 request was cancelled")
    printed(server, "slow 30 ended")


@pytest.mark.parametrize(("how", "number"), [(0, -40), (1, -41), (3, -42), (4, -43)])
def test_caller_does_not_wait_for_a_model_that_does_not_listen(
    repository: Path, server: ForebayServer, how: int, number: int
) -> None:
    ask_and_leave(server, "caller", how, number)
    printed(server, f"call {number} got 7 request was cancelled")
    assert f"slow {number} ended" not in server.stdout
    # What the call lives in is the other model's until it ends; then both serve on.
    for model in ("slow", "slow_anywhere"):
        (repository / model / "1" / str(-number)).touch()
    printed(server, f"slow {number} ended")
    ask_and_leave(server, "caller", how, 100 - number)
    printed(server, f"call {100 - number} got 7 request was cancelled")
