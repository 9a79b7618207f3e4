"""The repeat and square backends in real worker processes (spec B-083)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.ipc.errors import Code, InvalidArgument, ServingError
from forebay.ipc.worker_messages import InstanceSpec


def tensor(name: str, data_type: str, *dims: int) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": list(dims)}


def spec_of(backend: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], **fields: Any) -> InstanceSpec:
    config = {
        "backend": backend,
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": inputs,
        "output": outputs,
        **fields,
    }
    return spec_from_config(config, model="m", model_path="/nowhere")


def repeat(**changes: dict[str, Any]) -> InstanceSpec:
    """Return the repeat backend's model; ``changes``: tensors in the place of those that it needs."""
    tensors = {
        "IN": tensor("IN", "TYPE_INT32", -1),
        "DELAY": tensor("DELAY", "TYPE_UINT32", -1),
        "WAIT": tensor("WAIT", "TYPE_UINT32", 1),
        "OUT": tensor("OUT", "TYPE_INT32", 1),
        "IDX": tensor("IDX", "TYPE_UINT32", 1),
    } | changes
    return spec_of("repeat", [tensors[name] for name in ("IN", "DELAY", "WAIT")], [tensors["OUT"], tensors["IDX"]])


def square(max_batch_size: int = 0, **parameters: int) -> InstanceSpec:
    return spec_of(
        "square",
        [tensor("IN", "TYPE_INT32", 1)],
        [tensor("OUT", "TYPE_INT32", 1)],
        max_batch_size=max_batch_size,
        parameters={key: {"string_value": str(value)} for key, value in parameters.items()},
    )


def repeat_inputs(values: list[int], delays_ms: list[int], wait_ms: int = 0) -> dict[str, Any]:
    return {
        "IN": np.array(values, np.int32),
        "DELAY": np.array(delays_ms, np.uint32),
        "WAIT": np.array([wait_ms], np.uint32),
    }


def test_repeat_answers_once_for_each_element_in_order() -> None:
    with WorkerHarness(repeat()) as worker:
        responses = worker.infer(repeat_inputs([4, -2, 0], [1, 20, 0], 2))
        sent = [response for response in responses if response.outputs]
        assert [int(response.outputs["OUT"][0]) for response in sent] == [4, -2, 0]
        assert [int(response.outputs["IDX"][0]) for response in sent] == [0, 1, 2]
        assert [response.error for response in responses] == [None] * len(responses)
        assert {response.datatypes["IDX"] for response in sent} == {"UINT32"}


def test_repeat_of_nothing_ends_without_a_response() -> None:
    with WorkerHarness(repeat()) as worker:
        assert worker.infer(repeat_inputs([], [])) == []


def test_repeat_sends_what_was_asked_for() -> None:
    with WorkerHarness(repeat()) as worker:
        first, *_ = worker.infer(repeat_inputs([7], [0]), outputs=("IDX",))
        assert list(first.outputs) == ["IDX"]


def test_repeat_refuses_lengths_that_differ() -> None:
    with WorkerHarness(repeat()) as worker:
        (failed,) = worker.infer(repeat_inputs([1, 2], [0]))
        assert failed.error is not None
        assert (failed.error.code, failed.error.text) == (
            Code.INVALID_ARG,
            "expected IN and DELAY shape to match, got [2] and [1]",
        )


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (repeat(IN=tensor("X", "TYPE_INT32", -1)), "expected first input tensor name to be IN, got X"),
        (repeat(IDX=tensor("Y", "TYPE_UINT32", 1)), "expected second output tensor name to be IDX, got Y"),
        (repeat(IN=tensor("IN", "TYPE_INT32", 2, 2)), "expected IN shape to have one dimension, got [2,2]"),
        (repeat(IN=tensor("IN", "TYPE_INT32", 3)), "expected IN and DELAY shape to match, got [3] and [-1]"),
        (repeat(WAIT=tensor("WAIT", "TYPE_UINT32", -1)), "expected WAIT shape to be [1], got [-1]"),
        (repeat(DELAY=tensor("DELAY", "TYPE_INT32", -1)), "expected DELAY datatype to be UINT32, got TYPE_INT32"),
        (repeat(OUT=tensor("OUT", "TYPE_STRING", 1)), "expected OUT datatype to be INT32, got TYPE_STRING"),
        (spec_of("repeat", [], []), "expected 3 inputs, got 0"),
        (spec_of("square", [], []), "expected 1 input, got 0"),
        (
            spec_of("square", [tensor("A", "TYPE_INT32", 1)], [tensor("OUT", "TYPE_INT32", 1)]),
            "expected first input tensor name to be IN, got A",
        ),
    ],
)
def test_models_of_other_tensors_are_refused_with_triton_s_texts(spec: InstanceSpec, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught, WorkerHarness(spec):
        pass
    assert caught.value.text == text


@pytest.mark.parametrize(("max_batch_size", "shape"), [(0, (1,)), (4, (1, 1))])
def test_square_answers_as_often_as_it_is_told(max_batch_size: int, shape: tuple[int, ...]) -> None:
    with WorkerHarness(square(max_batch_size)) as worker:
        responses = worker.infer({"IN": np.full(shape, 3, np.int32)})
        sent = [response.outputs["OUT"] for response in responses if response.outputs]
        assert [(array.shape, int(array.flat[0])) for array in sent] == [(shape, 3)] * 3


def test_square_fails_and_leaves_out_responses_on_request() -> None:
    with WorkerHarness(square(CUSTOM_FAIL_COUNT=2, CUSTOM_EMPTY_COUNT=1, CUSTOM_INFER_DELAY_NS=1000)) as worker:
        responses = worker.infer({"IN": np.array([5], np.int32)})
        errors: list[ServingError | None] = [response.error for response in responses]
        assert len([response for response in responses if response.outputs]) == 2
        assert [error.text for error in errors if error is not None] == ["simulated failure"] * 2
