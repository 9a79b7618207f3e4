"""The generate extension (spec H-270..H-281)."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec.generate import (
    NOT_ONE_RESPONSE,
    check_generate_encoding,
    error_event,
    parse_generate_request,
    render_generate_reply,
    server_sent_event,
)
from forebay.frontend.codec.infer_response import OutputTensor
from forebay.frontend.codec.json_tensor import frame_element
from forebay.frontend.codec.validation import validate_infer
from forebay.frontend.errors import error_body, http_status
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import BackendFailed, Internal, InvalidArgument, ServingError
from forebay.ipc.tensor import TensorSpec


def parse(entry, document):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_generate_request(entry, body, max_json_bytes=10_000)


def fault(entry, document):
    with pytest.raises(ServingError) as caught:
        parse(entry, document)
    return http_status(caught.value), caught.value.text


def test_mapping(model):
    """Spec H-271, E-022: other keys become parameters, `id` as well, the nested object is merged."""
    document = {"IN0": 3, "id": "x", "n": 5, "parameters": {"z": 1.5, "b": True, "parameters": 7}, "sequence_id": 4}
    parsed = parse(model("m", [("FP32", (1,))]), document)
    assert parsed.id == "x"
    assert parsed.parameters == {"id": "x", "n": 5, "z": 1.5, "b": True, "parameters": 7, "sequence_id": 4}
    assert parsed.sequence_id == 0  # H-284
    (tensor,) = parsed.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("IN0", "FP32", (1,))
    assert tensor.source.data == np.float32(3).tobytes()


@pytest.mark.parametrize(
    ("dims", "max_batch_size", "count", "shape"),
    [
        ((-1,), 0, 3, (3,)),
        ((2,), 4, 2, (1, 2)),
        ((2,), 4, 6, (3, 2)),
        ((-1,), 4, 3, (1, 3)),
        ((-1, 3), 0, 6, (2, 3)),
        ((-1, -1), 0, 3, (1, 3)),
        ((-1,), 0, 0, (0,)),
    ],
)
def test_shapes_are_inferred(model, dims, max_batch_size, count, shape):
    """Spec H-273."""
    entry = model("m", [("INT32", dims)], max_batch_size)
    parsed = parse(entry, {"IN0": [1] * count})
    assert parsed.inputs[0].shape == shape
    assert validate_infer(entry, parsed, b"").byte_sizes == (4 * count,)


@pytest.mark.parametrize(("dims", "value"), [((2,), [1, 2, 3]), ((3,), 1), ((-1, 2), [1]), ((2,), [1] * 4), ((0,), [])])
def test_shapes_that_cannot_be(model, dims, value):
    """Spec H-273."""
    text = "The schema can not convert input 'IN0' to tensor with proper shape"
    assert fault(model("m", [("FP32", dims)]), {"IN0": value}) == (400, text)


@pytest.mark.parametrize(
    ("datatype", "body", "status", "text"),
    [
        ("FP32", b"", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),  # E-125
        ("FP32", b"[]", 500, "attempt to get members for non-object"),
        ("FP32", b'{"IN0":"str"}', 500, "Unable to parse 'data': attempt to access JSON non-number as double"),  # E-026
        ("FP32", b'{"IN0":[[1,2]]}', 500, "Unable to parse 'data': Shape does not match true shape of 'data' field"),
        (
            "BYTES",
            b'{"IN0":[1]}',
            500,
            "Unable to parse JSON bytes array: attempt to access JSON non-string as string",
        ),
        ("FP32", b'{"id":5}', 500, "Unable to parse 'id': attempt to access JSON non-string as string"),
        (
            "FP32",
            b'{"a":[1]}',
            400,
            "parameter 'a' has invalid type. It should be either 'int', 'bool', or 'string'.",
        ),
        (
            "FP32",
            b'{"parameters":5}',
            500,
            "Expected JSON object for keyword: 'parameters': attempt to access JSON non-object as object",
        ),
        (
            "BYTES",
            b'{"IN0":"hi","parameters":{"IN0":"x"}}',  # E-123
            400,
            "Converting keyword: 'parameters': [request id: <id_unknown>] input 'IN0' already exists in request",
        ),
        (
            "FP16",
            b'{"IN0":1}',  # H-281
            400,
            "receiving FP16 data via JSON is not supported. Please use the binary data format for input IN0",
        ),
    ],
)
def test_faults(model, datatype, body, status, text):
    """Spec H-272, H-274, H-279."""
    assert fault(model("m", [(datatype, (-1,))]), body) == (status, text)


def test_input_called_like_the_nested_key():
    entry = ModelEntry(name="m", version=1, state="READY", inputs=(TensorSpec("parameters", "FP32", (1,)),))
    text = "Keyword 'parameters' for nested schema also given as input tensor name"
    assert fault(entry, {"parameters": 1}) == (400, text)


def test_size_limit(model):
    status, text = fault(model("m", [("FP32", (-1,))]), b" " * 10_001)
    assert status == 400
    assert text.startswith("request JSON size of 10001 bytes exceeds the maximum allowed input size of 10000 bytes.")


def test_only_identity_encoding():
    """Spec H-145."""
    check_generate_encoding(None)
    check_generate_encoding("identity")
    with pytest.raises(InvalidArgument, match=r"^Unsupported content-encoding, only 'identity' is supported\.$"):
        check_generate_encoding("gzip")


def test_reply_is_flat_and_sorted():
    """Spec H-275; E-119, E-121."""
    parameters = {"param1": 42, "param0": "s", "param2": False, "param3": 123.123}
    outputs = [
        OutputTensor("OUTPUT0", "FP32", (3,), np.float32([1, 2, 3]).tobytes()),
        OutputTensor("Z", "BYTES", (1, 1), frame_element(b"hi")),
        OutputTensor("A", "INT32", (0,), b""),
    ]
    assert render_generate_reply("f32", 1, "a", parameters, outputs) == (
        b'{"A":[],"OUTPUT0":[1.0,2.0,3.0],"Z":"hi","id":"a","model_name":"f32","model_version":"1","param0":"s",'
        b'"param1":42,"param2":false,"param3":123.123}'
    )


def test_reply_names_belong_to_the_server_first():
    outputs = [OutputTensor(name, "INT8", (1,), b"\1") for name in ("model_name", "id", "p")]
    reply = render_generate_reply("m", 2, "r", {"p": "q", "model_version": "9"}, outputs)
    assert reply == b'{"id":"r","model_name":"m","model_version":"2","p":"q"}'


def test_half_float_outputs_are_refused():
    with pytest.raises(InvalidArgument, match="sending BF16 data via JSON is not supported"):
        render_generate_reply("m", 1, "", {}, [OutputTensor("Y", "BF16", (1,), b"\0\0")])


def test_events():
    """Spec H-277, H-278; E-023."""
    assert server_sent_event(b'{"OUT":0.0}') == b'data: {"OUT":0.0}\n\n'
    assert error_event(BackendFailed("boom\n")) == b'data: {"error":"boom\\n"}\n\n'
    assert error_body(NOT_ONE_RESPONSE) == (
        b'{"error":"generate expects model to produce exactly 1 response, use generate stream for model that generates '
        b'various number of responses"}'
    )


ENTRY = ModelEntry(
    name="m",
    version=1,
    state="READY",
    max_batch_size=2,
    inputs=(TensorSpec("a", "BYTES", (-1,)), TensorSpec("b", "INT8", (2, -1), optional=True)),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "parameters"]), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "id", "parameters", "x"]), VALUES))
def test_any_object_is_mapped_or_refused(document):
    with suppress(ServingError):
        validate_infer(ENTRY, parse(ENTRY, document), b"")


def test_parameters_are_valid_utf8(model):
    parsed = parse(model("m", [("FP32", (-1,))]), b'{"k\xff":"v\xff"}')
    assert parsed.parameters == {"k\ufffd": "v\ufffd"}


def test_syntax_errors_are_internal(model):
    with pytest.raises(Internal):
        parse(model("m", [("FP32", (-1,))]), b"{")
