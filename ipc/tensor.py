"""Datatypes, shapes and byte sizes, with the KServe v2 names. Used by every process.

numpy is imported only where an array is made: the supervisor, the scheduler and the metrics process never make one, and
start sooner without it.

The one place that multiplies dimensions: results are exact Python integers and are checked against
:data:`MAX_ELEMENT_COUNT` and against what a buffer really holds before anybody indexes with them.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.ipc.errors import InvalidArgument

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Elements of one tensor at most; Triton's limit (spec H-092).
MAX_ELEMENT_COUNT = 2**63 - 1

#: Dimensions of one tensor at most; ours, far above any real model's.
MAX_RANK = 64


class DataType(msgspec.Struct, frozen=True):
    """One row of spec D-001."""

    name: str
    """Protocol name, for example ``FP32``."""
    config_name: str
    """Name in config.pbtxt, for example ``TYPE_FP32``."""
    number: int
    """Enum number in model_config.proto (spec D-002)."""
    item_bytes: int
    """Bytes of an element; 0 for BYTES, whose elements vary."""
    numpy_name: str
    """What a buffer of it is viewed as; BF16 as ``uint16``, BYTES as ``object`` after decoding."""

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        return _numpy_dtype(self.numpy_name)


@functools.cache
def _numpy_dtype(name: str) -> np.dtype[np.generic]:
    import numpy as np

    return np.dtype(name)


_ROWS = (
    ("BOOL", 1, 1, "bool"),
    ("UINT8", 2, 1, "uint8"),
    ("UINT16", 3, 2, "uint16"),
    ("UINT32", 4, 4, "uint32"),
    ("UINT64", 5, 8, "uint64"),
    ("INT8", 6, 1, "int8"),
    ("INT16", 7, 2, "int16"),
    ("INT32", 8, 4, "int32"),
    ("INT64", 9, 8, "int64"),
    ("FP16", 10, 2, "float16"),
    ("FP32", 11, 4, "float32"),
    ("FP64", 12, 8, "float64"),
    ("BYTES", 13, 0, "object"),
    ("BF16", 14, 2, "uint16"),
)

#: Protocol name to datatype.
DATATYPES: dict[str, DataType] = {
    name: DataType(name, "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}", number, item_bytes, numpy_name)
    for name, number, item_bytes, numpy_name in _ROWS
}
#: ``TYPE_FP32`` to datatype.
BY_CONFIG_NAME: dict[str, DataType] = {row.config_name: row for row in DATATYPES.values()}


@functools.cache
def _names_by_dtype() -> dict[np.dtype[np.generic], str]:
    return {row.numpy_dtype: row.name for row in DATATYPES.values() if row.name not in ("BF16", "BYTES")}


def datatype_of(array: npt.NDArray[np.generic]) -> str:
    """Return the protocol name for a numpy array's dtype: BYTES for object, ``S`` and ``U`` arrays.

    Raises:
        InvalidArgument: the dtype has no protocol name, for example complex64.
    """
    if array.dtype.kind in "OSU":
        return "BYTES"
    try:
        return _names_by_dtype()[array.dtype]
    except KeyError:
        raise InvalidArgument(f"numpy dtype '{array.dtype}' has no tensor datatype") from None


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output as a client sees it."""

    name: str
    datatype: str
    """Protocol name."""
    dims: tuple[int, ...]
    """Dims of the config: without the batch dimension; -1 for a size that varies."""
    optional: bool = False
    allow_ragged_batch: bool = False
    reshape: tuple[int, ...] | None = None
    """What the backend sees instead of ``dims``, or None (spec D-014)."""
    labels: tuple[str, ...] = ()
    """Class labels of an output (spec H-173)."""
    is_shape_tensor: bool = False

    @property
    def is_fixed(self) -> bool:
        """True if every request has the same bytes per batch item."""
        return (
            self.datatype != "BYTES"
            and all(d >= 0 for d in self.dims)
            and not (self.allow_ragged_batch or self.optional or self.is_shape_tensor)
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one batch item; only for a fixed tensor."""
        return DATATYPES[self.datatype].item_bytes * element_count(self.dims)

    @property
    def backend_dims(self) -> tuple[int, ...]:
        """Dims that the backend sees, without the batch dimension."""
        return self.dims if self.reshape is None else self.reshape


def element_count(shape: Sequence[int]) -> int:
    """Return the product of the dimensions; 1 for a scalar.

    Raises:
        InvalidArgument: a dimension is negative, the rank above MAX_RANK, or the product above MAX_ELEMENT_COUNT.
    """
    if len(shape) > MAX_RANK:
        raise InvalidArgument(f"tensor has {len(shape)} dimensions, at most {MAX_RANK} are supported")
    count = 1
    for dim in shape:
        if dim < 0:
            raise InvalidArgument("tensor contains one or more invalid dimensions")
        count *= dim
        if count > MAX_ELEMENT_COUNT:
            raise InvalidArgument(f"tensor causes total element count to exceed maximum size of {MAX_ELEMENT_COUNT}")
    return count


def byte_size(datatype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of a fixed-size datatype (not BYTES)."""
    return DATATYPES[datatype].item_bytes * element_count(shape)


def iter_bytes_elements(buffer: memoryview) -> Iterator[memoryview]:
    """Yield each element of a serialised BYTES tensor (spec D-004) without copying.

    Raises:
        InvalidArgument: a length runs past the end of the buffer.
    """
    offset, end = 0, len(buffer)
    while offset < end:
        if offset + 4 > end:
            raise InvalidArgument(f"incomplete string length indicator, {end - offset} bytes left of 4")
        (length,) = struct.unpack_from("<I", buffer, offset)
        offset += 4
        if offset + length > end:
            raise InvalidArgument(f"incomplete string data, expecting {length} bytes but only {end - offset} available")
        yield buffer[offset : offset + length]
        offset += length


def decode_bytes(buffer: memoryview, shape: Sequence[int]) -> npt.NDArray[np.object_]:
    """Return a BYTES tensor as an object array of ``bytes``, shape ``shape``; copies the elements.

    Raises:
        InvalidArgument: the framing is wrong or the count differs from the shape.
    """
    import numpy as np

    elements = [bytes(element) for element in iter_bytes_elements(buffer)]
    expected = element_count(shape)
    if len(elements) != expected:
        raise InvalidArgument(f"expected {expected} string elements, got {len(elements)}")
    array = np.empty(expected, dtype=np.object_)
    array[:] = elements
    return array.reshape(shape)


def encode_bytes(array: npt.NDArray[np.generic]) -> bytes:
    """Serialise an object, ``S`` or ``U`` array in row-major order (spec D-004); ``str`` as UTF-8."""
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        raw = element if isinstance(element, bytes) else str(element).encode()
        parts.append(struct.pack("<I", len(raw)))
        parts.append(raw)
    return b"".join(parts)


def view_tensor(buffer: memoryview, datatype: str, shape: Sequence[int]) -> npt.NDArray[np.generic]:
    """Return a numpy view (fixed-size datatypes; no copy) or a decoded object array (BYTES; copies).

    Args:
        buffer: exactly the tensor's bytes, C order, little endian.
    """
    if datatype == "BYTES":
        return decode_bytes(buffer, shape)
    import numpy as np

    return np.frombuffer(buffer, dtype=DATATYPES[datatype].numpy_dtype).reshape(shape)


def shape_text(shape: Iterable[int]) -> str:
    """Return ``[-1,3]``, as Triton prints shapes."""
    return "[" + ",".join(str(dim) for dim in shape) + "]"
