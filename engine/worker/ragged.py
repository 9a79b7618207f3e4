"""Ragged batches: requests of different shapes in one execution of a model that maps arrays (spec S-140..S-147).

A model gets each ragged input as one dimension with the elements of all requests, one request after the other, and
further inputs (``batch_input``) that tell where each request begins or which shape it has. Outputs have a row per batch
item as always, or (``batch_output``) as many elements as an input, to be divided in the same way.

Models that see requests one by one (Python) need nothing of this: they get the tensors as they were sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, Arrays
from forebay.engine.repository.model_spec import BatchInputSpec, BatchOutputSpec
from forebay.engine.worker.shape_tensors import ShapeTensors
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.tensor import DATATYPES, TensorSpec, element_count
from forebay.ipc.worker_messages import InstanceSpec

#: Backends that handle requests one by one.
_REQUEST_BACKENDS = frozenset({"python", "identity"})

#: The kind whose tensor has a row for each batch item.
_ITEM_SHAPE = "BATCH_ITEM_SHAPE"


class RaggedRequest(NamedTuple):
    """One request of a batch."""

    rows: int
    arrays: Arrays
    """By name, in the model's shapes; ``[rows, *dims]`` if the model batches."""
    shapes: Mapping[str, tuple[int, ...]]
    """By name, full shapes as the client gave them."""


class RaggedPolicy:
    """What the configuration says about joining and dividing."""

    def __init__(self, spec: InstanceSpec) -> None:
        """Read the configuration.

        Raises:
            InvalidArgument: an output cannot be divided by the shape of its input.
        """
        self._model = spec.model
        self._is_batching = spec.max_batch_size > 0
        self._ragged = frozenset(
            tensor.name for tensor in spec.inputs if tensor.allow_ragged_batch and self._is_batching
        )
        self._shape_tensors = ShapeTensors(spec)
        self._batch_inputs = msgspec.convert(spec.extra.get("batch_inputs", ()), tuple[BatchInputSpec, ...])
        batch_outputs = msgspec.convert(spec.extra.get("batch_outputs", ()), tuple[BatchOutputSpec, ...])
        outputs = {tensor.name: tensor for tensor in spec.outputs}
        ranks = {tensor.name: len(tensor.dims) for tensor in spec.inputs}
        #: Output name to its configuration and the input by whose shape it is divided.
        self._scattered: dict[str, tuple[TensorSpec, str]] = {}
        for item in batch_outputs:
            (source,) = item.source_inputs
            for target in item.target_names:
                output = outputs[target]
                if -1 in output.dims[ranks[source] :]:
                    raise InvalidArgument(
                        f"batch output '{target}' of model '{spec.model}' has a variable dimension that its source "
                        f"input '{source}' does not have"
                    )
                self._scattered[target] = (output, source)

    @property
    def is_needed(self) -> bool:
        """False for most models: requests of equal shapes are joined, or run alone."""
        return bool(self._ragged or self._batch_inputs or self._scattered)

    def is_scattered(self, output: str) -> bool:
        return output in self._scattered

    def can_join(self, requests: Sequence[RaggedRequest]) -> bool:
        """Tell whether requests have the same inputs, of the same shapes where they are not ragged."""
        if not self._is_batching or not requests:
            return False
        signatures = {
            frozenset((name, () if name in self._ragged else array.shape[1:]) for name, array in request.arrays.items())
            for request in requests
        }
        return len(signatures) == 1 and self._shape_tensors.agree([request.arrays for request in requests])

    def join(self, requests: Sequence[RaggedRequest]) -> Arrays:
        """Return the inputs of the execution; several requests must be such that :meth:`can_join`.

        Raises:
            InvalidArgument: a request lacks the input that a batch input is made from.
        """
        first = requests[0].arrays
        joined = self._shape_tensors.with_batch_size(first, sum(request.rows for request in requests))
        for name in first:
            if name in joined:
                continue
            parts = [request.arrays[name] for request in requests]
            if name in self._ragged:
                parts = [part.reshape(-1) for part in parts]
            joined[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for item in self._batch_inputs:
            values = self._batch_input(item, requests).astype(DATATYPES[item.datatype].numpy_dtype)
            joined.update(dict.fromkeys(item.target_names, values))
        return joined

    def _batch_input(self, item: BatchInputSpec, requests: Sequence[RaggedRequest]) -> Array:
        (source,) = item.source_inputs
        shapes: list[tuple[int, ...]] = []
        for request in requests:
            if source not in request.arrays:
                raise InvalidArgument(f"model '{self._model}' needs input '{source}' to make its batch inputs from")
            shapes.append(request.arrays[source].shape)
        counts = [element_count(shape) for shape in shapes]
        match item.kind:
            case "BATCH_ELEMENT_COUNT":
                return np.array(counts)
            case "BATCH_ACCUMULATED_ELEMENT_COUNT":
                return np.cumsum(counts)
            case "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
                return np.array([*itertools.accumulate(counts, initial=0)])
            case "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
                return np.zeros(max(counts), np.int8)
            case _:  # BATCH_ITEM_SHAPE, BATCH_ITEM_SHAPE_FLATTEN
                skip = 1 if self._is_batching else 0
                items = np.array(
                    [shape[skip:] for shape, request in zip(shapes, requests, strict=True) for _ in range(request.rows)]
                )
                return items if item.kind == _ITEM_SHAPE else items.reshape(-1)

    def scatter(self, output: str, result: Array | None, requests: Sequence[RaggedRequest]) -> list[Array]:
        """Divide an output among requests by the shapes of its source input (spec S-147).

        Args:
            result: what the model made, of any shape.

        Returns:
            For each request an array in the client's shape: the output's dims, with the input's sizes for those that
            vary.

        Raises:
            BackendFailed: the output is not there, or has other elements than the configuration promises.
            InvalidArgument: a request lacks the source input.
        """
        spec, source = self._scattered[output]
        if result is None:
            raise BackendFailed(f"model '{self._model}' did not produce output '{output}'")
        skip = 1 if self._is_batching else 0
        shapes: list[tuple[int, ...]] = []
        for request in requests:
            if source not in request.shapes:
                raise InvalidArgument(f"model '{self._model}' needs input '{source}' to divide output '{output}'")
            sizes = request.shapes[source][skip:]
            dims = tuple(sizes[index] if dim == -1 else dim for index, dim in enumerate(spec.dims))
            shapes.append((request.rows, *dims) if self._is_batching else dims)
        counts = [element_count(shape) for shape in shapes]
        is_text = result.dtype.kind in "OSU"
        fits = is_text if spec.datatype == "BYTES" else result.dtype == DATATYPES[spec.datatype].numpy_dtype
        if not fits or result.size != sum(counts):
            raise BackendFailed(
                f"model '{self._model}' produced output '{output}' as {result.dtype} {list(result.shape)}, "
                f"but its configuration promises {spec.datatype} of {sum(counts)} elements, as input '{source}' has"
            )
        flat = result.reshape(-1)
        ends = itertools.accumulate(counts)
        return [flat[end - count : end].reshape(shape) for end, count, shape in zip(ends, counts, shapes, strict=True)]


def with_batch_tensors(spec: InstanceSpec) -> InstanceSpec:
    """Return the specification as a backend that maps arrays has to know it.

    A ragged input, a batch input and an output that is divided by an input's shape have one dimension for the whole
    batch. To a backend that is a batch dimension without others.
    """
    if spec.backend in _REQUEST_BACKENDS or not RaggedPolicy(spec).is_needed:
        return spec
    is_batching = spec.max_batch_size > 0
    ranks = {tensor.name: len(tensor.dims) for tensor in spec.inputs}
    inputs = [
        msgspec.structs.replace(tensor, dims=(), reshape=None) if tensor.allow_ragged_batch and is_batching else tensor
        for tensor in spec.inputs
    ]
    batch = () if is_batching else (-1,)
    for item in msgspec.convert(spec.extra.get("batch_inputs", ()), tuple[BatchInputSpec, ...]):
        dims = (*batch, ranks[item.source_inputs[0]]) if item.kind == _ITEM_SHAPE else batch
        inputs += [TensorSpec(name, item.datatype, dims, allow_ragged_batch=True) for name in item.target_names]
    scattered = {
        name
        for item in msgspec.convert(spec.extra.get("batch_outputs", ()), tuple[BatchOutputSpec, ...])
        for name in item.target_names
    }
    outputs = [
        msgspec.structs.replace(tensor, dims=batch, reshape=None, allow_ragged_batch=True)
        if tensor.name in scattered
        else tensor
        for tensor in spec.outputs
    ]
    return msgspec.structs.replace(spec, inputs=tuple(inputs), outputs=tuple(outputs))
