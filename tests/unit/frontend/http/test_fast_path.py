"""Which requests get a plan, and what is in it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.frontend.codec.infer_request import ParsedInfer, decode_infer_request
from forebay.frontend.http.fast_path import InferPlan, make_plan
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec

ENTRY = ModelEntry(
    name="m",
    version=3,
    state="READY",
    max_batch_size=8,
    inputs=(TensorSpec("A", "FP32", (2,)), TensorSpec("B", "INT8", (1,))),
    outputs=(TensorSpec("X", "FP32", (1,)), TensorSpec("Y", "INT64", (2,))),
)


def request(**changes: Any) -> tuple[ParsedInfer, int]:
    """Return a request of two rows and the bytes of its JSON; input B comes first in the body."""
    document: dict[str, Any] = {
        "id": "r",
        "inputs": [
            {"name": "B", "datatype": "INT8", "shape": [2, 1], "parameters": {"binary_data_size": 2}},
            {"name": "A", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
        ],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document | changes).encode()
    return decode_infer_request(ENTRY, head + bytes(18), len(head), max_json_bytes=10_000), len(head)


def plan(parsed: ParsedInfer) -> InferPlan | None:
    route: Any = SimpleNamespace(
        input_indices={"A": 0, "B": 1},
        output_indices={"X": 0, "Y": 1},
        output_specs=ENTRY.outputs,
        reply_parameters={},
    )
    return make_plan(route, ENTRY, parsed, 2, b"Connection: keep-alive\r\n")


def test_where_bytes_go_and_what_is_answered() -> None:
    parsed, start = request()
    made = plan(parsed)
    assert made is not None
    assert made.copies == ((start, start + 2, 1), (start + 2, start + 18, 0))
    assert (made.copied_bytes, made.rows, made.outputs) == (18, 2, (0, 1))
    head, _, body = made.reply_head.partition(b"\r\n\r\n")
    assert b"\r\nConnection: keep-alive\r\n" in head
    document = json.loads(body)
    assert (document["id"], document["model_version"]) == ("r", "3")
    assert [(entry["shape"], entry["parameters"]["binary_data_size"]) for entry in document["outputs"]] == [
        ([2, 1], 8),
        ([2, 2], 32),
    ]
    length = int(head.split(b"Content-Length: ")[-1].split(b"\r\n")[0])
    assert length == len(body) + 40


def test_only_the_outputs_that_were_asked_for_in_the_order_of_the_model() -> None:
    """H-095."""
    wanted = [{"name": "Y", "parameters": {"binary_data": True}}, {"name": "X", "parameters": {"binary_data": True}}]
    made = plan(request(outputs=wanted)[0])
    assert made is not None
    assert made.outputs == (0, 1)
    made = plan(request(outputs=wanted[:1])[0])
    assert made is not None
    assert made.outputs == (1,)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {}},  # outputs as JSON
        {"outputs": [{"name": "X"}]},
        {"outputs": [{"name": "X", "parameters": {"binary_data": True, "classification": 1}}]},
        {"outputs": [{"name": "X", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}]},
        {"parameters": {"binary_data_output": True, "sequence_id": 7}},
        {
            "inputs": [
                {"name": "B", "datatype": "INT8", "shape": [2, 1], "data": [1, 2]},
                {"name": "A", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 18}},
            ]
        },
        {
            "inputs": [
                {
                    "name": "B",
                    "datatype": "INT8",
                    "shape": [2, 1],
                    "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 2},
                },
                {"name": "A", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 18}},
            ]
        },
    ],
)
def test_requests_without_a_plan(changes: dict[str, Any]) -> None:
    assert plan(request(**changes)[0]) is None


def test_queue_parameters_travel() -> None:
    made = plan(request(parameters={"binary_data_output": True, "priority": 2, "timeout": 500})[0])
    assert made is not None
    assert (made.priority, made.timeout_us) == (2, 500)
