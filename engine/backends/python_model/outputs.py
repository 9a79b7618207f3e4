"""From a model's response to what the client gets: which outputs, compared with the configuration."""

from __future__ import annotations

from forebay.engine.backends.base import Array
from forebay.engine.backends.python_model.gpus import Gpu
from forebay.engine.backends.python_model.response import InferenceResponse
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.worker.kept_outputs import KeptOutput
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.pending_response import RawTensor, byte_view
from forebay.engine.worker.places import client_shape
from forebay.engine.worker.request_rows import RowRequest
from forebay.ipc.errors import BackendFailed
from forebay.ipc.messages import TensorPlace
from forebay.ipc.tensor import TensorSpec, encode_bytes
from forebay.ipc.worker_messages import InstanceSpec


class ModelOutputs:
    """The configured outputs of one model."""

    def __init__(self, spec: InstanceSpec, *, are_checked: bool, gpu: Gpu | None = None) -> None:
        """
        Args:
            are_checked: datatypes, shapes and presence must be as configured (Triton does not look, spec L-022).
            gpu: where clients may want outputs; None: on the host only.
        """
        self._gpu = gpu
        self._model = spec.model
        self._max_batch_size = spec.max_batch_size
        self._decoupled = spec.decoupled
        self._are_checked = are_checked
        self._specs = {tensor.name: tensor for tensor in spec.outputs}

    def raw(self, request: ParcelRequest, response: InferenceResponse) -> list[RawTensor]:
        """Return the outputs that the client wants, as bytes; those that it wants on a GPU are brought there, or wait.

        Raises:
            BackendFailed: they are not as configured.
            Internal: one has less room than it needs.
        """
        produced = {tensor.name(): tensor for tensor in response.output_tensors()}
        outputs: list[RawTensor | TensorPlace | KeptOutput] = []
        for name in request.requested_outputs:
            tensor = produced.get(name)
            if tensor is None:
                if self._are_checked and not self._decoupled:
                    raise self._missing(name, produced)
                continue
            shape = tuple(tensor.shape())
            if self._are_checked:
                shape = self._checked_shape(request.rows, self._specs[name], tensor.datatype, shape)
            outputs.append(_handed_over(self._gpu, request, tensor, shape))
        request.placed = tuple(output for output in outputs if isinstance(output, TensorPlace))
        request.kept = tuple(output for output in outputs if isinstance(output, KeptOutput))
        return [output for output in outputs if isinstance(output, RawTensor)]

    def arrays(self, request: RowRequest, response: InferenceResponse) -> list[Array]:
        """Return all outputs, each of the shape and dtype of its rows.

        Raises:
            BackendFailed: they are not as configured.
        """
        produced = {tensor.name(): tensor for tensor in response.output_tensors()}
        arrays: list[Array] = []
        for spec, target in zip(self._specs.values(), request.place.outputs, strict=True):
            tensor = produced.get(spec.name)
            if tensor is None:
                raise self._missing(spec.name, produced)
            if tensor.device is not None and tensor.device.shape == target.shape and tensor.datatype == spec.datatype:
                tensor.copy_to(target)
                arrays.append(target)
                continue
            array = tensor.data
            if array.shape != target.shape or tensor.datatype != spec.datatype:
                self._checked_shape(request.rows, spec, tensor.datatype, array.shape)
                array = array.reshape(target.shape)
            arrays.append(array)
        return arrays

    def _missing(self, name: str, produced: dict[str, Tensor]) -> BackendFailed:
        others = f", but {', '.join(map(repr, sorted(produced)))}" if produced else ""
        return BackendFailed(f"model '{self._model}' did not produce output '{name}'{others}")

    def _checked_shape(self, rows: int, spec: TensorSpec, datatype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape as the client sees it.

        Raises:
            BackendFailed: datatype or shape are not the configured ones.
        """
        batches = self._max_batch_size > 0
        seen = client_shape(spec, shape, self._max_batch_size)
        dims = seen[1:] if batches else seen
        fits = len(dims) == len(spec.dims) and all(
            want in (-1, have) for want, have in zip(spec.dims, dims, strict=True)
        )
        if batches and not self._decoupled:
            fits = fits and seen[:1] == (rows,)
        if datatype != spec.datatype or not fits:
            expected = [rows, *spec.dims] if batches else list(spec.dims)
            raise BackendFailed(
                f"model '{self._model}' produced output '{spec.name}' as {datatype} {list(shape)}, "
                f"but its configuration promises {spec.datatype} {expected}"
            )
        return seen


def _handed_over(
    gpu: Gpu | None, request: ParcelRequest, tensor: Tensor, shape: tuple[int, ...]
) -> RawTensor | TensorPlace | KeptOutput:
    """Return an output as bytes on the host, or where it is on the GPU now: at its target, or aside until it has one.

    Raises:
        ServingError: it has less room than it needs, or the device refused.
    """
    name, datatype = tensor.name(), tensor.datatype
    if gpu is None:
        return RawTensor(name, datatype, shape, _host_bytes(request, tensor))
    source = tensor.device if tensor.device is not None and tensor.gpu is gpu else _host_bytes(request, tensor)
    target = request.target(name, source.nbytes)
    if target is not None:
        _bring(gpu, request, source, target)
        return TensorPlace(name, datatype, shape, target.offset, source.nbytes, memory=target.memory)
    if isinstance(source, memoryview):
        return RawTensor(name, datatype, shape, source)
    if request.awaits_room(name, source.nbytes) and (aside := gpu.kept.take(source.shape, source.dtype)) is not None:
        gpu.move(aside.address, source)
        return KeptOutput(name, datatype, shape, aside, gpu.kept)
    return RawTensor(name, datatype, shape, _host_bytes(request, tensor))


def _bring(gpu: Gpu, request: ParcelRequest, source: DeviceArray | memoryview, target: TensorPlace) -> None:
    """Copy an output to where its client wants it on the GPU."""
    address = request.target_address(target, source.nbytes)
    if isinstance(source, DeviceArray):
        gpu.move(address, source)
    else:
        gpu.bring(address, source)


def _host_bytes(request: ParcelRequest, tensor: Tensor) -> memoryview:
    """Return an output's bytes on the host; of one on a GPU, where the client reads them if there is room."""
    if tensor.raw is not None:
        return tensor.raw
    if tensor.device is not None:
        array = request.lend_array(tensor.datatype, tensor.device.shape)
        tensor.copy_to(array)
        return byte_view(array)
    return memoryview(encode_bytes(tensor.data)) if tensor.datatype == "BYTES" else byte_view(tensor.data)
