"""Where the tensors of requests in rows lie in the arena."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from forebay.client.door import Signature
from forebay.client.opened import Opened
from forebay.client.pending import Rows
from forebay.ipc.messages import TensorPlace
from forebay.ipc.tensor import TensorSpec


def full_shape(spec: TensorSpec, rows: int, max_batch_size: int) -> tuple[int, ...]:
    """Return the shape of a tensor with ``rows`` batch items."""
    return (rows, *spec.dims) if max_batch_size > 0 else spec.dims


def input_shape(spec: TensorSpec, rows: int, max_batch_size: int) -> tuple[int, ...]:
    """Return the shape of an input of ``rows`` batch items; a shape tensor is the same for all (spec D-018)."""
    return spec.dims if spec.is_shape_tensor else full_shape(spec, rows, max_batch_size)


def row_counts(signature: Signature, places: Sequence[TensorPlace]) -> set[int]:
    """Return the numbers of batch items that a request's inputs have: one if they agree, none if none tells."""
    if signature.max_batch_size == 0:
        return {1}
    shape_tensors = {spec.name for spec in signature.inputs if spec.is_shape_tensor}
    return {place.shape[0] for place in places if place.name not in shape_tensors}


def input_places(model: Opened, rows: Rows) -> Iterator[tuple[TensorSpec, int]]:
    """Yield every input and the arena offset at which it begins in these rows."""
    for spec, area in zip(model.signature.inputs, rows.slab.layout.inputs, strict=True):
        yield spec, rows.slab.base + area.offset + rows.first * area.row_bytes


def output_places(model: Opened, rows: Rows) -> Iterator[tuple[TensorSpec, int]]:
    """Yield every output and the arena offset at which it begins in these rows."""
    for spec, area in zip(model.signature.outputs, rows.slab.layout.outputs, strict=True):
        yield spec, rows.slab.base + area.offset + rows.first * area.row_bytes
