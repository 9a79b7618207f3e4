"""The models of Triton's golden transcripts, in real worker processes (spec appendices E, F, G)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.repository.config import config_json, parse_config_text
from forebay.ipc.errors import Code, ServingError
from forebay.ipc.worker_messages import InstanceSpec

MODELS = Path(__file__).parents[3] / "data" / "transcript_models"


def spec_of(model: str, **overrides: Any) -> InstanceSpec:
    path = MODELS / model
    config: dict[str, Any] = {"backend": "python"}
    if (path / "config.pbtxt").exists():
        config = json.loads(config_json(parse_config_text((path / "config.pbtxt").read_text())))
    parameters = overrides.pop("parameters", {})
    spec = spec_from_config(config, model=model, model_path=str(path), model_file="model.py", **overrides)
    return InstanceSpec(**{name: getattr(spec, name) for name in spec.__struct_fields__} | {"parameters": parameters})


def ask(worker: WorkerHarness, value: float) -> Any:
    [response] = worker.infer({"IN": np.array([value], np.float32)}, id=f"i{value}")
    return response


PREFIX = "Failed to process the request(s) for model 'multi_0_0', message: "


def test_multi_answers_as_in_the_transcript() -> None:
    """E-165..E-179, E-181, E-182 (P-007..P-009); paths start at the model's directory, unlike Triton's."""
    with WorkerHarness(spec_of("multi")) as worker:
        assert ask(worker, 0).outputs["OUT"].tolist() == [0.0]
        texts = {
            1: "ValueError: bad thing\n\nAt:\n  multi/1/model.py(9): execute\n",
            2: "Expected a list in the execute return, found type '<class 'str'>'.",
            3: "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
            "InferenceRequest(s) size is:1, and InferenceResponse(s) size is:0\n",
            4: "Expected an 'InferenceResponse' object in the execute function return list, "
            "found type '<class 'int'>'.",
        }
        for value, text in texts.items():
            error = ask(worker, value).error
            assert (error.code, error.text) == (Code.INTERNAL, PREFIX + text)
        codes = [
            Code.UNKNOWN,
            Code.INTERNAL,
            Code.NOT_FOUND,
            Code.INVALID_ARG,
            Code.UNAVAILABLE,
            Code.UNSUPPORTED,
            Code.ALREADY_EXISTS,
            Code.CANCELLED,
        ]
        for value, code in enumerate(codes, 10):
            error = ask(worker, value).error
            assert (error.code, error.text) == (code, f"E{value}")
        with_parameters = ask(worker, 22)
        assert with_parameters.parameters == {"a": 1, "b": "s", "c": True}
        assert with_parameters.outputs["OUT"].tolist() == [1.0]


def test_multi_outputs_are_checked_if_the_model_says_so() -> None:
    """L-022: E-169..E-171 answered 200 in Triton."""
    with WorkerHarness(spec_of("multi", parameters={"FOREBAY_CHECK_OUTPUTS": "yes"})) as worker:
        assert ask(worker, 5).error.text == "model 'multi' did not produce output 'OUT'"
        assert ask(worker, 6).error.text == "model 'multi' did not produce output 'OUT', but 'ZZ'"
        assert ask(worker, 7).error.text == (
            "model 'multi' produced output 'OUT' as INT8 [2, 2], but its configuration promises FP32 [-1]"
        )


def test_multi_outputs_are_not_checked() -> None:
    """E-169..E-171 as they are (spec P-017, P-019)."""
    with WorkerHarness(spec_of("multi")) as worker:
        for value in (5, 6):
            response = ask(worker, value)
            assert (response.error, response.outputs) == (None, {})
        response = ask(worker, 7)
        assert response.datatypes == {"OUT": "INT8"}
        assert response.outputs["OUT"].tolist() == [[1, 1], [1, 1]]


def test_multi_without_a_scheduler_refuses_nested_calls_clearly() -> None:
    with WorkerHarness(spec_of("multi")) as worker:
        error = ask(worker, 20).error
        assert error.text.startswith("Model nope - Error when running inference: ")


def test_multi_that_exits_ends_only_its_worker() -> None:
    """E-189."""
    with WorkerHarness(spec_of("multi")) as worker:
        worker.submit({"IN": np.array([23], np.float32)})
        assert worker.process.wait(30) == 1


def test_model_without_execute_loads_and_fails_each_request() -> None:
    """E-183."""
    with WorkerHarness(spec_of("noexec")) as worker:
        error = ask(worker, 1).error
        assert error.text == (
            "Failed to process the request(s) for model 'noexec_0_0', message: "
            "Python model noexec/1/model.py does not implement `execute` method."
        )


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("initfail", "RuntimeError: no init\n\nAt:\n  initfail/1/model.py(5): initialize\n"),
        ("syntax", "SyntaxError: invalid syntax (model.py, line 1)"),
    ],
)
def test_models_that_do_not_load_say_why(model: str, text: str) -> None:
    """E-161, P-005."""
    with pytest.raises(ServingError) as caught, WorkerHarness(spec_of(model)):
        pass
    assert (caught.value.code, caught.value.text) == (Code.INTERNAL, text)


def test_echo_joins_a_batch_and_keeps_the_model_s_error_codes() -> None:
    """E-185: the step error keeps its code; other requests of the batch succeed."""
    with WorkerHarness(spec_of("echo")) as worker:
        tokens = worker.submit(*({"IN": np.array([[value]], np.float32)} for value in (1, 98, 3)))
        answers = {response.token: response for response in worker.responses(*tokens)}
        assert answers[tokens[0]].outputs["OUT"].tolist() == [[1.0]]
        error = answers[tokens[1]].error
        assert error is not None
        assert (error.code, error.text) == (Code.UNAVAILABLE, "step err")
        assert answers[tokens[2]].outputs["OUT"].tolist() == [[3.0]]


def test_decoupled_model_sends_its_responses_in_order() -> None:
    """E-022, E-023, F2-31..35: n responses, an empty final one; an error that is final."""
    with WorkerHarness(spec_of("dec")) as worker:
        [token] = worker.submit({"IN": np.array([3], np.float32)}, parameters={"z": 1.5, "b": True})
        responses = worker.responses(token)
        assert [response.outputs["OUT"].tolist() for response in responses[:3]] == [[0.0], [1.0], [2.0]]
        assert [response.index for response in responses] == [0, 1, 2, -1]
        assert [response.final for response in responses] == [False, False, False, True]
        [failed] = worker.infer({"IN": np.array([-1], np.float32)})
        assert failed.error is not None
        assert (failed.error.text, failed.final) == ("boom", True)


def test_auto_complete_sets_what_the_model_adds() -> None:
    """E-162, P-121."""
    with WorkerHarness(spec_of("auto"), load=False) as worker:
        described = worker.describe()
        tensor = {"data_type": "TYPE_FP32", "dims": [4]}
        added = {
            "input": [{"name": "IN", **tensor}],
            "output": [{"name": "OUT", **tensor}],
            "max_batch_size": 3,
            "dynamic_batching": {},
        }
        # What it does not touch stays as it was configured.
        assert dict(described.config).items() >= added.items()
