"""Replies (spec H-096..H-098, H-118..H-122, H-170..H-176)."""

import struct

import numpy as np
import pytest

from forebay.frontend.codec.infer_response import (
    FixedOutput,
    OutputTensor,
    classify,
    render_infer_response,
    response_prefix,
)
from forebay.frontend.codec.json_tensor import frame_element
from forebay.ipc.errors import InvalidArgument

PARAMETERS = {"param0": "an example string parameter", "param1": 42, "param2": False, "param3": 123.123}


def floats(*values):
    return np.array(values, dtype=np.float32).tobytes()


def body(reply):
    return b"".join(reply.buffers)


def test_json_reply_word_for_word():
    """Spec H-096..H-098; E-106."""
    output = OutputTensor("OUTPUT0", "FP32", (2,), floats(np.inf, np.nan))
    reply = render_infer_response("f32", 1, "", PARAMETERS, [output])
    assert body(reply) == (
        b'{"model_name":"f32","model_version":"1","parameters":{"param0":"an example string parameter","param1":42,'
        b'"param2":false,"param3":123.123},"outputs":[{"name":"OUTPUT0","datatype":"FP32","shape":[2],'
        b'"data":[Infinity,NaN]}]}'
    )
    assert (reply.header_length, reply.content_type) == (None, "application/json")


def test_id_is_first_and_only_if_given():
    """Spec H-096; E-169."""
    reply = render_infer_response("multi", 1, 'i"5', {}, [])
    assert body(reply) == b'{"id":"i\\"5","model_name":"multi","model_version":"1","outputs":[]}'


def test_binary_outputs_follow_in_order_without_a_copy():
    """Spec H-118, H-120, H-122, I-1."""
    first, second = bytearray(b"12345678"), bytearray(b"\4\3\2\1")
    outputs = [
        OutputTensor("A", "FP32", (2,), memoryview(first), binary=True),
        OutputTensor("J", "INT32", (1,), struct.pack("<i", 7)),
        OutputTensor("E", "FP32", (0,), b"", binary=True),
        OutputTensor("R", "FP32", (2, 2), None),
        OutputTensor("B", "INT32", (1,), memoryview(second), binary=True),
    ]
    reply = render_infer_response("m", 3, "x", {}, outputs)
    assert reply.buffers[0] == (
        b'{"id":"x","model_name":"m","model_version":"3","outputs":['
        b'{"name":"A","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}},'
        b'{"name":"J","datatype":"INT32","shape":[1],"data":[7]},'
        b'{"name":"E","datatype":"FP32","shape":[0],"parameters":{"binary_data_size":0}},'
        b'{"name":"R","datatype":"FP32","shape":[2,2]},'
        b'{"name":"B","datatype":"INT32","shape":[1],"parameters":{"binary_data_size":4}}]}'
    )
    assert [view.obj for view in reply.buffers[1:]] == [first, second]
    assert (reply.header_length, reply.content_type) == (len(reply.buffers[0]), "application/octet-stream")
    assert reply.body_bytes == len(body(reply))


def test_only_empty_binary_outputs_need_no_header():
    """Spec H-120."""
    reply = render_infer_response("m", 1, "", {}, [OutputTensor("A", "FP32", (0,), b"", binary=True)])
    assert (reply.header_length, reply.content_type) == (None, "application/json")
    assert b'"binary_data_size":0' in body(reply)


@pytest.mark.parametrize("request_id", ["", "r1"])
def test_prefix_is_the_same_reply(request_id):
    """The prefix of the fast path and the general renderer agree."""
    data = floats(1, 2)
    head, _, rest = response_prefix(
        "m", 2, request_id, [FixedOutput("A", "FP32", (1, 2), 8), FixedOutput("B", "FP32", (1, 2), 8)]
    ).partition(b"\r\n\r\n")
    outputs = [OutputTensor(name, "FP32", (1, 2), data, binary=True) for name in "AB"]
    reply = render_infer_response("m", 2, request_id, {}, outputs)
    assert rest == reply.buffers[0]
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"Content-Type: application/octet-stream",
        b"Inference-Header-Content-Length: %d" % len(rest),
        b"Content-Length: %d" % reply.body_bytes,
    ]


def test_prefix_without_tensor_bytes_and_with_more_headers():
    prefix = response_prefix("m", 1, "", [FixedOutput("A", "FP32", (0,), 0)], extra_headers=b"X: y\r\n")
    assert prefix.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX: y\r\nContent-Length: ")


def test_classification():
    """Spec H-170..H-173; E-117."""
    result = classify("OUTPUT0", "FP32", (2,), floats(1, 2), 5, ("cat", "dog"), is_batched=False)
    assert result == OutputTensor(
        "OUTPUT0", "BYTES", (2,), frame_element(b"2.000000:1:dog") + frame_element(b"1.000000:0:cat")
    )


def test_classification_per_batch_item():
    """Spec H-172; labels may be fewer than classes (H-173)."""
    data = np.array([[3, -1, 2], [4, 6, 5]], dtype=np.int32).tobytes()
    result = classify("Y", "INT32", (2, 3), data, 2, ("a",), is_batched=True, binary=True)
    assert result.shape == (2, 2)
    assert result.binary
    assert result.data == b"".join(map(frame_element, [b"3:0:a", b"2:2", b"6:1", b"5:2"]))


def test_classification_of_odd_values():
    """Large values in full, equal ones by index, unsigned and 64-bit integers exact."""
    one = classify("Y", "FP32", (3,), floats(1e20, 1, 1), 3, (), is_batched=False)
    expected = [b"100000002004087734272.000000:0", b"1.000000:1", b"1.000000:2"]
    assert one.data == b"".join(map(frame_element, expected))
    unsigned = classify("Y", "UINT64", (2,), struct.pack("<2Q", 0, 2**64 - 1), 1, (), is_batched=False)
    assert unsigned.data == frame_element(b"18446744073709551615:1")
    assert classify("Y", "FP32", (2, 0), b"", 3, (), is_batched=True).shape == (2, 0)
    assert classify("Y", "FP32", (0,), b"", 3, (), is_batched=False).data == b""


@pytest.mark.parametrize("datatype", ["BYTES", "BOOL", "FP16", "BF16"])
def test_classification_of_unsupported_types(datatype):
    """Spec H-174."""
    with pytest.raises(InvalidArgument) as caught:
        classify("Y", datatype, (1,), b"\0\0", 1, (), is_batched=False)
    assert caught.value.text == f"class result not available for output due to unsupported type '{datatype}'"
