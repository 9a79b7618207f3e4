"""Which requests may share a batch (spec S-011)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forebay.ipc.messages import TensorPlace
from forebay.ipc.shape_key import shape_key
from forebay.ipc.tensor import TensorSpec

X = TensorSpec("x", "FP32", (-1,))
RAGGED = TensorSpec("r", "FP32", (-1,), allow_ragged_batch=True)
SHAPE = TensorSpec("s", "INT32", (2,), is_shape_tensor=True)
FIXED = TensorSpec("f", "FP32", (3,))

#: Three pairs of values, the first two equal.
ARENA = memoryview(np.array([[2, 3], [2, 3], [3, 2]], np.int32).tobytes())


def place(name: str, *shape: int, offset: int = 0, **more: Any) -> TensorPlace:
    return TensorPlace(name, "FP32", shape, offset, 8, **more)


def key(spec: TensorSpec, *places: TensorPlace, max_batch_size: int = 4, token: int = 1) -> int:
    return shape_key((spec,), max_batch_size, places, ARENA, token)


def test_models_of_fixed_shapes_need_no_key() -> None:
    assert key(FIXED, place("f", 1, 3)) == 0


def test_batch_size_does_not_count_but_every_other_size_does() -> None:
    assert key(X, place("x", 1, 5)) == key(X, place("x", 3, 5))
    assert key(X, place("x", 1, 5)) != key(X, place("x", 1, 6))
    assert key(X, place("x", 1, 5), max_batch_size=0) != key(X, place("x", 3, 5), max_batch_size=0)


def test_ragged_inputs_may_have_any_size() -> None:
    assert key(RAGGED, place("r", 1, 5)) == key(RAGGED, place("r", 2, 9))


def test_order_of_the_inputs_does_not_count_but_which_there_are_does() -> None:
    x, r = place("x", 1, 5), place("r", 1, 5)
    both = shape_key((X, RAGGED), 4, [x, r], ARENA, 1)
    assert both == shape_key((X, RAGGED), 4, [r, x], ARENA, 1)
    assert both != shape_key((X, RAGGED), 4, [x], ARENA, 1)


def test_content_of_shape_tensors_counts() -> None:
    assert key(SHAPE, place("s", 2)) == key(SHAPE, place("s", 2, offset=8), token=2)
    assert key(SHAPE, place("s", 2)) != key(SHAPE, place("s", 2, offset=16))


def test_whole_shape_of_a_shape_tensor_counts() -> None:
    """It has no batch dimension that could be left out (spec D-018)."""
    assert key(SHAPE, place("s", 2)) != key(SHAPE, place("s", 1))


@pytest.mark.parametrize("elsewhere", [{"memory": 1}, {"arena": 2}])
def test_shape_tensor_that_cannot_be_read_shares_no_batch(elsewhere: dict[str, int]) -> None:
    first = key(SHAPE, place("s", 2, **elsewhere), token=1)
    assert first != key(SHAPE, place("s", 2, **elsewhere), token=2)
    assert first != key(SHAPE, place("s", 2), token=1)
