"""Shapes of inputs, and how many batch items a request has (spec D-018)."""

from __future__ import annotations

from forebay.client.door import Signature
from forebay.client.places import full_shape, input_shape, row_counts
from forebay.ipc.messages import TensorPlace
from forebay.ipc.tensor import TensorSpec

X = TensorSpec("x", "FP32", (3,))
SIZE = TensorSpec("size", "INT32", (2,), is_shape_tensor=True)


def signature(max_batch_size: int) -> Signature:
    return Signature(max_batch_size, (SIZE, X), (), uses_rows=False, is_decoupled=False)


def place(name: str, *shape: int) -> TensorPlace:
    return TensorPlace(name, "FP32", shape, 0, 0)


def test_only_shape_tensors_have_no_batch_dimension() -> None:
    assert input_shape(X, 4, 8) == (4, 3)
    assert input_shape(SIZE, 4, 8) == (2,)
    assert input_shape(X, 4, 0) == (3,)


def test_output_shape_tensor_has_a_row_for_each_item() -> None:
    assert full_shape(SIZE, 4, 8) == (4, 2)


def test_shape_tensors_do_not_tell_how_many_items_there_are() -> None:
    assert row_counts(signature(8), [place("size", 2), place("x", 4, 3)]) == {4}
    assert row_counts(signature(8), [place("size", 2)]) == set()
    assert row_counts(signature(8), [place("x", 4, 3), place("y", 5, 3)]) == {4, 5}
    assert row_counts(signature(0), [place("x", 3)]) == {1}
