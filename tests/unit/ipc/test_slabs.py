"""Which rows of a slab are free, and where their tensors lie."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.ipc.arena import ALIGNMENT
from forebay.ipc.slabs import Slab, SlabLayout
from forebay.ipc.tensor import TensorSpec

INPUTS = (TensorSpec("A", "FP32", (50,)), TensorSpec("B", "INT8", (3,)))
OUTPUTS = (TensorSpec("C", "FP32", (1,)),)


def slab(capacity: int = 8) -> Slab[str]:
    return Slab[str](4096, SlabLayout(INPUTS, OUTPUTS, capacity))


def test_layout_is_a_function_of_signature_and_capacity() -> None:
    layout = SlabLayout(INPUTS, OUTPUTS, 10)
    assert [(area.offset, area.row_bytes) for area in (*layout.inputs, *layout.outputs)] == [
        (0, 200),
        (2048, 3),
        (2112, 4),
    ]
    assert layout.byte_size == 2176
    assert all(area.offset % ALIGNMENT == 0 for area in layout.inputs)


def test_layout_of_empty_tensors_still_has_a_place() -> None:
    assert SlabLayout((TensorSpec("A", "FP32", (0,)),), (), 4).byte_size == 1


def test_rows_are_loaned_one_after_the_other_so_that_batches_are_contiguous() -> None:
    rows = slab()
    assert [rows.loan(1), rows.loan(2), rows.loan(1)] == [0, 1, 3]
    assert rows.live == 4


def test_an_empty_slab_starts_over_at_its_first_row() -> None:
    rows = slab()
    first = rows.loan(3)
    rows.release(first, 3)
    assert rows.loan(1) == 0


def test_ring_wraps_where_rows_are_free() -> None:
    rows = slab()
    for _ in range(8):
        rows.loan(1)
    assert rows.loan(1) == -1
    rows.release(0, 3)
    assert [rows.loan(2), rows.loan(1), rows.loan(1)] == [0, 2, -1]


def test_gap_that_is_too_small_is_not_used() -> None:
    rows = slab()
    for _ in range(8):
        rows.loan(1)
    rows.release(1, 1)
    rows.release(4, 2)
    assert rows.loan(2) == 4
    assert rows.loan(2) == -1
    assert rows.loan(1) == 1


def test_more_rows_than_there_are_is_refused() -> None:
    assert slab().loan(9) == -1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=150))
def test_loans_never_overlap_and_are_refused_only_if_no_gap_is_large_enough(
    capacity: int, steps: list[tuple[bool, int]]
) -> None:
    rows = slab(capacity)
    held: list[tuple[int, int]] = []
    for loans, number in steps:
        used = {row for first, count in held for row in range(first, first + count)}
        if loans or not held:
            first = rows.loan(number)
            if first < 0:
                free = "".join("x" if row in used else "." for row in range(capacity))
                assert "." * number not in free
                continue
            assert 0 <= first <= capacity - number
            assert not used & set(range(first, first + number))
            held.append((first, number))
        else:
            rows.release(*held.pop(number % len(held)))
        assert rows.live == sum(count for _first, count in held)
