"""How slabs come and go with the requests in them."""

from __future__ import annotations

import pytest

from forebay.frontend.data_plane.owners import OwnedSlab, RowOwner
from forebay.frontend.data_plane.slab_set import SLAB_BYTES_OF_BATCHES, SLAB_ROWS_MAX, SlabSet
from forebay.ipc.errors import ArenaFull
from forebay.ipc.slabs import Slab, SlabLayout
from forebay.ipc.tensor import TensorSpec


class Memory:
    """Makes slabs and remembers the capacities of those that live."""

    def __init__(self) -> None:
        self.capacities: list[int] = []

    def make(self, capacity: int) -> OwnedSlab:
        self.capacities.append(capacity)
        return Slab[RowOwner](len(self.capacities), SlabLayout((TensorSpec("x", "INT8", (1,)),), (), capacity))

    def free(self, slab: OwnedSlab) -> None:
        self.capacities.remove(slab.capacity)


def slab_set(row_bytes: int = 100, max_batch_size: int = 8) -> tuple[SlabSet, Memory]:
    memory = Memory()
    return SlabSet(row_bytes, max_batch_size, memory.make, memory.free), memory


@pytest.mark.parametrize(
    ("row_bytes", "max_batch_size", "capacity"),
    [(100, 0, 64), (100, 64, 512), (16_384, 64, 128), (600_000, 8, 16), (600_000, 256, 55), (1 << 26, 8, 1)],
)
def test_first_slab_has_room_for_batches_within_reason(row_bytes: int, max_batch_size: int, capacity: int) -> None:
    slabs, memory = slab_set(row_bytes, max_batch_size)
    slabs.loan(1)
    assert memory.capacities == [capacity]
    assert capacity == 1 or capacity * row_bytes <= SLAB_BYTES_OF_BATCHES


def test_larger_slab_is_made_when_none_has_room_and_the_small_one_goes_when_empty() -> None:
    slabs, memory = slab_set()
    loans = [slabs.loan(8) for _ in range(9)]
    assert memory.capacities == [64, 128]
    for slab, first in loans[:-1]:
        slab.release(first, 8)
        slabs.free_idle()
    assert memory.capacities == [128]
    again, _first = slabs.loan(1)
    assert again is loans[-1][0]


def test_newest_slab_stays_until_nobody_needs_the_model() -> None:
    slabs, memory = slab_set()
    slab, first = slabs.loan(1)
    slab.release(first, 1)
    slabs.free_idle()
    assert memory.capacities == [64]
    slabs.retire()
    assert memory.capacities == []


def test_slab_of_a_model_that_went_lives_as_long_as_its_requests() -> None:
    slabs, memory = slab_set()
    slab, first = slabs.loan(1)
    slabs.retire()
    assert memory.capacities == [64]
    slab.release(first, 1)
    slabs.free_idle()
    assert memory.capacities == []


def test_more_rows_than_any_slab_has_are_refused() -> None:
    slabs, _memory = slab_set()
    with pytest.raises(ArenaFull):
        slabs.loan(SLAB_ROWS_MAX + 1)
