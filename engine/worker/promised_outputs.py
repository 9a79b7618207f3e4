"""What a model's configuration promises of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.engine.backends.base import Array
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.places import client_shape
from forebay.ipc.errors import BackendFailed
from forebay.ipc.messages import InstanceSpec
from forebay.ipc.tensor import DATATYPES, TensorSpec


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
        spec = self.specs[name]
        array = results.get(name)
        if array is None:
            raise BackendFailed(f"model '{self._model}' did not produce output '{name}'")
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
        return spec.datatype, array.reshape(shape)
