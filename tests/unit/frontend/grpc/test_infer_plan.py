"""Plans find the messages that they were made for, and no others."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from forebay.frontend.grpc.infer_message import read_request, walk_request
from forebay.frontend.grpc.infer_plan import InferPlan, PlanBook, RowsRoute, make_plan
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec

ENTRY = ModelEntry(
    name="m",
    version=3,
    state="READY",
    max_batch_size=8,
    inputs=(TensorSpec("A", "FP32", (4,)), TensorSpec("B", "INT64", (2,))),
    outputs=(TensorSpec("X", "FP32", (1,)), TensorSpec("Y", "FP32", (3,))),
)


class Route:
    """What a plan asks of a route."""

    def __init__(self) -> None:
        self.input_indices = {"A": 0, "B": 1}
        self.output_indices = {"X": 0, "Y": 1}
        self.output_specs = ENTRY.outputs
        self.reply_parameters: dict[str, Any] = {}
        self.sees_requests = False


def message(request_id: str = "", *, rows: int = 2, fill: int = 1, **fields: Any) -> Any:
    tensors = [np.full((rows, 4), fill, np.float32).tobytes(), np.full((rows, 2), fill, np.int64).tobytes()]
    made = pb.ModelInferRequest(model_name="m", id=request_id, raw_input_contents=tensors, **fields)
    made.inputs.add(name="A", datatype="FP32", shape=[rows, 4])
    made.inputs.add(name="B", datatype="INT64", shape=[rows, 2])
    return made


def encode(made: Any) -> memoryview:
    return memoryview(made.SerializeToString())


def remember(book: PlanBook, made: Any, rows: int = 2) -> InferPlan | None:
    """Do what the general path does with a message that it has checked."""
    data = encode(made)
    wire = walk_request(data)
    request = read_request(wire, data).request
    plan = make_plan(cast(RowsRoute, Route()), ENTRY, wire, data, request, rows)
    if plan is not None:
        book.remember(data, wire, plan)
    return plan


@pytest.fixture
def book() -> PlanBook:
    made = PlanBook()
    assert remember(made, message("first")) is not None
    return made


@pytest.mark.parametrize("request_id", ["", "first", "another", "x" * 100])
def test_a_message_is_found_whatever_its_id_and_tensors(book: PlanBook, request_id: str) -> None:
    data = encode(message(request_id, fill=7))
    found = book.find(data)
    assert found is not None
    plan, id_field, begin = found
    assert id_field == (b"\x1a" + bytes((len(request_id),)) + request_id.encode() if request_id else b"")
    pieces = [bytes(data[begin + start : begin + end]) for start, end, _index in plan.copies]
    assert pieces == list(message(fill=7).raw_input_contents)
    assert [index for _start, _end, index in plan.copies] == [0, 1]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(message(rows=3), id="other shape"),
        pytest.param(message(model_version="3"), id="other version"),
        pytest.param(message(parameters={"a": pb.InferParameter(int64_param=1)}), id="parameters"),
        pytest.param(message("ü"), id="an id that is not plain"),
        pytest.param(message("x" * 200), id="a long id"),
        pytest.param(pb.ModelInferRequest(), id="empty"),
        pytest.param(pb.ModelInferRequest(model_name="m"), id="only a name"),
    ],
)
def test_other_messages_are_not_found(book: PlanBook, other: Any) -> None:
    assert book.find(encode(other)) is None


def test_bytes_between_tensors_must_be_the_same(book: PlanBook) -> None:
    data = bytearray(message().SerializeToString())
    found = book.find(memoryview(bytes(data)))
    assert found is not None
    plan, _id_field, begin = found
    (offset, between), *_ = plan.checks
    assert between == b"\x3a\x20"
    data[begin + offset + 1] ^= 1
    assert book.find(memoryview(bytes(data))) is None


def test_cut_messages_are_not_found(book: PlanBook) -> None:
    data = encode(message("abc"))
    assert all(book.find(data[:length]) is None for length in range(len(data)))


def test_the_reply_is_complete() -> None:
    book = PlanBook()
    plan = remember(book, message("abc"))
    assert plan is not None
    id_field = b"\x1a\x03abc"
    first, second = np.arange(2, dtype=np.float32).tobytes(), np.arange(6, dtype=np.float32).tobytes()
    pieces = [plan.reply_head, id_field, plan.reply_tail, first, plan.outputs[1][0], second]
    assert sum(map(len, pieces)) == plan.reply_bytes + len(id_field)
    reply = pb.ModelInferResponse.FromString(b"".join(pieces))
    assert (reply.model_name, reply.model_version, reply.id) == ("m", "3", "abc")
    assert [(out.name, list(out.shape)) for out in reply.outputs] == [("X", [2, 1]), ("Y", [2, 3])]
    assert list(reply.raw_output_contents) == [first, second]
    assert plan.tensor_bytes == len(first) + len(second)
    streamed = pb.ModelInferResponse.FromString(b"".join([plan.reply_head, id_field, plan.stream_tail, *pieces[3:]]))
    assert streamed.parameters["triton_final_response"].bool_param


def with_region() -> Any:
    made = message()
    made.outputs.add(name="X").parameters["shared_memory_region"].string_param = "r"
    made.outputs[0].parameters["shared_memory_byte_size"].int64_param = 8
    return made


def with_classes() -> Any:
    made = message()
    made.outputs.add(name="X").parameters["classification"].int64_param = 1
    return made


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(message(parameters={"sequence_id": pb.InferParameter(int64_param=1)}), id="sequence"),
        pytest.param(with_region(), id="region"),
        pytest.param(with_classes(), id="classification"),
    ],
)
def test_requests_that_are_no_routine_get_no_plan(made: Any) -> None:
    assert remember(PlanBook(), made) is None


def test_a_second_id_is_no_plan() -> None:
    """Of two ids the last counts, and a plan would answer with the first."""
    book = PlanBook()
    data = encode(message("one"))
    twice = bytes(data[:3]) + b"\x1a\x03two" + bytes(data[3:])
    wire = walk_request(memoryview(twice))
    assert wire.id == "one"
    request = read_request(wire, memoryview(twice)).request
    plan = make_plan(cast(RowsRoute, Route()), ENTRY, wire, memoryview(twice), request, 2)
    assert plan is not None
    book.remember(memoryview(twice), wire, plan)
    assert book.find(memoryview(twice)) is None


def test_plans_are_forgotten(book: PlanBook) -> None:
    book.clear()
    assert book.find(encode(message())) is None
