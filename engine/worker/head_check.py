"""Is a shared-memory client's request what the model expects? Frontends have checked theirs; clients are asked here.

Behaviour follows Triton's request normalisation (spec H-104..H-113): the texts name the input and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping

from forebay.ipc.arena import Arena
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.messages import ParcelHead, TensorPlace
from forebay.ipc.tensor import TensorSpec, byte_size


def check_head(
    head: ParcelHead, rows: int, inputs: Mapping[str, TensorSpec], arena: Arena, *, model: str, max_batch_size: int
) -> None:
    """Check one request.

    Args:
        rows: what the request was counted as in its batch.
        inputs: of the model, by name.
        arena: the client's own; no place may be elsewhere.

    Raises:
        InvalidArgument: the request does not fit the model.
        Internal: a place is outside the arena.
    """
    missing = {spec.name for spec in inputs.values() if not spec.optional}
    seen: set[str] = set()
    for place in head.inputs:
        spec = inputs.get(place.name)
        if spec is None:
            raise InvalidArgument(f"unexpected inference input '{place.name[:256]}' for model '{model}'")
        if place.name in seen:
            raise InvalidArgument(f"input '{place.name}' already exists in request")
        seen.add(place.name)
        missing.discard(place.name)
        _check_place(place, spec, rows, arena, model, max_batch_size)
    if missing:
        expected, got = len(inputs), len(head.inputs)
        raise InvalidArgument(
            f"expected {expected} inputs but got {got} inputs for model '{model}'. Got input(s) "
            f"{sorted(seen)}, but missing required input(s) {sorted(missing)}. Please provide all required input(s)."
        )


def _check_place(
    place: TensorPlace, spec: TensorSpec, rows: int, arena: Arena, model: str, max_batch_size: int
) -> None:
    if place.arena:
        raise InvalidArgument("a client's tensors must lie in its own arena")
    if place.datatype != spec.datatype:
        raise InvalidArgument(
            f"inference input '{spec.name}' data-type is '{place.datatype[:16]}', but model '{model}' expects "
            f"'{spec.datatype}'"
        )
    expected = (rows, *spec.dims) if max_batch_size > 0 and not spec.is_shape_tensor else spec.dims
    if len(place.shape) != len(expected) or not all(
        have >= 0 and want in (-1, have) for want, have in zip(expected, place.shape, strict=False)
    ):
        wanted = [-1, *spec.dims] if max_batch_size > 0 else list(spec.dims)
        raise InvalidArgument(
            f"unexpected shape for input '{spec.name}' for model '{model}'. Expected {wanted}, got {list(place.shape)}"
        )
    if spec.datatype != "BYTES" and byte_size(spec.datatype, place.shape) != place.byte_size:
        raise InvalidArgument(f"input '{spec.name}' does not have the bytes of its shape")
    if place.memory:
        return  # Compared with its device memory where that is opened.
    arena.check(place.offset, place.byte_size)
