"""What a model's configuration promises of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from forebay.engine.backends.base import Array
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.places import client_shape
from forebay.ipc.errors import BackendFailed
from forebay.ipc.tensor import DATATYPES, TensorSpec
from forebay.ipc.worker_messages import InstanceSpec


class ShapedTensor(Protocol):
    """An array, wherever its memory is."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


class PromisedOutputs:
    """The configured outputs of one model."""

    def __init__(self, spec: InstanceSpec) -> None:
        self._model = spec.model
        self._max_batch_size = spec.max_batch_size
        self.specs: dict[str, TensorSpec] = {tensor.name: tensor for tensor in spec.outputs}

    def wanted(self, requests: Sequence[ParcelRequest]) -> tuple[str, ...]:
        """Return the outputs that any of the requests wants."""
        wanted = {name for request in requests for name in request.requested_outputs}
        return tuple(name for name in self.specs if name in wanted)

    def checked(self, name: str, results: Mapping[str, Array], rows: int) -> tuple[str, Array]:
        """Return (datatype, array in the client's shape) of an output after comparing it with the configuration."""
        array = results.get(name)
        if array is None:
            raise self._missing(name)
        return self.specs[name].datatype, array.reshape(self.client_shape(name, array, rows))

    def _missing(self, name: str) -> BackendFailed:
        return BackendFailed(f"model '{self._model}' did not produce output '{name}'")

    def client_shape(self, name: str, array: ShapedTensor | None, rows: int) -> tuple[int, ...]:
        """Return the shape that the client sees of an output, after comparing it with the configuration.

        Raises:
            BackendFailed: it is missing, or of another shape or datatype.
        """
        if array is None:
            raise self._missing(name)
        spec = self.specs[name]
        shape = client_shape(spec, tuple(array.shape), self._max_batch_size)
        dims = shape[1:] if self._max_batch_size > 0 else shape
        matches = len(dims) == len(spec.dims) and all(
            want in (-1, have) for want, have in zip(spec.dims, dims, strict=True)
        )
        if self._max_batch_size > 0:
            matches = matches and len(shape) > 0 and shape[0] == rows
        is_text = array.dtype.kind in "OSU"
        if (
            not matches
            or is_text != (spec.datatype == "BYTES")
            or (not is_text and array.dtype != DATATYPES[spec.datatype].numpy_dtype)
        ):
            expected = [rows, *spec.dims] if self._max_batch_size > 0 else list(spec.dims)
            raise BackendFailed(
                f"model '{self._model}' produced output '{name}' as {array.dtype} {list(shape)}, "
                f"but its configuration promises {spec.datatype} {expected}"
            )
        return shape
