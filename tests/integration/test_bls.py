"""Python models that call other models (BLS), over real processes (spec 7.6, P-090..P-100)."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ensemble_models
import numpy as np
import pytest
import tritonclient.http as httpclient
from forebay_server import ForebayServer

DOUBLE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        tensors = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() for request in requests]
        if any((array < 0).any() for array in tensors):
            raise ValueError("negative")
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", array * 2)]) for array in tensors]
"""

COUNTING = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for number in range(int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0])):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([number], np.float32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

#: Its shapes are fixed, so requests to it live in slab rows.
STRICT = """
import json
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        array = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
        if array[0] < 0:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("negative", pb_utils.TritonError.INVALID_ARG))
        seen = json.dumps([request.request_id(), request.timeout(), request.parameters()])
        return pb_utils.InferenceResponse([pb_utils.Tensor("Y", array + 1)], parameters={"seen": seen})
"""

CALLER = """
import asyncio
import json
import threading
import numpy as np
import triton_python_backend_utils as pb_utils

def call(model, array, output="Y"):
    return pb_utils.InferenceRequest(
        model_name=model, requested_output_names=[output], inputs=[pb_utils.Tensor("X", array)]
    )

def value(response):
    return float(pb_utils.get_output_tensor_by_name(response, "Y").as_numpy()[0])

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.answer(request)]) for request in requests]

    def answer(self, request):
        what = pb_utils.get_input_tensor_by_name(request, "WHAT").as_numpy()[0].decode()
        result = getattr(self, what)()
        return pb_utils.Tensor("RESULT", np.array([json.dumps(result).encode()], dtype=object))

    def chain(self):
        array = np.array([1.5], np.float32)
        for _ in range(3):
            response = call("double", array).exec()
            array = pb_utils.get_output_tensor_by_name(response, "Y").as_numpy()
        return float(array[0])

    def gather(self):
        async def all_of_them():
            calls = [call("double", np.array([n], np.float32)).async_exec() for n in range(8)]
            return await asyncio.gather(*calls)
        responses = asyncio.run(all_of_them())
        return [value(response) for response in responses]

    def stream(self):
        responses = call("counting", np.array([4], np.float32)).exec(decoupled=True)
        return [value(response) for response in responses if response.output_tensors()]

    def thread(self):
        found = []
        worker = threading.Thread(target=lambda: found.append(self.chain()))
        worker.start()
        worker.join()
        return found[0]

    def unknown(self):
        return call("nope", np.array([1], np.float32)).exec().error().message()

    def decoupled_target(self):
        return call("counting", np.array([1], np.float32)).exec().error().message()

    def failing(self):
        return call("double", np.array([-1], np.float32)).exec().error().message()

    def wrong_input(self):
        request = pb_utils.InferenceRequest(
            model_name="double", requested_output_names=["Y"], inputs=[pb_utils.Tensor("BAD", np.zeros(1, np.float32))]
        )
        return request.exec().error().message()

    def wrong_shape(self):
        return call("double", np.zeros((2, 2), np.float32)).exec().error().message()

    def wrong_output(self):
        return call("double", np.zeros(1, np.float32), "NOPE").exec().error().message()

    def ensemble(self):
        return [value(call("four_times", np.array([n], np.float32)).exec()) for n in (1, 2)]

    def ensemble_failing(self):
        error = call("four_times", np.array([-1], np.float32)).exec().error()
        return [error.code(), error.message()]

    def ensemble_stream(self):
        responses = call("doubled_counts", np.array([3], np.float32)).exec(decoupled=True)
        return [value(response) for response in responses if response.output_tensors()]

    def ensembles_side_by_side(self):
        async def all_of_them():
            return await asyncio.gather(*(call("four_times", np.array([n], np.float32)).async_exec() for n in range(8)))
        return [value(response) for response in asyncio.run(all_of_them())]

    def errors_and_parameters(self):
        failed = call("strict", np.array([-1], np.float32)).exec()
        answer = call("strict", np.array([1], np.float32)).exec()
        return [failed.error().code(), failed.error().message(), value(answer), list(answer.parameters())]

    def ends(self):
        streams = [call("counting", np.array([count], np.float32)).exec(decoupled=True) for count in (2, 0)]
        return [[len(response.output_tensors()) for response in responses] for responses in streams]

    def refusals(self):
        tensor = pb_utils.Tensor("X", np.array([1], np.float32))
        twice, never = {"inputs": [tensor, tensor]}, {"model_version": 0}
        texts = []
        for extra in (twice, never, {"model_name": "summing", "correlation_id": 5}):
            given = {"model_name": "double", "requested_output_names": ["Y"], "inputs": [tensor], **extra}
            texts.append(pb_utils.InferenceRequest(**given).exec().error().message())
        return [text.removeprefix("Model double - ").removeprefix("Error when running inference: ") for text in texts]

    def what_is_seen(self):
        tensors = [pb_utils.Tensor("X", np.array([1], np.float32))]
        found = []
        for extra in ({}, {"request_id": "mine"}, {"timeout": 5000000}, {"parameters": {"a": 1}}):
            request = pb_utils.InferenceRequest(
                model_name="strict", requested_output_names=["Y"], inputs=tensors, **extra
            )
            found.append(json.loads(request.exec().parameters()["seen"]))
        return found

    def ready(self):
        return [pb_utils.is_model_ready("double"), pb_utils.is_model_ready("nope")]
"""


def write_model(repository: Path, name: str, source: str, tensors: str, extra: str = "") -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(textwrap.dedent(source))
    (repository / name / "config.pbtxt").write_text(f'backend: "python"\n{tensors}\n{extra}\n')


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    repository = tmp_path_factory.mktemp("bls")
    floats = (
        'input [ { name: "X" data_type: TYPE_FP32 dims: [ -1 ] } ] '
        'output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] } ]'
    )
    write_model(repository, "double", DOUBLE, floats)
    write_model(repository, "counting", COUNTING, floats, "model_transaction_policy { decoupled: true }")
    write_model(repository, "strict", STRICT, floats.replace("-1", "1"))
    write_model(repository, "summing", DOUBLE, floats, "sequence_batching { }")
    ensemble_models.write_ensemble(
        repository,
        "four_times",
        floats,
        ensemble_models.step("double", {"X": "X"}, {"Y": "half"}),
        ensemble_models.step("double", {"X": "half"}, {"Y": "Y"}),
        batch=0,
    )
    ensemble_models.write_ensemble(
        repository,
        "doubled_counts",
        floats,
        ensemble_models.step("counting", {"X": "X"}, {"Y": "count"}),
        ensemble_models.step("double", {"X": "count"}, {"Y": "Y"}),
        batch=0,
    )
    strings = (
        'input [ { name: "WHAT" data_type: TYPE_STRING dims: [ 1 ] } ] '
        'output [ { name: "RESULT" data_type: TYPE_STRING dims: [ 1 ] } ]'
    )
    write_model(repository, "caller", CALLER, strings)
    with ForebayServer(repository) as server:
        yield httpclient.InferenceServerClient(url=f"127.0.0.1:{server.http_port}")


def ask(client: Any, what: str) -> Any:
    tensor = httpclient.InferInput("WHAT", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([what.encode()], dtype=object))
    return json.loads(client.infer("caller", [tensor]).as_numpy("RESULT")[0])


def test_chain_of_three_calls_equals_direct_calls(client: Any) -> None:
    assert ask(client, "chain") == 12.0


def test_async_calls_run_side_by_side(client: Any) -> None:
    assert ask(client, "gather") == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]


def test_decoupled_target_gives_every_response(client: Any) -> None:
    assert ask(client, "stream") == [0.0, 1.0, 2.0, 3.0]


def test_end_of_a_stream_is_a_response_without_outputs(client: Any) -> None:
    """As in Triton 2.51, where models look whether a response has outputs."""
    assert ask(client, "ends") == [[1, 1, 0], [0]]


def test_refusals_have_triton_s_words(client: Any) -> None:
    """P-093: what the request is refused for before it runs, by the queue of a sequence model too."""
    assert ask(client, "refusals") == [
        "[request id: <id_unknown>] input 'X' already exists in request",
        "Failed for execute the inference request. Model 'double' is not ready.",
        "Model summing - Error when running inference: inference request for sequence 5 to model 'summing' must "
        "specify the START flag on the first request of the sequence",
    ]


def test_calls_from_a_background_thread(client: Any) -> None:
    assert ask(client, "thread") == 12.0


def test_errors_and_parameters_of_single_requests_come_with_the_answer(client: Any) -> None:
    """P-071, P-072: of a model whose requests live in slab rows, too."""
    assert ask(client, "errors_and_parameters") == [3, "negative", 2.0, ["seen"]]


def test_model_sees_what_a_request_carries_besides_tensors(client: Any) -> None:
    assert ask(client, "what_is_seen") == [["", 0, "{}"], ["mine", 0, "{}"], ["", 5000000, "{}"], ["", 0, '{"a":1}']]


def test_unknown_model_is_an_error_in_the_response(client: Any) -> None:
    """P-093"""
    assert ask(client, "unknown") == (
        "Model nope - Error when running inference: Failed for execute the inference request. "
        "Model 'nope' is not ready."
    )


def test_unknown_input_is_named(client: Any) -> None:
    """P-093"""
    assert ask(client, "wrong_input") == (
        "Model double - Error when running inference: unexpected inference input 'BAD' for model 'double'"
    )


def test_decoupled_target_without_decoupled_is_refused(client: Any) -> None:
    """P-093"""
    assert "is using the decoupled" in ask(client, "decoupled_target")


def test_error_of_the_other_model_comes_back(client: Any) -> None:
    assert "negative" in ask(client, "failing")


def test_readiness_of_other_models(client: Any) -> None:
    """P-098"""
    assert ask(client, "ready") == [True, False]


def test_what_does_not_fit_is_named_as_for_a_client(client: Any) -> None:
    """P-093: the texts of a request's validation."""
    prefix = "Model double - Error when running inference: "
    shape = "[request id: <id_unknown>] unexpected shape for input 'X' for model 'double'. Expected [-1], got [2,2]. "
    assert ask(client, "wrong_shape") == prefix + shape
    assert ask(client, "wrong_output") == prefix + "unexpected inference output 'NOPE' for model 'double'"


def test_ensembles_can_be_called(client: Any) -> None:
    """P-100."""
    assert ask(client, "ensemble") == [4.0, 8.0]
    assert ask(client, "ensembles_side_by_side") == [4.0 * n for n in range(8)]
    assert ask(client, "ensemble_stream") == [0.0, 2.0, 4.0]


def test_an_ensembles_error_keeps_code_and_text(client: Any) -> None:
    code, text = ask(client, "ensemble_failing")
    assert text.startswith("in ensemble 'four_times', ")
    assert "negative" in text
    assert code == 1


def test_called_models_record_their_own_statistics(client: Any) -> None:
    """P-101."""

    def successes(model: str) -> int:
        statistics = client.get_inference_statistics(model)["model_stats"][0]["inference_stats"]
        count: int = statistics["success"]["count"]
        return count

    # What nested calls count is looked at ten times a second; those of earlier tests are to be in.
    time.sleep(0.5)
    before = {model: successes(model) for model in ("double", "four_times", "caller")}
    ask(client, "chain")
    ask(client, "ensemble")
    grown = {"double": 3 + 2 * 2, "four_times": 2, "caller": 2}
    give_up = time.monotonic() + 20
    while (found := {model: successes(model) - count for model, count in before.items()}) != grown:
        assert time.monotonic() < give_up, found
        time.sleep(0.02)
