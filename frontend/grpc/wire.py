"""Protobuf's wire format, by hand: just what walking an inference request and building its reply take."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from forebay.ipc.errors import Internal

#: Wire types.
VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
START_GROUP: Final = 3
END_GROUP: Final = 4
FIXED32: Final = 5

_UINT64_MASK = 2**64 - 1
#: Tags are 32 bits.
_TAG_MAX = 2**32 - 1
#: Groups in groups; protobuf's own limit.
_GROUP_DEPTH_MAX = 100
#: Bytes of the longest varint.
_VARINT_BYTES_MAX = 10


class Malformed(Internal):
    """The message is not protobuf, or not of its type; what Triton answers then is INTERNAL."""

    def __init__(self) -> None:
        super().__init__("Unable to parse request")


def varint(value: int) -> bytes:
    """Return an unsigned integer, or a negative one as int64, as a varint."""
    if value < 0:
        value &= _UINT64_MASK
    if value < 0x80:
        return bytes((value,))
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def field(number: int, payload: bytes) -> bytes:
    """Return a field of bytes, text or a message."""
    return varint(number << 3 | LENGTH) + varint(len(payload)) + payload


def text_field(number: int, text: str) -> bytes:
    """Return a string field; nothing for an empty one, as proto3 has it."""
    return field(number, text.encode()) if text else b""


def integer_field(number: int, value: int) -> bytes:
    """Return a varint field, zero included."""
    return varint(number << 3) + varint(value)


def double_field(number: int, value: float) -> bytes:
    """Return a double field, zero included."""
    return varint(number << 3 | FIXED64) + struct.pack("<d", value)


def read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    """Return an unsigned 64-bit varint and the position behind it.

    Raises:
        Malformed: it is cut short or too long.
    """
    value = shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _UINT64_MASK, position
        shift += 7
        if shift >= 7 * _VARINT_BYTES_MAX:
            break
    raise Malformed


def signed(value: int) -> int:
    """Return an unsigned varint's value as int64."""
    return value - 2**64 if value >= 2**63 else value


def fields(data: memoryview, position: int = 0, end: int = -1) -> Iterator[tuple[int, int, int, int]]:
    """Yield every field of a message: number, wire type, and where its value starts and ends.

    A varint's value is between start and end too; read it with :func:`read_varint`. No message of ours has groups, so
    they are unknown fields, to be left alone.

    Raises:
        Malformed: lengths lie, a group does not end, or a number is 0.
    """
    if end < 0:
        end = len(data)
    while position < end:
        byte = data[position]
        if byte < 0x80:
            tag = byte
            position += 1
        else:
            tag, position = read_varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if number == 0 or tag > _TAG_MAX:
            raise Malformed
        start = position
        if kind == LENGTH:
            length, start = read_varint(data, position, end)
            position = start + length
        else:
            position = _value_end(data, position, end, number, kind)
        if position > end:
            raise Malformed
        yield number, kind, start, position


def _value_end(data: memoryview, position: int, end: int, number: int, kind: int, depth: int = 0) -> int:
    """Return where the value of a field of any wire type but LENGTH ends; a group's end tag is part of it.

    Raises:
        Malformed: there is no such wire type, or a group does not end.
    """
    if kind == VARINT:
        return read_varint(data, position, end)[1]
    if kind == FIXED32:
        return position + 4
    if kind == FIXED64:
        return position + 8
    if kind != START_GROUP or depth > _GROUP_DEPTH_MAX:
        raise Malformed
    while True:
        tag, position = read_varint(data, position, end)
        inner, kind = tag >> 3, tag & 7
        if kind == END_GROUP and inner == number:
            return position
        if inner == 0 or tag > _TAG_MAX:
            raise Malformed
        if kind == LENGTH:
            length, position = read_varint(data, position, end)
            position += length
        else:
            position = _value_end(data, position, end, inner, kind, depth + 1)


def text(data: memoryview) -> str:
    """Return a string's text.

    Raises:
        Malformed: it is not UTF-8.
    """
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise Malformed from None


def unpack_varints(data: bytes | memoryview) -> npt.NDArray[np.uint64]:
    """Return packed varints: uint64 [count].

    Raises:
        Malformed: the last one is cut short, or one is too long.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    if not octets.size:
        return np.empty(0, dtype=np.uint64)
    is_last = octets < 0x80
    ends = np.flatnonzero(is_last)
    if not is_last[-1]:
        raise Malformed
    if ends.size == octets.size:
        return octets.astype(np.uint64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > _VARINT_BYTES_MAX:
        raise Malformed
    shifts = 7 * (np.arange(octets.size) - np.repeat(starts, lengths))
    parts = (octets & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts)
