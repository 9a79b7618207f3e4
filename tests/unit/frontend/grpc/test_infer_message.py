"""Walking inference messages, against protobuf's own reading of them (spec G-030..G-052)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from forebay.frontend.codec.infer_request import BinaryData, JsonData, RegionData
from forebay.frontend.grpc.infer_message import Choice, read_request, walk_request
from forebay.frontend.grpc.infer_reply import ReplyTensor, identity_fields, render_reply, stream_error, stream_reply
from forebay.frontend.grpc.wire import Malformed, unpack_varints, varint
from forebay.ipc.errors import InvalidArgument


def message(**fields: Any) -> Any:
    """Return a request with one FP32 input X of shape [2]."""
    made = pb.ModelInferRequest(model_name="m", **fields)
    made.inputs.add(name="X", datatype="FP32", shape=[2])
    return made


def read(made: Any) -> Any:
    data = memoryview(made.SerializeToString())
    return read_request(walk_request(data), data)


def parameter(**choice: Any) -> Any:
    return pb.InferParameter(**choice)


PARAMETERS = st.one_of(
    st.booleans().map(lambda value: parameter(bool_param=value)),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: parameter(int64_param=value)),
    st.text(max_size=10).map(lambda value: parameter(string_param=value)),
    st.floats(allow_nan=False).map(lambda value: parameter(double_param=value)),
    st.integers(0, 2**64 - 1).map(lambda value: parameter(uint64_param=value)),
)


@given(
    st.text(max_size=200),
    st.text(max_size=5),
    st.text(max_size=200),
    st.dictionaries(st.text(max_size=8), PARAMETERS, max_size=5),
    st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)), max_size=4),
    st.lists(st.binary(max_size=300), max_size=4),
)
def test_every_field_is_read_as_protobuf_reads_it(
    name: str, version: str, identity: str, parameters: Any, inputs: Any, raw: list[bytes]
) -> None:
    made = pb.ModelInferRequest(model_name=name, model_version=version, id=identity, raw_input_contents=raw)
    for key, value in parameters.items():
        made.parameters[key].CopyFrom(value)
    for tensor, shape in inputs:
        made.inputs.add(name=tensor, datatype="FP32", shape=shape)
    data = memoryview(made.SerializeToString())
    wire = walk_request(data)
    assert (wire.model_name, wire.model_version, wire.id) == (name, version, identity)
    assert {key: (found.choice.name, found.value) for key, found in wire.parameters.items()} == {
        key: (
            value.WhichOneof("parameter_choice").removesuffix("_param").upper(),
            getattr(value, value.WhichOneof("parameter_choice")),
        )
        for key, value in parameters.items()
    }
    assert [(tensor.name, list(tensor.shape)) for tensor in wire.inputs] == inputs
    assert [bytes(data[start:end]) for start, end in wire.raw] == raw
    assert wire.is_plain


def test_random_bytes_are_refused_or_read_as_protobuf_does() -> None:
    """No input may crash the walk; what protobuf takes, the walk takes."""
    chance = random.Random(3)
    good = message(id="id", raw_input_contents=[bytes(8)], parameters={"a": parameter(int64_param=-1)})
    for _ in range(3000):
        data = bytearray(good.SerializeToString())
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            theirs = pb.ModelInferRequest.FromString(bytes(data))
        except DecodeError:
            theirs = None
        try:
            ours = walk_request(memoryview(bytes(data)))
        except Malformed:
            assert theirs is None
            continue
        assert theirs is not None
        assert ours.model_name == theirs.model_name
        assert ours.id == theirs.id


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False, True]),
        ("INT8", "int_contents", [-1, 127, -128]),
        ("INT16", "int_contents", [-1, 32767, -32768]),
        ("INT32", "int_contents", [-1, 2**31 - 1, -(2**31)]),
        ("INT64", "int64_contents", [-1, 2**63 - 1, -(2**63)]),
        ("UINT8", "uint_contents", [0, 255, 7]),
        ("UINT16", "uint_contents", [0, 65535, 7]),
        ("UINT32", "uint_contents", [0, 2**32 - 1, 7]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1, 7]),
        ("FP32", "fp32_contents", [0.5, -1.0, 3.0]),
        ("FP64", "fp64_contents", [0.5, -1.0, 3.0]),
    ],
)
def test_typed_contents(datatype: str, field: str, values: list[Any]) -> None:
    """Spec G-034, D-009."""
    made = message()
    made.inputs[0].datatype = datatype
    getattr(made.inputs[0].contents, field).extend(values)
    (tensor,) = read(made).request.inputs
    assert isinstance(tensor.source, JsonData)
    name = datatype.lower().replace("fp", "float")
    assert tensor.source.data == np.array(values, dtype=name).tobytes()


def test_typed_narrowing_is_silent() -> None:
    """Spec D-009."""
    made = message()
    made.inputs[0].datatype = "INT8"
    made.inputs[0].contents.int_contents.append(300)
    assert read(made).request.inputs[0].source.data == b"\x2c"


def test_typed_strings() -> None:
    made = message()
    made.inputs[0].datatype = "BYTES"
    made.inputs[0].contents.bytes_contents.extend([b"ab", b""])
    assert read(made).request.inputs[0].source.data == b"\2\0\0\0ab\0\0\0\0"


def test_raw_contents_go_to_the_inputs_that_have_no_other_data() -> None:
    """Spec G-038: an input in a region takes no entry."""
    made = message(raw_input_contents=[b"12345678"])
    tensor = made.inputs[0]
    tensor.name = "R"
    tensor.parameters["shared_memory_region"].string_param = "region"
    tensor.parameters["shared_memory_byte_size"].int64_param = 8
    tensor.parameters["shared_memory_offset"].int64_param = 16
    made.inputs.add(name="X", datatype="FP32", shape=[2])
    first, second = read(made).request.inputs
    assert first.source == RegionData(region="region", byte_size=8, offset=16)
    assert isinstance(second.source, BinaryData)
    assert second.source.body_bytes == 8


def test_request_parameters() -> None:
    """Spec G-050, G-052."""
    found = read(
        message(
            raw_input_contents=[bytes(8)],
            parameters={
                "sequence_id": parameter(int64_param=7),
                "sequence_start": parameter(bool_param=True),
                "priority": parameter(uint64_param=3),
                "timeout": parameter(int64_param=99),
                "triton_enable_empty_final_response": parameter(bool_param=True),
                "mine": parameter(double_param=0.5),
            },
        )
    )
    request = found.request
    assert (request.sequence_id, request.sequence_start, request.sequence_end) == (7, True, False)
    assert (request.priority, request.timeout_us, request.parameters) == (3, 99, {"mine": 0.5})
    assert found.enable_empty_final
    assert read(message(raw_input_contents=[bytes(8)], parameters={"sequence_id": parameter(string_param="s")}))


REGION = "shared_memory_region"
SIZE = "shared_memory_byte_size"
OFFSET = "shared_memory_offset"
EMPTY_FINAL = "triton_enable_empty_final_response"


def wrong(key: str, expected: str) -> str:
    return f"invalid value type for '{key}' parameter, expected {expected}."


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"sequence_start": parameter(int64_param=1)}, wrong("sequence_start", "bool_param")),
        ({"priority": parameter(int64_param=-1)}, "invalid value for 'priority', expected value >= 0."),
        ({"priority": parameter(string_param="")}, wrong("priority", "int64_param or uint64_param")),
        ({"timeout": parameter(uint64_param=1)}, wrong("timeout", "int64_param")),
        (
            {"mine": parameter(uint64_param=1)},
            wrong("mine", "int64_param, bool_param, or string_param"),
        ),
        ({EMPTY_FINAL: parameter(int64_param=1)}, wrong(EMPTY_FINAL, "bool_param")),
    ],
)
def test_wrong_request_parameters(parameters: Any, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(message(raw_input_contents=[bytes(8)], parameters=parameters))
    assert caught.value.text == text


def wrong_region(key: str, expected: str) -> str:
    return f"invalid value type for '{key}' parameter for tensor 'X', expected {expected}."


def without_region(key: str) -> str:
    return f"'{key}' can not be specified without 'shared_memory_region' parameter for tensor 'X'"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({REGION: parameter(int64_param=1)}, wrong_region(REGION, "string_param")),
        (
            {REGION: parameter(string_param="r")},
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor 'X'",
        ),
        ({SIZE: parameter(int64_param=1)}, without_region(SIZE)),
        ({OFFSET: parameter(int64_param=1)}, without_region(OFFSET)),
        (
            {REGION: parameter(string_param="r"), SIZE: parameter(bool_param=True)},
            wrong_region(SIZE, "int64_param"),
        ),
    ],
)
def test_wrong_regions(parameters: Any, text: str) -> None:
    """Spec G-046."""
    made = message()
    for key, value in parameters.items():
        made.inputs[0].parameters[key].CopyFrom(value)
    with pytest.raises(InvalidArgument) as caught:
        read(made)
    assert caught.value.text == text


def test_classification() -> None:
    """Spec G-045."""
    made = message(raw_input_contents=[bytes(8)])
    made.outputs.add(name="Y").parameters["classification"].int64_param = 2
    assert read(made).request.outputs[0].classification == 2
    made.outputs[0].parameters["classification"].int64_param = 0
    with pytest.raises(InvalidArgument, match="invalid value for 'classification' parameter, expected >= 0"):
        read(made)
    made.outputs[0].parameters["classification"].string_param = "1"
    with pytest.raises(InvalidArgument, match="invalid value type for 'classification' parameter, expected int64_para"):
        read(made)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_packed_numbers(values: list[int]) -> None:
    assert unpack_varints(b"".join(map(varint, values))).tolist() == values


@pytest.mark.parametrize("data", [b"\x80", b"\xff" * 11 + b"\1"])
def test_broken_packed_numbers(data: bytes) -> None:
    with pytest.raises(Malformed):
        unpack_varints(data)


def test_replies_are_what_protobuf_reads() -> None:
    """Spec G-033, G-043, G-053: an entry for every output, empty ones too."""
    outputs = [
        ReplyTensor("A", "FP32", (2, 1), memoryview(bytes(8))),
        ReplyTensor("B", "BYTES", (), b""),
        ReplyTensor("C", "INT64", (2**40, 0), b"x" * 200),
    ]
    parameters = {"i": -5, "b": False, "s": "text", "d": 0.0, "t": True, "e": ""}
    pieces = render_reply(identity_fields("m", "3", "id"), parameters, outputs)
    reply = pb.ModelInferResponse.FromString(b"".join(pieces))
    assert (reply.model_name, reply.model_version, reply.id) == ("m", "3", "id")
    assert [(out.name, out.datatype, tuple(out.shape)) for out in reply.outputs] == [
        (out.name, out.datatype, out.shape) for out in outputs
    ]
    assert list(reply.raw_output_contents) == [bytes(out.data) for out in outputs]
    assert {
        key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in reply.parameters.items()
    } == parameters
    wrapped, size = stream_reply(pieces, sum(map(len, pieces)))
    streamed = pb.ModelStreamInferResponse.FromString(b"".join(wrapped))
    assert streamed.infer_response == reply
    assert size == sum(map(len, wrapped))
    failed = pb.ModelStreamInferResponse.FromString(stream_error("bad", identity_fields("", "", "k")))
    assert (failed.error_message, failed.infer_response.id) == ("bad", "k")


def test_choice_numbers_are_the_fields() -> None:
    """Spec G-035."""
    numbers = {field.name: field.number for field in pb.InferParameter.DESCRIPTOR.fields}
    assert {choice.name: int(choice) for choice in Choice if choice} == {
        name.removesuffix("_param").upper(): number for name, number in numbers.items()
    }
