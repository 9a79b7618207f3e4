"""Inputs whose values are shapes: one value for all requests of an execution (spec D-018, S-011).

On the wire a shape tensor has no batch dimension, ``[n]``. A model that batches gets ``[1 + n]``: the batch size of the
execution, then the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Arrays
from forebay.engine.backends.device_instance import PlacedTensor
from forebay.ipc.worker_messages import InstanceSpec


class ShapeTensors:
    """The shape tensors among the inputs of one model that batches, in host memory; nearly all models have none."""

    def __init__(self, spec: InstanceSpec) -> None:
        names = (tensor.name for tensor in spec.inputs if tensor.is_shape_tensor)
        self.names = frozenset(names if spec.max_batch_size > 0 else ())

    def values(self, tensors: Mapping[str, PlacedTensor]) -> tuple[tuple[str, bytes], ...]:
        """Return what requests must have in common to share an execution."""
        return tuple(
            (name, np.asarray(tensor).tobytes()) for name, tensor in sorted(tensors.items()) if name in self.names
        )

    def agree(self, separate: Sequence[Mapping[str, PlacedTensor]]) -> bool:
        """Tell whether requests have the same shape tensors with the same values."""
        return not self.names or len({self.values(tensors) for tensors in separate}) <= 1

    def with_batch_size(self, tensors: Mapping[str, PlacedTensor], rows: int) -> Arrays:
        """Return a request's shape tensors as a model gets them in an execution of ``rows`` batch items."""
        return {name: np.insert(np.asarray(tensors[name]), 0, rows) for name in self.names if name in tensors}

    def joined(self, separate: Sequence[Arrays], rows: int) -> Arrays:
        """Return the inputs of an execution for requests that agree: one behind the other, but for shape tensors.

        Args:
            rows: batch items of all requests.
        """
        first = separate[0]
        if len(separate) == 1:
            return {**first, **self.with_batch_size(first, rows)} if self.names else first
        whole = {
            name: np.concatenate([arrays[name] for arrays in separate]) for name in first if name not in self.names
        }
        return {**whole, **self.with_batch_size(first, rows)}
