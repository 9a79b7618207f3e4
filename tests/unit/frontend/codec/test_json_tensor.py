"""Tensors as JSON (spec H-070..H-079, H-092, H-097, D-008)."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec.json_tensor import (
    EXACT_LAYOUT_COUNT,
    encode_json_data,
    frame_element,
    render_json_data,
)
from forebay.frontend.codec.rapid_json import as_array, as_string, parse_json, to_utf8
from forebay.ipc.errors import Internal, InvalidArgument, ServingError
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.validation import tensor_byte_size, tensor_element_count

NUMERIC = [name for name in DATATYPES if name not in ("BYTES", "FP16", "BF16")]
MISMATCH = "Unable to parse 'data': Shape does not match true shape of 'data' field"


def fault(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        encode_json_data(*arguments, **options)
    return caught.value.text


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]], [[[1]], [2, [3, [[4]]]]], [[1, 2], 3, [], 4]])
def test_nesting_is_free(data):
    """Spec H-071."""
    assert encode_json_data("X", "INT16", (2, 2), data) == struct.pack("<4h", 1, 2, 3, 4)


@pytest.mark.parametrize("datatype", NUMERIC)
def test_count_must_match(datatype):
    """Spec H-072: too few and too many."""
    element = True if datatype == "BOOL" else 1
    assert fault(Internal, "X", datatype, (2,), [element]) == MISMATCH
    assert fault(Internal, "X", datatype, (2,), [element] * 3) == MISMATCH
    assert fault(Internal, "X", datatype, (2,), [element, element, "a"]) == MISMATCH


@pytest.mark.parametrize(
    ("datatype", "element", "text"),
    [
        ("FP32", "a", "non-number as double"),
        ("FP64", True, "non-number as double"),
        ("FP32", None, "non-number as double"),
        ("INT8", 1.5, "non-signed-integer as signed-integer"),
        ("INT64", 2**63, "non-signed-integer as signed-integer"),
        ("INT32", False, "non-signed-integer as signed-integer"),
        ("UINT8", -1, "non-unsigned-integer as unsigned-integer"),
        ("UINT64", 2.0**64, "non-unsigned-integer as unsigned-integer"),
        ("BOOL", 0, "non-boolean as boolean"),
        ("INT16", {"a": 1}, "non-signed-integer as signed-integer"),
    ],
)
def test_wrong_element_types(datatype, element, text):
    """Spec H-073; E-039, E-065, E-066."""
    expected = f"Unable to parse 'data': attempt to access JSON {text}"
    assert fault(Internal, "X", datatype, (1,), [element]) == expected
    assert fault(Internal, "X", datatype, (2,), [[True if datatype == "BOOL" else 1], [element]]) == expected


def test_strings_have_their_own_text():
    """E-109; their count is the core's business."""
    text = fault(Internal, "X", "BYTES", (1,), [5])
    assert text == "Unable to parse JSON bytes array: attempt to access JSON non-string as string"
    assert encode_json_data("X", "BYTES", (9,), ["a", ["é"]]) == frame_element(b"a") + frame_element("é".encode())


def test_integers_are_cut_to_their_width():
    """Spec H-074, E-111."""
    assert encode_json_data("X", "INT8", (3,), [300, -129, 127]) == struct.pack("<3b", 44, 127, 127)
    assert encode_json_data("X", "UINT16", (1,), [65537]) == struct.pack("<H", 1)


def test_64_bit_integers_are_exact():
    """Spec H-075, E-113."""
    limits = [-(2**63), 2**63 - 1]
    assert encode_json_data("X", "INT64", (2,), limits) == struct.pack("<2q", *limits)
    assert encode_json_data("X", "UINT64", (1,), [2**64 - 1]) == struct.pack("<Q", 2**64 - 1)


def test_floats_overflow_to_infinity():
    """Spec H-015, E-106."""
    array = np.frombuffer(encode_json_data("X", "FP32", (3,), [1e39, float("nan"), 10**400]), dtype=np.float32)
    assert np.array_equal(array, np.array([np.inf, np.nan, np.inf], dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json(datatype):
    """Spec H-077, E-053, E-127."""
    assert fault(InvalidArgument, "INPUT3", datatype, (1, 1), [1]) == (
        f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input INPUT3"
    )
    with pytest.raises(InvalidArgument) as caught:
        render_json_data("Y", datatype, (1,), b"\0\0")
    assert caught.value.text == (
        f"sending {datatype} data via JSON is not supported. Please use the binary data format for output"
    )


def test_unknown_datatype():
    """Spec H-069, E-054."""
    assert fault(InvalidArgument, "INPUT0", "FOO", (1, 1), [1]) == "invalid datatype for input INPUT0"


@pytest.mark.parametrize("data", [[], [1], "x", None])
def test_tensors_without_elements_need_no_data(data):
    """Spec H-079."""
    assert encode_json_data("X", "FP16", (1, 0), data) == b""
    assert encode_json_data("X", "FP32", (), data) == b""


def test_data_must_be_an_array():
    assert fault(Internal, "X", "FP32", (1,), 5) == "Unable to parse 'data': attempt to access JSON non-array as array"


def test_size_limit():
    """Spec H-013: the per-input size of JSON data."""
    assert len(encode_json_data("X", "FP64", (4,), [0, 0, 0, 0], max_bytes=32)) == 32
    assert "--http-max-input-size" in fault(InvalidArgument, "X", "FP64", (5,), [0] * 5, max_bytes=32)


def test_impossible_shapes():
    """Spec H-092."""
    limit = "causes total element count to exceed maximum size of 9223372036854775807"
    assert limit in fault(InvalidArgument, "X", "FP32", (2**40, 2**40), [1.0])
    for shape in ((-1,), (2**63,)):
        with pytest.raises(InvalidArgument, match=r"^Input 'X' contains one or more invalid dimensions$"):
            tensor_element_count("X", shape)
    with pytest.raises(InvalidArgument, match="byte size overflow for input"):
        tensor_byte_size("X", "FP32", (4, 2**60 + 2))
    with pytest.raises(InvalidArgument, match="65 dimensions"):
        tensor_element_count("X", (1,) * 65)


def test_output_data_is_flat():
    """Spec H-097."""
    assert render_json_data("Y", "INT32", (2, 2), struct.pack("<4i", 1, -2, 3, 4)) == b"[1,-2,3,4]"
    assert render_json_data("Y", "BOOL", (3,), b"\0\1\2") == b"[false,true,true]"
    assert render_json_data("Y", "FP32", (0,), b"") == b"[]"
    assert render_json_data("Y", "UINT64", (1,), b"\xff" * 8) == b"[18446744073709551615]"
    assert render_json_data("Y", "FP32", (2,), np.float32([0.1, np.nan]).tobytes()) == b"[0.10000000149011612,NaN]"
    assert render_json_data("Y", "BYTES", (2,), frame_element(b"\xff") + frame_element(b"")) == b'["\xff",""]'


def test_unaligned_views_are_read():
    body = memoryview(b"x" + struct.pack("<3q", 1, 2, 3))[1:]
    assert render_json_data("Y", "INT64", (3,), body) == b"[1,2,3]"


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [("FP32", (2,), b"\0" * 4), ("BYTES", (1,), b"\1\0"), ("BYTES", (1,), b"\5\0\0\0ab"), ("BYTES", (1,), b"")],
)
def test_outputs_that_do_not_fill_their_shape(datatype, shape, data):
    with pytest.raises(Internal, match=r"^output tensor shape does not match size of output for 'Y'$"):
        render_json_data("Y", datatype, shape, data)


@pytest.mark.parametrize("count", [3, EXACT_LAYOUT_COUNT + 1])
def test_large_float_outputs_keep_their_values(count):
    wide = np.geomspace(1e-300, 1e300, count)
    assert as_array(parse_json(render_json_data("Y", "FP64", (count,), wide.tobytes()))) == wide.tolist()
    wide[[0, 1, 2]] = [np.inf, -np.inf, np.nan]
    text = render_json_data("Y", "FP64", (count,), wide.tobytes())
    assert text.startswith(b"[Infinity,-Infinity,NaN")
    assert b"null" not in text


@st.composite
def tensors(draw):
    datatype = draw(st.sampled_from([*NUMERIC, "BYTES"]))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    count = int(np.prod(shape))
    dtype = DATATYPES[datatype].numpy_dtype
    if datatype == "BYTES":
        return (
            datatype,
            shape,
            b"".join(map(frame_element, draw(st.lists(st.binary(), min_size=count, max_size=count)))),
        )
    if datatype == "BOOL":
        return datatype, shape, bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype.kind == "f":  # one bit pattern for NaN
        array = np.frombuffer(raw, dtype=dtype).copy()
        array[np.isnan(array)] = np.nan
        raw = array.tobytes()
    return datatype, shape, raw


@given(tensors())
def test_json_round_trip(tensor):
    """What goes out as JSON comes in again as the same bytes, all datatypes, also raw bytes in strings."""
    datatype, shape, raw = tensor
    data = parse_json(render_json_data("X", datatype, shape, raw))
    assert encode_json_data("X", datatype, shape, data) == raw


@given(st.sampled_from([*DATATYPES, "FOO"]), st.lists(st.integers(0, 3), max_size=3), st.binary(max_size=40))
def test_any_data_is_encoded_or_refused(datatype, shape, text):
    try:
        data = parse_json(b'[[1,2.5],[true,null,[]],{},-1,"' + text)
    except ServingError:
        data = [[1, True], "x", -1, 2**70, [[]], {}, None]
    with suppress(ServingError):
        assert isinstance(encode_json_data("X", datatype, tuple(shape), data), bytes)


def test_strings_of_the_scanner_are_bytes_again():
    (element,) = as_array(parse_json(b'["\xff\\u0000"]'))
    assert to_utf8(as_string(element)) == b"\xff\0"
    assert encode_json_data("X", "BYTES", (1,), [element]) == frame_element(b"\xff\0")
