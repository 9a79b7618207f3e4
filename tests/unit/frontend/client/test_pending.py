"""Leases: rows and blocks come back when nobody can look at them any more, and not before."""

from __future__ import annotations

import mmap
from collections import deque

import numpy as np

from forebay.client.pending import BlockLease, BlockReturns, Pending, RowsLease, RowsReturns, leased_array
from forebay.ipc.slabs import Slab, SlabLayout
from forebay.ipc.tensor import TensorSpec

SPECS = (TensorSpec("x", "FP32", (4,)),)


def test_rows_come_back_when_the_last_array_is_gone() -> None:
    returns: RowsReturns = deque()
    slab = Slab[Pending](64, SlabLayout(SPECS, (), 8))
    with mmap.mmap(-1, 4096) as memory:
        view = memoryview(memory)
        lease = RowsLease(returns, slab, 2, 3)
        array = leased_array(view, 64, "FP32", (3, 4), lease)
        row = array[1:, :2].T
        del lease, array
        assert not returns
        row[:] = 1
        del row
        assert list(returns) == [(slab, 2, 3)]
        view.release()


def test_leased_array_lies_where_it_should() -> None:
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)
    array = leased_array(view, 128, "INT64", (2, 3), None)
    array[:] = np.arange(6).reshape(2, 3)
    assert np.frombuffer(memory, np.int64, 6, 128).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_mapping_outlives_its_owner() -> None:
    memory = mmap.mmap(-1, 4096)
    array = leased_array(memoryview(memory), 0, "FP32", (4,), None)
    del memory
    array[:] = 2
    assert array.tolist() == [2, 2, 2, 2]


def test_empty_tensors_need_no_memory() -> None:
    assert leased_array(memoryview(b""), 0, "FP32", (0, 4), None).shape == (0, 4)


def test_blocks_come_back() -> None:
    returns: BlockReturns = deque()
    lease = BlockLease(returns, 64, 100)
    del lease
    assert list(returns) == [(64, 100)]
