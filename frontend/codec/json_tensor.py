"""Tensors as JSON arrays, both ways: the `data` of inputs and outputs (spec H-070..H-079, D-008).

`ReadDataFromJson` and `WriteDataToJson` of Triton's http_server.cc, element for element: no number is guessed, a bool
is not a number, 1.5 is not an integer, and 64-bit integers are exact.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from forebay.frontend.codec.rapid_json import (
    Json,
    as_bool,
    as_double,
    as_int,
    as_string,
    as_uint,
    format_double,
    quote_bytes,
    to_double,
    to_utf8,
)
from forebay.ipc.errors import Internal, InvalidArgument, ServingError
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.validation import tensor_element_count

Buffer: TypeAlias = bytes | memoryview

#: Datatypes that have no JSON form (spec H-077).
NO_JSON = frozenset({"FP16", "BF16"})

#: Up to this many floating point elements are written digit by digit like RapidJSON; above, by orjson, whose digits are
#: the shortest and closest, and which starts to write exponents elsewhere.
EXACT_LAYOUT_COUNT = 512

_COUNT_MISMATCH = "Unable to parse 'data': Shape does not match true shape of 'data' field"


def encode_json_data(
    name: str, datatype: str, shape: Sequence[int], data: Json, *, max_bytes: int | None = None
) -> bytes:
    """Return the bytes of an input given as JSON: C order, little endian; BYTES with length prefixes.

    The nesting of ``data`` is free, only the number of its leaves counts (spec H-071). BYTES are not counted here
    but by the core validation, as in Triton. A tensor without elements needs no data and no known datatype (H-079).

    Args:
        max_bytes: limit of ``--http-max-input-size`` for the result, or None.

    Raises:
        Internal: an element's JSON type is wrong (H-073) or the count differs from the shape (H-072).
        InvalidArgument: the datatype is unknown (H-069) or has no JSON form (H-077), the shape is impossible (H-092).
    """
    count = tensor_element_count(name, shape)
    if count == 0 or not shape:  # Triton counts no element for a shape without dimensions
        return b""
    if not isinstance(data, list):
        raise Internal("Unable to parse 'data': attempt to access JSON non-array as array")
    return encode_leaves(name, datatype, data, count, max_bytes=max_bytes)


def encode_leaves(name: str, datatype: str, data: list[Json], count: int, *, max_bytes: int | None = None) -> bytes:
    """Return the bytes of ``count`` elements, the leaves of ``data``; errors as :func:`encode_json_data`."""
    if datatype in NO_JSON:
        raise InvalidArgument(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
    if datatype not in DATATYPES:
        raise InvalidArgument(f"invalid datatype for input {name}")
    leaves, kinds = _flatten(data)
    item_bytes = DATATYPES[datatype].item_bytes
    if max_bytes is not None and len(leaves) * max(item_bytes, 1) > max_bytes:
        raise InvalidArgument(
            f"JSON data of input '{name}' exceeds the maximum allowed input size of {max_bytes} bytes. "
            "Use --http-max-input-size to increase the limit."
        )
    if datatype == "BYTES":
        return _encode_strings(leaves, kinds)
    array = _to_array(datatype, leaves, kinds)
    if array is None:
        _raise_first_fault(datatype, leaves, count)
    if len(leaves) != count:
        raise Internal(_COUNT_MISMATCH)
    return array.tobytes()


def _flatten(data: list[Json]) -> tuple[list[Json], set[type]]:
    """Return the leaves of nested arrays in order, and the set of their types."""
    kinds = set(map(type, data))
    while kinds == {list}:
        data = list(itertools.chain.from_iterable(data))  # type: ignore[arg-type]
        kinds = set(map(type, data))
    if list not in kinds:
        return data, kinds
    leaves: list[Json] = []
    stack = [iter(data)]
    while stack:
        for element in stack[-1]:
            if isinstance(element, list):
                stack.append(iter(element))
                break
            leaves.append(element)
        else:
            stack.pop()
    return leaves, set(map(type, leaves))


def _to_array(datatype: str, leaves: list[Json], kinds: set[type]) -> npt.NDArray[np.generic] | None:
    """Return the leaves as an array of the datatype, or None if one of them does not fit."""
    dtype = DATATYPES[datatype].numpy_dtype
    if dtype.kind == "b":
        return np.array(leaves, dtype=dtype) if kinds <= {bool} else None
    if dtype.kind == "f":
        if not kinds <= {int, float}:
            return None
        try:
            wide = np.array(leaves, dtype=np.float64)
        except OverflowError:
            wide = np.array([to_double(leaf) for leaf in leaves if isinstance(leaf, (int, float))], dtype=np.float64)
        with np.errstate(over="ignore"):  # 1e39 is Infinity as FP32 (spec H-015)
            return wide.astype(dtype)
    if not kinds <= {int}:
        return None
    try:
        whole = np.array(leaves, dtype=np.int64 if dtype.kind == "i" else np.uint64)
    except OverflowError:
        return None
    return whole.astype(dtype)  # to the width, like Triton's cast (spec H-074)


def _raise_first_fault(datatype: str, leaves: list[Json], count: int) -> NoReturn:
    """Raise what Triton meets first: an element of the wrong type, or one too many."""
    kind = DATATYPES[datatype].numpy_dtype.kind
    access = {"b": as_bool, "f": as_double, "i": as_int, "u": as_uint}[kind]
    try:
        for leaf in leaves[:count]:
            access(leaf)
    except ServingError as error:
        raise Internal(f"Unable to parse 'data': {error}") from None
    raise Internal(_COUNT_MISMATCH)


def _encode_strings(leaves: list[Json], kinds: set[type]) -> bytes:
    if not kinds <= {str}:
        raise Internal("Unable to parse JSON bytes array: attempt to access JSON non-string as string")
    parts: list[bytes] = []
    for leaf in leaves:
        raw = to_utf8(as_string(leaf))
        parts += (struct.pack("<I", len(raw)), raw)
    return b"".join(parts)


def frame_element(element: bytes) -> bytes:
    """Return one BYTES element with its length in front (spec D-004)."""
    return struct.pack("<I", len(element)) + element


def render_json_data(name: str, datatype: str, shape: Sequence[int], data: Buffer) -> bytes:
    """Return an output's elements as one flat JSON array (spec H-097).

    Args:
        data: the tensor's bytes, C order, little endian.

    Raises:
        InvalidArgument: the datatype has no JSON form (H-077).
        Internal: the bytes do not make up the shape.
    """
    if datatype in NO_JSON:
        raise InvalidArgument(
            f"sending {datatype} data via JSON is not supported. Please use the binary data format for output"
        )
    count = 1
    for dim in shape:
        count *= dim
    if datatype == "BYTES":
        return b"[%s]" % b",".join(quote_bytes(element) for element in _elements(name, data, count))
    row = DATATYPES[datatype]
    if len(data) != count * row.item_bytes:
        raise Internal(f"output tensor shape does not match size of output for '{name}'")
    if row.name == "BOOL":
        return orjson.dumps((np.frombuffer(data, dtype=np.uint8) != 0).tolist())
    array = np.require(np.frombuffer(data, dtype=row.numpy_dtype), requirements="A")  # orjson reads it directly
    if array.dtype.kind != "f":
        return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    wide = array.astype(np.float64)  # FP32 is printed as the double it widens to (spec H-076)
    if count <= EXACT_LAYOUT_COUNT:
        return b"[%s]" % ",".join(map(format_double, wide.tolist())).encode()
    text = orjson.dumps(wide, option=orjson.OPT_SERIALIZE_NUMPY)
    odd = wide[~np.isfinite(wide)]  # which orjson wrote as null, and nothing else
    tokens = iter(odd.tolist())
    return re.sub(b"null", lambda _: format_double(next(tokens)).encode(), text) if odd.size else text


def _elements(name: str, data: Buffer, count: int) -> list[bytes]:
    """Return the first ``count`` elements of a BYTES output."""
    elements: list[bytes] = []
    offset, end = 0, len(data)
    for _ in range(count):
        length = struct.unpack_from("<I", data, offset)[0] if offset + 4 <= end else end
        offset += 4
        if offset + length > end:
            raise Internal(f"output tensor shape does not match size of output for '{name}'")
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    return elements
