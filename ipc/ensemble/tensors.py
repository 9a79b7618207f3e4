"""Tensors between the steps of an ensemble: places in one arena, freed by their last user.

A step's output block is the next step's input block (spec L-030): nothing is copied on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.validation import InputFacts, validate_request

#: Forms of requests that are known to fit their model; at the limit all are forgotten.
_CHECKED_MAX = 256


class Held(Protocol):
    """Bytes with a count of users."""

    def hold(self) -> None: ...

    def release(self) -> None: ...


class Mapped(Protocol):
    """Whoever has the arena mapped."""

    @property
    def view(self) -> memoryview:
        """uint8 [arena bytes]"""
        ...


class Tensor(NamedTuple):
    """One tensor of a running ensemble."""

    datatype: str
    shape: tuple[int, ...]
    """Batch dimension included, if its writer batches."""
    byte_size: int
    offset: int = 0
    block: Held | None = None
    """Where it lies; None: in ``data``, because it came inside a message."""
    data: bytes = b""
    memory: DeviceMemory | None = None
    """The device memory that the block is in; None: it is in the arena."""

    def view(self, owner: Mapped) -> memoryview | bytes:
        """Return the bytes of a tensor on the host, none of one on a device; valid while the block is held."""
        if self.memory is not None:
            return b""
        return self.data if self.block is None else owner.view[self.offset : self.offset + self.byte_size]


class ClientsOwn:
    """Bytes that a client keeps until its request has ended: users need not be counted."""

    def hold(self) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do."""


def hold_all(tensors: Iterable[Tensor | None]) -> None:
    """Become a user of the tensors' blocks."""
    for tensor in tensors:
        if tensor is not None and tensor.block is not None:
            tensor.block.hold()


def release_all(tensors: Iterable[Tensor | None]) -> None:
    """Cease to be a user of the tensors' blocks."""
    for tensor in tensors:
        if tensor is not None and tensor.block is not None:
            tensor.block.release()


def fit_shape(shape: tuple[int, ...], dims: Sequence[int], *, is_batching: bool) -> tuple[int, ...]:
    """Add or remove a batch dimension of 1 where a batching model meets one that does not batch (spec S-104).

    Args:
        dims: of the configuration, without the batch dimension.
        is_batching: whether the model whose configuration it is batches.
    """
    if is_batching:
        return (1, *shape) if len(shape) == len(dims) else shape
    return shape[1:] if len(shape) == len(dims) + 1 and shape[0] == 1 else shape


class StepChecks:
    """Checks a step's request as a client's would be, once for each form of request."""

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], int] = {}

    def rows(self, entry: ModelEntry, request_id: str, places: Sequence[TensorPlace]) -> int:
        """Return the number of rows of a request, at least 1.

        Raises:
            InvalidArgument: it does not fit the model; Triton's text.
        """
        sizes = tuple((p.name, p.datatype, p.shape, 0 if p.datatype == "BYTES" else p.byte_size) for p in places)
        key = (entry.route, sizes)
        rows = self._rows.get(key)
        if rows is None:
            facts = [InputFacts(p.name, p.datatype, p.shape, p.byte_size) for p in places]
            rows = max(validate_request(entry, request_id, facts, ()).batch_size, 1)
            if len(self._rows) >= _CHECKED_MAX:
                self._rows.clear()
            self._rows[key] = rows
        return rows


def shaped_for(entry: ModelEntry, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a step's inputs, by the model's names, in the shapes that its model expects."""
    is_batching = entry.max_batch_size > 0
    shaped: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        spec = entry.input_named(name)
        if spec is not None and not spec.is_shape_tensor:
            tensor = tensor._replace(shape=fit_shape(tensor.shape, spec.dims, is_batching=is_batching))
        shaped[name] = tensor
    return shaped
