"""What a client's request looks like whose inputs lie in blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from forebay.client.door import OpenedModel, Signature
from forebay.client.opened import Opened
from forebay.client.options import NO_OPTIONS
from forebay.client.pending import BlockLease, PendingParcel
from forebay.client.placement import BlockPlacement
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.messages import ParcelHead
from forebay.ipc.shape_key import shape_key
from forebay.ipc.tensor import TensorSpec

X = TensorSpec("x", "FP32", (3,))
SIZE = TensorSpec("size", "INT32", (2,), is_shape_tensor=True)
SIGNATURE = Signature(8, (SIZE, X), (TensorSpec("y", "FP32", (-1,)),), uses_rows=False, is_decoupled=False)


class FakeConnection:
    """Lends one block after the other."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(65536))
        self.memory = SimpleNamespace(copied_bytes=0)
        self.submitted: list[PendingParcel] = []
        self._end = 64

    def loan_block(self, size: int) -> BlockLease:
        offset, self._end = self._end, self._end + size
        returns: Any = []
        return BlockLease(returns, offset, size)

    def next_token(self) -> int:
        return len(self.submitted) + 1

    def submit(self, pending: PendingParcel) -> None:
        self.submitted.append(pending)


@pytest.fixture
def connection() -> FakeConnection:
    return FakeConnection()


def placement(connection: Any) -> BlockPlacement:
    return BlockPlacement(connection, Opened(("m", 0, ""), OpenedModel(1, 1, SIGNATURE, {})))


def submit(connection: Any, rows: int, size: tuple[int, int]) -> PendingParcel:
    filled = placement(connection)
    filled.put(SIZE, np.array(size, np.int32))
    filled.put(X, np.zeros((rows, 3), np.float32))
    pending = filled.submit(NO_OPTIONS)
    assert isinstance(pending, PendingParcel)
    return pending


def test_shape_tensor_has_no_batch_dimension(connection: FakeConnection) -> None:
    """Spec D-018."""
    pending = submit(connection, 3, (4, 6))
    assert pending.rows == 3
    head = msgspec.msgpack.decode(pending.head, type=ParcelHead)
    assert [place.shape for place in head.inputs] == [(2,), (3, 3)]
    with pytest.raises(InvalidArgument, match=r"input 'size' has the shape \[2\], not \[3, 2\]"):
        placement(connection).put(SIZE, np.zeros((3, 2), np.int32))


def test_shape_tensor_of_more_values_than_a_batch_has_items(connection: FakeConnection) -> None:
    many = msgspec.structs.replace(SIZE, dims=(20,))
    assert placement(connection).input(many, None).shape == (20,)


def test_requests_share_a_batch_only_if_their_shape_tensors_are_equal(connection: FakeConnection) -> None:
    """Spec S-011; the key is the one of every other producer."""
    keys = [submit(connection, rows, size).shape_key for rows, size in ((1, (4, 6)), (2, (4, 6)), (1, (6, 4)))]
    assert keys[0] == keys[1] != keys[2]
    head = msgspec.msgpack.decode(connection.submitted[0].head, type=ParcelHead)
    assert keys[0] == shape_key(SIGNATURE.inputs, 8, head.inputs, connection.view, 99)
