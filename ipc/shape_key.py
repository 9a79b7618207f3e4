"""What tells requests that may share a batch from those that may not (spec S-011). Used by every producer."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from forebay.ipc.messages import TensorPlace
from forebay.ipc.tensor import TensorSpec

#: Name, shape (empty: any) and digest of the content (empty: any) of each input.
_Facts = tuple[tuple[str, tuple[int, ...], str], ...]


def shape_key(
    inputs: Sequence[TensorSpec], max_batch_size: int, places: Sequence[TensorPlace], view: memoryview, token: int
) -> int:
    """Return a number that is equal, in every producer, for requests that may share a batch.

    Args:
        inputs: of the model.
        places: of the request's inputs, filled.
        view: uint8, the arena that they lie in.
        token: of the request; stands for the content of shape tensors that lie where it cannot be read from here.
    """
    if all(spec.is_fixed for spec in inputs):
        return 0
    by_name = {spec.name: spec for spec in inputs}
    return _digest(tuple(_facts(by_name.get(place.name), max_batch_size, place, view, token) for place in places))


def _facts(
    spec: TensorSpec | None, max_batch_size: int, place: TensorPlace, view: memoryview, token: int
) -> tuple[str, tuple[int, ...], str]:
    if spec is not None and spec.is_shape_tensor:
        # One execution has one value of each, ragged or not.
        return place.name, place.shape, _content(place, view, token)
    if max_batch_size == 0:
        return place.name, place.shape, ""
    is_ragged = spec is not None and spec.allow_ragged_batch
    return place.name, () if is_ragged else place.shape[1:], ""


def _content(place: TensorPlace, view: memoryview, token: int) -> str:
    if place.arena or place.memory:
        return str(token)
    return hashlib.blake2b(view[place.offset : place.offset + place.byte_size], digest_size=16).hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest(facts: _Facts) -> int:
    """Return a hash that does not depend on the order of the names, nor on the process."""
    return int.from_bytes(hashlib.blake2b(repr(sorted(facts)).encode(), digest_size=7).digest(), "little")
