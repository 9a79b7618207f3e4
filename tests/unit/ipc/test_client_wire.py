"""The structs of the client protocol are as long as docs/shm-protocol.md says."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from forebay.ipc import client_wire, wire
from forebay.ipc.client_wire import pack_tensor, unpack_tensor
from forebay.ipc.tensor import DATATYPES, TensorSpec

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "shm-protocol.md").read_text().replace("\n", " ")
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i64": 8}


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [
        (client_wire.DOOR_HEADER, "kind", "request"),
        (client_wire.WELCOME, "`version", "outstanding_max"),
        (client_wire.MODEL, "`route", "device"),
        (client_wire.TENSOR, "`datatype", "zero"),
        (client_wire.SUBMIT_RUN, "`route u32 + requests", "enqueue_ns"),
        (client_wire.SUBMIT_PARCEL, "`route u32 + rows", "zero"),
        (wire.HEADER, "`kind u8 + flags u8 + count", "batch"),
        (wire.GROW, "`token u64 + offset", "byte_size"),
        (wire.RUN, "`producer u32 + requests", "enqueue_sum_ns"),
        (wire.GRANT, "`route u32 + instance u32 + generation", "rows_max"),
    ],
)
def test_structs_have_the_documented_length(layout: struct.Struct, first: str, last: str) -> None:
    found = re.search(rf"{re.escape(first)} [iu]\d+.*?{re.escape(last)} [iu]\d+", PAGE)
    assert found, f"the page has no '{first} ... {last}'"
    assert sum(SIZES[kind] for kind in re.findall(r" ([iu]\d+)\b", found.group())) == layout.size


@pytest.mark.parametrize(
    "spec",
    [
        *(TensorSpec("x", name, (1, 2)) for name in DATATYPES),
        TensorSpec("\u00fc" * 100, "FP32", (-1, 3, 0), optional=True),
        TensorSpec("", "BYTES", (), allow_ragged_batch=True, is_shape_tensor=True),
    ],
)
def test_tensors_come_back_as_they_went(spec: TensorSpec) -> None:
    packed = pack_tensor(spec)
    assert unpack_tensor(memoryview(b"xx" + packed + b"yy"), 2) == (spec, 2 + len(packed))


def test_cut_tensors_are_errors() -> None:
    packed = pack_tensor(TensorSpec("name", "FP32", (1, 2)))
    for length in range(24):
        with pytest.raises(struct.error):
            unpack_tensor(memoryview(packed[:length]), 0)
