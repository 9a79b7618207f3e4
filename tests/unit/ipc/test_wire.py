"""The structs on doorbells: fixed sizes, nothing lost between packing and reading, short messages are noticed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.ipc import wire
from forebay.ipc.wire import HEADER, NO_TIMES, RUN, TIMES, Kind, Run, Times, pack_runs, unpack_runs

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
run_items = st.builds(Run, u32, u32, u64, u32, u32, u32, u32, u64)


def test_sizes_are_part_of_the_contract() -> None:
    """Processes of one server are always of one version, and yet: who changes these changes every doorbell."""
    sizes = {
        "HEADER": 16, "RUN": 40, "PARCEL": 28, "TIMES": 32, "TOKEN": 8, "GRANT": 16, "GROW": 24, "SLOT": 16, "OPEN": 16,
    }  # fmt: skip
    assert {name: getattr(wire, name).size for name in sizes} == sizes
    assert len(NO_TIMES) == TIMES.size
    assert len(Times._fields) == 4
    assert len(set(Kind)) == len(Kind.__members__)


def test_flags_of_one_message_are_distinct() -> None:
    flags = [wire.FLAG_GRANTED, wire.FLAG_FAILED, wire.FLAG_FINAL, wire.FLAG_GONE, wire.FLAG_RESCHEDULE]
    assert len({flag.bit_length() for flag in flags}) == len(flags)


@given(st.lists(run_items, min_size=1, max_size=20), u32, u64)
def test_runs_come_out_as_they_went_in(runs: list[Run], sender: int, batch: int) -> None:
    for times in (b"", NO_TIMES):
        message = pack_runs(Kind.RUNS, wire.FLAG_GRANTED, sender, batch, runs, times)
        assert HEADER.unpack_from(message) == (Kind.RUNS, wire.FLAG_GRANTED, len(runs), sender, batch)
        assert unpack_runs(memoryview(message), len(runs), HEADER.size + len(times)) == runs
        assert len(message) == HEADER.size + len(times) + len(runs) * RUN.size


def test_message_that_is_shorter_than_its_count_is_noticed() -> None:
    message = pack_runs(Kind.RUNS, 0, 1, 1, [Run(1, 1, 64, 8, 0, 1, 0, 5)])
    with pytest.raises(struct.error):
        unpack_runs(memoryview(message), 2, HEADER.size)
    with pytest.raises(struct.error):
        unpack_runs(memoryview(message[:-1]), 1, HEADER.size)
