"""Where the tensors of requests in rows lie in the arena."""

from __future__ import annotations

from collections.abc import Iterator

from forebay.client.opened import Opened
from forebay.client.pending import Rows
from forebay.ipc.tensor import TensorSpec


def full_shape(spec: TensorSpec, rows: int, max_batch_size: int) -> tuple[int, ...]:
    """Return the shape of a tensor with ``rows`` batch items."""
    return (rows, *spec.dims) if max_batch_size > 0 else spec.dims


def input_places(model: Opened, rows: Rows) -> Iterator[tuple[TensorSpec, int]]:
    """Yield every input and the arena offset at which it begins in these rows."""
    for spec, area in zip(model.signature.inputs, rows.slab.layout.inputs, strict=True):
        yield spec, rows.slab.base + area.offset + rows.first * area.row_bytes


def output_places(model: Opened, rows: Rows) -> Iterator[tuple[TensorSpec, int]]:
    """Yield every output and the arena offset at which it begins in these rows."""
    for spec, area in zip(model.signature.outputs, rows.slab.layout.outputs, strict=True):
        yield spec, rows.slab.base + area.offset + rows.first * area.row_bytes
