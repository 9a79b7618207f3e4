"""Datatypes, element counts and BYTES framing (spec 3)."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import (
    BY_CONFIG_NAME,
    DATATYPES,
    MAX_ELEMENT_COUNT,
    MAX_RANK,
    TensorSpec,
    byte_size,
    datatype_of,
    decode_bytes,
    element_count,
    encode_bytes,
    iter_bytes_elements,
    view_tensor,
)


def test_datatypes_have_their_sizes_and_numbers() -> None:
    """Spec D-001, D-002."""
    assert {name: row.item_bytes for name, row in DATATYPES.items()} == {
        "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
        "FP16": 2, "FP32": 4, "FP64": 8, "BYTES": 0, "BF16": 2,
    }  # fmt: skip
    assert [row.number for row in DATATYPES.values()] == list(range(1, 15))
    assert BY_CONFIG_NAME["TYPE_STRING"].name == "BYTES"


def test_numpy_dtypes_match_their_sizes() -> None:
    for row in DATATYPES.values():
        if row.name != "BYTES":
            assert row.numpy_dtype.itemsize == row.item_bytes
            if row.name != "BF16":
                assert datatype_of(np.zeros(1, row.numpy_dtype)) == row.name
    for array in (np.array([b"x"], object), np.array([b"x"]), np.array(["x"])):
        assert datatype_of(array) == "BYTES"
    with pytest.raises(InvalidArgument, match="complex64"):
        datatype_of(np.zeros(1, np.complex64))


@pytest.mark.parametrize(("shape", "expected"), [((), 1), ((0, 5), 0), ((2, 3), 6), ((2**62,), 2**62)])
def test_element_count_is_exact(shape: tuple[int, ...], expected: int) -> None:
    assert element_count(shape) == expected


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (2**62, 4), (2**63,), (1,) * (MAX_RANK + 1)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    """Spec H-092: also where 64 bits would overflow."""
    with pytest.raises(InvalidArgument):
        element_count(shape)


def test_largest_count_is_allowed() -> None:
    assert element_count((MAX_ELEMENT_COUNT,)) == MAX_ELEMENT_COUNT
    assert byte_size("FP64", (2, 3)) == 48


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"datatype": "BYTES"}, False),
        ({"dims": (-1,)}, False),
        ({"optional": True}, False),
        ({"allow_ragged_batch": True}, False),
        ({"is_shape_tensor": True}, False),
        ({"dims": ()}, True),
    ],
)
def test_rows_hold_only_tensors_of_one_size(fields: dict[str, object], expected: bool) -> None:
    assert TensorSpec(**{"name": "X", "datatype": "FP32", "dims": (4,), **fields}).is_fixed is expected  # type: ignore[arg-type]


def test_backend_sees_the_reshaped_dims() -> None:
    """Spec D-014."""
    assert TensorSpec("X", "FP32", (1,), reshape=()).backend_dims == ()
    assert TensorSpec("X", "FP32", (4,)).backend_dims == (4,)
    assert TensorSpec("X", "FP32", (4,), reshape=(2, 2)).row_bytes == 16


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_strings_survive_their_framing(elements: list[bytes]) -> None:
    """Spec D-004."""
    array = np.empty(len(elements), object)
    array[:] = elements
    data = encode_bytes(array)
    assert len(data) == sum(4 + len(element) for element in elements)
    assert decode_bytes(memoryview(data), (len(elements),)).tolist() == elements


def test_text_is_utf8() -> None:
    assert encode_bytes(np.array(["é"])) == struct.pack("<I", 2) + "é".encode()


@given(st.binary(max_size=64))
def test_any_bytes_are_strings_or_an_error(data: bytes) -> None:
    try:
        elements = list(iter_bytes_elements(memoryview(data)))
    except InvalidArgument:
        return
    assert sum(4 + len(element) for element in elements) == len(data)


def test_number_of_strings_must_fit_the_shape() -> None:
    data = memoryview(struct.pack("<I", 0) * 3)
    with pytest.raises(InvalidArgument, match="expected 2 string elements, got 3"):
        decode_bytes(data, (2,))


def test_fixed_tensors_are_viewed_in_place() -> None:
    buffer = bytearray(np.arange(6, dtype=np.float32).tobytes())
    array = view_tensor(memoryview(buffer), "FP32", (2, 3))
    buffer[0:4] = np.float32(9).tobytes()
    assert array[0, 0] == 9
    assert array.shape == (2, 3)
