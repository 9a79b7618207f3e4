"""Requests as typed values (spec H-060..H-081, H-110..H-119, H-130..H-134, H-150..H-157, H-197, H-198, H-203)."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec.infer_request import (
    BinaryData,
    JsonData,
    ParsedOutput,
    RegionData,
    decode_infer_request,
    parse_header_length,
    parse_infer_request,
    raw_infer_request,
)
from forebay.frontend.codec.validation import validate_infer
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import Internal, InvalidArgument, ServingError
from forebay.ipc.tensor import TensorSpec

LIMIT = 1 << 20
TENSOR = {"name": "IN0", "datatype": "FP32", "shape": [2], "data": [1, 2]}


def parse(document, tail=b"", header_length=None):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_infer_request(text + tail, header_length or len(text), model_name="m", max_json_bytes=LIMIT)


def fault(kind, document, tail=b""):
    with pytest.raises(kind) as caught:
        parse(document, tail)
    return caught.value.text


def request(**members):
    return {"inputs": [TENSOR], **members}


def binary(name, byte_size, shape=(2,)):
    return {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": byte_size}}


def test_everything_a_request_may_say():
    parsed = parse(
        request(
            id="r1",
            junk={"ignored": [1]},
            parameters={
                "sequence_id": 7,
                "sequence_start": True,
                "sequence_end": False,
                "priority": 2,
                "timeout": 1000,
                "binary_data_output": True,
                "custom": "x",
                "n": -5,
                "big": 2**63,
                "flag": True,
                "ratio": 0.5,
            },
            outputs=[
                {"name": "A", "parameters": {"binary_data": True, "classification": 3, "zz": 1}},
                {"name": "B"},
                {"name": "A"},
                {
                    "name": "C",
                    "parameters": {
                        "shared_memory_region": "r",
                        "shared_memory_byte_size": 8,
                        "shared_memory_offset": 4,
                        "binary_data": False,
                    },
                },
            ],
        )
    )
    assert (parsed.id, parsed.sequence_id, parsed.sequence_start, parsed.sequence_end) == ("r1", 7, True, False)
    assert (parsed.priority, parsed.timeout_us, parsed.binary_data_output) == (2, 1000, True)
    assert parsed.parameters == {"custom": "x", "n": -5, "big": 2.0**63, "flag": True, "ratio": 0.5}
    assert isinstance(parsed.parameters["big"], float)
    assert isinstance(parsed.parameters["flag"], bool)
    assert parsed.outputs == (
        ParsedOutput("A", binary=True, classification=3),
        ParsedOutput("B"),
        ParsedOutput("C", region=RegionData("r", byte_size=8, offset=4)),
    )
    assert parse(request(outputs=[])).outputs == ()


def test_sequence_ids_are_numbers_or_strings():
    """Spec H-150."""
    assert parse(request(parameters={"sequence_id": "s7"})).sequence_id == "s7"
    assert parse(request(parameters={"sequence_id": 0})).sequence_id == 0
    assert parse(request(parameters={"sequence_id": ""})).sequence_id == ""


def test_sources():
    """Spec H-117: JSON, binary and regions mixed; binary tensors lie behind the JSON in order."""
    document = {
        "inputs": [
            binary("A", 8),
            TENSOR,
            binary("B", 4, [1]),
            binary("E", 0, [0]),
            {
                "name": "R",
                "datatype": "FP32",
                "shape": [2],
                "parameters": {"shared_memory_region": "x", "shared_memory_byte_size": 8},
            },
        ]
    }
    start = len(json.dumps(document))
    parsed = parse(document, b"\0" * 12)
    assert [tensor.source for tensor in parsed.inputs] == [
        BinaryData(start, 8),
        JsonData(b"\0\0\x80\x3f\0\0\0\x40"),
        BinaryData(start + 8, 4),
        BinaryData(start + 12, 0),
        RegionData("x", byte_size=8, offset=0),
    ]
    assert [tensor.source.byte_size for tensor in parsed.inputs] == [8, 8, 4, 0, 8]


def test_binary_bytes_must_add_up():
    """Spec H-113..H-115."""
    document = {"inputs": [binary("IN0", 8)]}
    short = "unexpected size for input 'IN0', expecting 2 additional bytes for model 'm'"
    assert fault(InvalidArgument, document, b"\0" * 6) == short
    assert fault(InvalidArgument, document, b"\0" * 9) == "unexpected additional input data for model 'm'"
    body = json.dumps(document).encode() + b"\0" * 8
    with pytest.raises(InvalidArgument, match=r"^unexpected size for input 'IN0', expecting 8 additional bytes"):
        parse_infer_request(body, None, model_name="m", max_json_bytes=LIMIT)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({}, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),  # E-046
        ([1], "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        ({"inputs": 5}, "Unable to parse 'inputs': attempt to access JSON non-array as array"),
        (request(id=5), "Unable to parse 'id': attempt to access JSON non-string as string"),  # E-055
        (request(parameters=5), "failed to get request params.: attempt to get members for non-object"),
        (request(outputs={}), "Unable to parse 'outputs': attempt to access JSON non-array as array"),
        (request(outputs=[{}]), "Unable to parse 'name': attempt to access non-existing object member 'name'"),
        (
            request(parameters={"priority": "x"}),  # E-057
            "Unable to parse 'priority': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            request(parameters={"timeout": -1}),
            "Unable to parse 'timeout': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            request(parameters={"sequence_start": "true"}),  # H-151
            "Unable to parse 'sequence_start': attempt to access JSON non-boolean as boolean",
        ),
        (
            request(parameters={"sequence_id": 1.5}),
            "Unable to parse 'sequence_id': attempt to access JSON non-string as string",
        ),
        (
            request(outputs=[{"name": "A", "parameters": {"classification": -1}}]),
            "Unable to set 'classification': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            request(outputs=[{"name": "A", "parameters": {"binary_data": 1}}]),
            "Unable to parse 'binary_data': attempt to access JSON non-boolean as boolean",
        ),
        (
            {"inputs": [TENSOR | {"shape": [1, -1]}]},  # H-068
            "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            {"inputs": [binary("A", -8)]},
            "Unable to parse 'binary_data_size': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
    ],
)
def test_wrong_types_are_internal_errors(document, text):
    """Spec H-002, H-064..H-068, H-150..H-154."""
    assert fault(Internal, document) == text


@pytest.mark.parametrize("key", ["name", "datatype", "shape"])
def test_required_input_keys(key):
    """Spec H-067; E-061..E-063."""
    tensor = {name: value for name, value in TENSOR.items() if name != key}
    text = f"Unable to parse '{key}': attempt to access non-existing object member '{key}'"
    assert fault(Internal, {"inputs": [tensor]}) == text


ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"inputs": [{"name": "A"}]}, ONE_SOURCE + "no field is set"),  # E-059
        (
            {"inputs": [TENSOR | {"parameters": {"binary_data_size": 8}}]},
            ONE_SOURCE + "set 'data' 'binary_data_size'",
        ),
        (
            {"inputs": [TENSOR | {"parameters": {"shared_memory_region": "x"}}]},
            ONE_SOURCE + "set 'data' 'shared_memory_region'",
        ),
        ({"inputs": [TENSOR | {"datatype": "FOO"}]}, "invalid datatype for input IN0"),
        ({"inputs": [TENSOR, TENSOR]}, "[request id: <id_unknown>] input 'IN0' already exists in request"),  # H-080
        ({"id": "q", "inputs": [TENSOR, TENSOR]}, "[request id: q] input 'IN0' already exists in request"),
        (
            request(parameters={"triton_x": 1}),  # H-155
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.",
        ),
        (
            request(parameters={"custom": "x", "n": [1]}),  # E-058
            "parameter 'n' has invalid type. It should be either 'int', 'bool', or 'string'.",
        ),
        (
            request(outputs=[{"name": "A", "parameters": {"shared_memory_region": "r", "classification": 1}}]),
            "Output can't set both 'shared_memory_region' and 'classification'",  # H-175
        ),
        (
            request(outputs=[{"name": "A", "parameters": {"shared_memory_region": "r", "binary_data": True}}]),
            "Output can't set both 'shared_memory_region' and 'binary_data'",  # H-203
        ),
        ({"inputs": [binary("A", 0, [2**63])]}, "Input 'A' contains one or more invalid dimensions"),  # H-092
    ],
)
def test_faults_of_meaning_are_invalid_arguments(document, text):
    assert fault(InvalidArgument, document) == text


def test_json_size_limit():
    """Spec H-013: the JSON counts, the binary tensors behind it do not."""
    document = {"inputs": [binary("A", 2000, [500])]}
    text = json.dumps(document).encode()
    size = len(text)
    parse_infer_request(text + b"\0" * 2000, size, model_name="m", max_json_bytes=size)
    with pytest.raises(InvalidArgument) as caught:
        parse_infer_request(text + b"\0" * 2000, size, model_name="m", max_json_bytes=size - 1)
    assert caught.value.text == (
        f"request JSON size of {size} bytes exceeds the maximum allowed input size of {size - 1} bytes. "
        "Use --http-max-input-size to increase the limit."
    )


@pytest.mark.parametrize(
    ("text", "length"), [(None, 10), ("0", 0), ("10", 10), (" 007 ", 7), ("0" * 9000 + "7", 7), ("+3", 3), ("-0", 0)]
)
def test_header_length(text, length):
    """Spec H-110."""
    assert parse_header_length(text, 10) == length


@pytest.mark.parametrize("text", ["abc", "", "1.5", "12abc", "٣", "1 2"])
def test_header_length_that_is_no_number(text):
    """Spec H-111."""
    with pytest.raises(InvalidArgument) as caught:
        parse_header_length(text, 10)
    assert caught.value.text == f"Unable to parse Inference-Header-Content-Length, got: {text}"


@pytest.mark.parametrize("text", ["11", "-1", "100000", "9" * 30, "9" * 5000])
def test_header_length_out_of_range(text):
    """Spec H-112."""
    with pytest.raises(InvalidArgument) as caught:
        parse_header_length(text, 10)
    assert caught.value.text == f"inference header size should be in range (0, 10), got: {text}"


def test_raw_requests(model):
    """Spec H-130..H-134."""
    entry = model("m", [("FP32", (-1, 2))], max_batch_size=4)
    parsed = decode_infer_request(entry, b"\0" * 16, 0, max_json_bytes=LIMIT)
    assert (parsed.inputs[0].name, parsed.inputs[0].shape, parsed.is_raw) == ("IN0", (1, 2, 2), True)
    assert parsed.binary_data_output
    assert validate_infer(entry, parsed, b"\0" * 16).batch_size == 1
    element = raw_infer_request(model("b", [("BYTES", (1,))]), 5).inputs[0]
    assert element.source == BinaryData(0, 5, b"\5\0\0\0")
    assert element.source.byte_size == 9
    assert decode_infer_request(model("e", [("FP32", (-1,))]), b"", 0, max_json_bytes=9).inputs[0].shape == (0,)
    assert raw_infer_request(model("z", [("FP32", (0, -1))]), 5).inputs[0].shape == (0, 0)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            [("FP32", (1,))] * 2,
            "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'm' model configuration",
        ),
        (
            [("FP32", (-1, -1))],
            "The shape of the raw input 'IN0' can not be deduced because there are more than one variable-sized "
            "dimension",
        ),
        ([("BYTES", (2,))], "For BYTE datatype raw input 'IN0', the model must have input shape [1]"),
        ([("BYTES", (-1,))], "For BYTE datatype raw input 'IN0', the model must have input shape [1]"),
    ],
)
def test_raw_requests_that_cannot_be_deduced(model, tensors, text):
    with pytest.raises(InvalidArgument) as caught:
        raw_infer_request(model("m", tensors), 8)
    assert caught.value.text == f"[request id: <id_unknown>] {text}"


def test_raw_byte_size_mismatch_names_the_raw_input(model):
    """Spec H-132."""
    entry = model("m", [("FP32", (-1,))])
    with pytest.raises(InvalidArgument) as caught:
        validate_infer(entry, raw_infer_request(entry, 3), b"abc")
    assert caught.value.text == (
        "[request id: <id_unknown>] input byte size mismatch for input 'raw_input' for model 'm'. Expected 0, got 3"
    )
    with pytest.raises(InvalidArgument, match="raw request size of 9 bytes exceeds"):
        raw_infer_request(entry, 9, max_json_bytes=8)


def test_output_plan(model):
    """Spec H-094, H-095, H-119: the model's order; the global flag only counts when none are listed."""
    entry = model("m", [("FP32", (1,))] * 3)
    every = parse(request(parameters={"binary_data_output": True})).output_plan(entry)
    assert every == tuple(ParsedOutput(f"OUT{index}", binary=True) for index in range(3))
    listed = request(
        parameters={"binary_data_output": True},
        outputs=[{"name": "OUT2", "parameters": {"binary_data": True}}, {"name": "OUT0"}],
    )
    assert parse(listed).output_plan(entry) == (ParsedOutput("OUT0"), ParsedOutput("OUT2", binary=True))


ENTRY = ModelEntry(
    name="m",
    version=1,
    state="READY",
    max_batch_size=4,
    inputs=(TensorSpec("IN0", "FP32", (-1,)), TensorSpec("IN1", "BYTES", (-1,), optional=True)),
    outputs=(TensorSpec("OUT0", "FP32", (-1,)),),
)
KEYS = st.sampled_from(
    ["name", "datatype", "shape", "data", "parameters", "inputs", "outputs", "id", "sequence_id", "priority", "x"]
) | st.sampled_from(
    ["binary_data_size", "binary_data", "shared_memory_region", "shared_memory_byte_size", "classification"]
)
SCALARS = st.sampled_from(["IN0", "IN1", "OUT0", "FP32", "BYTES", 0, 1, 2, 4, 8, -1, 2**64, 1.5, True, None, "\ud7ff"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)


@given(VALUES | st.fixed_dictionaries({"inputs": st.lists(VALUES, max_size=3)}), st.binary(max_size=12), st.booleans())
def test_any_request_is_valid_or_refused(document, tail, has_header):
    text = json.dumps(document).encode()
    body = text + tail
    with suppress(ServingError):
        json_bytes = len(text) if has_header else len(body)
        parsed = decode_infer_request(ENTRY, body, json_bytes, max_json_bytes=LIMIT)
        assert validate_infer(ENTRY, parsed, body).row_count >= 1


@given(st.binary(max_size=80), st.none() | st.text(max_size=4))
def test_any_bytes_are_valid_or_refused(body, header_length):
    with suppress(ServingError):
        json_bytes = parse_header_length(header_length, len(body))
        parsed = decode_infer_request(ENTRY, body, json_bytes, max_json_bytes=LIMIT)
        validate_infer(ENTRY, parsed, body)
