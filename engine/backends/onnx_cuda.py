"""ONNX Runtime on a GPU: inputs go to fixed device buffers on the instance's own stream, outputs come back likewise.

A batch costs one copy per input and segment, one run and one copy per output; nothing waits for the whole device.
Where shapes are fixed and ``optimization.cuda.graphs`` is set, ONNX Runtime captures one CUDA graph per batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnxruntime as ort

from forebay.engine.backends.base import Array, TensorInstance
from forebay.engine.backends.device_instance import DeviceInstance, PlacedTensor
from forebay.engine.backends.onnx_backend import (
    ONNX_BFLOAT16,
    OnnxInstance,
    Signature,
    check_config,
    find_scalars,
    open_plain_session,
    read_signature,
    runtime_error,
)
from forebay.engine.backends.onnx_options import (
    CUDA_PROVIDER,
    SHRINK_KEY,
    TENSORRT_PROVIDER,
    Provider,
    find_model_file,
    providers,
    session_options,
)
from forebay.engine.devices.base import Device, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.poisoning import DeviceBatch, end_poisoned_process
from forebay.engine.devices.staging import Staging, stream_priority
from forebay.ipc.messages import InstanceSpec
from forebay.ipc.tensor import DATATYPES

#: What ONNX Runtime says when the device's context is lost rather than the request wrong.
_POISONED_TEXTS = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")


def load_on_gpu(spec: InstanceSpec) -> TensorInstance:
    """Load a model on the GPU of the instance.

    Raises:
        ServingError: there is no such GPU, or ONNX Runtime does not take the model.
    """
    device = open_device("cuda", spec.device_id)
    stream = device.make_stream(stream_priority(spec))
    chosen: list[Provider] = []
    if device.kind == "cuda":
        # cuBLAS and cuDNN out of their wheels, if they were installed that way.
        ort.preload_dlls()
        chosen = [with_stream(provider, stream) for provider in providers(spec)]
    session = open_plain_session(spec, find_model_file(spec), session_options(spec), chosen)
    signature = read_signature(spec, session)
    check_config(spec, signature)
    if any(tensor.datatype == "BYTES" for tensor in (*signature.inputs, *signature.outputs)):
        # Strings cannot live on a GPU: ONNX Runtime places what it can by itself.
        return OnnxInstance(spec, session, signature)
    return OnnxDeviceInstance(spec, session, signature, device, stream)


def with_stream(provider: Provider, stream: Stream) -> Provider:
    """Return a GPU provider that works on our stream."""
    if provider.name not in (CUDA_PROVIDER, TENSORRT_PROVIDER):
        return provider
    own = {"has_user_compute_stream": "1", "user_compute_stream": str(stream.handle)}
    return Provider(provider.name, {**provider.options, **own})


class _Binding(NamedTuple):
    """A session bound to device buffers."""

    binding: ort.IOBinding
    options: ort.RunOptions


class OnnxDeviceInstance(DeviceInstance):
    """One session on one GPU, with one stream; or, to be tested without one, on the host as a device."""

    def __init__(
        self,
        spec: InstanceSpec,
        session: ort.InferenceSession,
        signature: Signature,
        device: Device,
        stream: Stream,
    ) -> None:
        """Take ownership of the stream."""
        super().__init__(spec, device, stream)
        self._session = session
        #: ONNX Runtime's name for the device.
        self._place = "cuda" if device.kind == "cuda" else "cpu"
        self._ort_index = device.index if device.kind == "cuda" else 0
        self._staging = Staging(device, stream)
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*signature.inputs, *signature.outputs)}
        self._scalars = find_scalars(spec, signature)
        self._shrink = spec.parameters.get(SHRINK_KEY)
        self._run_options = self._make_options(-1)
        is_fixed = all(tensor.is_fixed for tensor in (*spec.inputs, *spec.outputs))
        self._uses_graphs = bool(spec.optimization.get("cuda_graphs")) and is_fixed
        self._max_rows = max(spec.max_batch_size, 1)
        #: Shapes of one fixed batch, and the staging's generation, to its binding.
        self._bindings: dict[tuple[object, ...], _Binding] = {}

    # --- requests ---

    def compute(self, batch: Sequence[Mapping[str, PlacedTensor]], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        binding = self._session.io_binding()
        for name, array in self._staging.gather(batch).items():
            chosen = () if name in self._scalars else array.shape
            element = self._element(name, array)
            binding.bind_input(name, self._place, self._ort_index, element, chosen, array.address)
        for name in outputs:
            binding.bind_output(name, self._place, self._ort_index)
        self._execute(binding, self._run_options)
        values: list[Any] = binding.get_outputs()
        results: dict[str, DeviceArray] = {}
        for name, value in zip(outputs, values, strict=True):
            shape = (1,) if name in self._scalars else tuple(value.shape())
            # The value owns the memory.
            results[name] = DeviceArray(value.data_ptr(), shape, DATATYPES[self._datatypes[name]].numpy_dtype, value)
        return results

    def run_segments(self, segments: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> None:
        """Run one batch made of several runs of rows: each goes to its place in the device buffers with one copy per
        tensor, without a gathering copy on the host.

        Args:
            segments: (inputs, outputs) by name, each ``[rows, *dims]`` and of fixed shapes; in the order of the batch.

        Raises:
            BackendFailed: with Triton's text.
        """
        with DeviceBatch(self.device, self.stream):
            first_inputs, first_outputs = segments[0]
            rows = [next(iter(ins.values())).shape[0] if ins else 1 for ins, _outs in segments]
            total = sum(rows) if len(segments) > 1 else 0
            addresses = {
                name: self._reserve(name, array, total) for part in segments[0] for name, array in part.items()
            }
            offset_rows = 0
            for (ins, _outs), count in zip(segments, rows, strict=True):
                for name, array in ins.items():
                    if array.nbytes:
                        offset = offset_rows * (array.nbytes // max(count, 1))
                        self.stream.copy_in(addresses[name] + offset, array.ctypes.data, array.nbytes)
                offset_rows += count
            bound = self._bound(first_inputs, first_outputs, total, addresses)
            self._execute(bound.binding, bound.options)
            offset_rows = 0
            for (_ins, outs), count in zip(segments, rows, strict=True):
                for name, array in outs.items():
                    if array.nbytes:
                        offset = offset_rows * (array.nbytes // max(count, 1))
                        self.stream.copy_out(array.ctypes.data, addresses[name] + offset, array.nbytes)
                offset_rows += count

    def _reserve(self, name: str, array: Array, total_rows: int) -> int:
        """Return the tensor's buffer: for graphs, and to move it rarely, with room for the largest batch at once."""
        rows = array.shape[0] if array.ndim else 1
        row_bytes = array.nbytes // max(rows, 1)
        return self._staging.reserve(name, max(array.nbytes, row_bytes * max(total_rows, self._max_rows)))

    def _bound(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], total_rows: int, addresses: Mapping[str, int]
    ) -> _Binding:
        shapes = {
            name: (total_rows, *array.shape[1:]) if total_rows else array.shape
            for part in (inputs, outputs)
            for name, array in part.items()
        }
        key = (self._staging.generation, tuple(outputs), *shapes.items())
        bound = self._bindings.get(key)
        if bound is None:
            if len(self._bindings) >= _BINDINGS_MAX or any(old[0] != key[0] for old in self._bindings):
                self._bindings.clear()
            binding = self._session.io_binding()
            for name, array in inputs.items():
                self._bind_input(binding, name, array, addresses[name], shapes[name])
            for name, array in outputs.items():
                shape = () if name in self._scalars else shapes[name]
                element = self._element(name, array)
                binding.bind_output(name, self._place, self._ort_index, element, shape, addresses[name])
            graph = len(self._bindings) + 1 + self._staging.generation * _BINDINGS_MAX if self._uses_graphs else -1
            bound = self._bindings[key] = _Binding(binding, self._make_options(graph))
        elif self._uses_graphs:
            # ONNX Runtime captures at the first run of a binding, and launches from then on.
            self.device.traffic.graph_launches += 1
        return bound

    def _bind_input(
        self, binding: ort.IOBinding, name: str, array: Array, address: int, shape: tuple[int, ...] | None = None
    ) -> None:
        chosen = () if name in self._scalars else array.shape if shape is None else shape
        binding.bind_input(name, self._place, self._ort_index, self._element(name, array), chosen, address)

    def _element(self, name: str, array: PlacedTensor) -> object:
        return ONNX_BFLOAT16 if self._datatypes[name] == "BF16" else array.dtype

    def _make_options(self, graph: int) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._shrink is not None:
            options.add_run_config_entry(SHRINK_KEY, self._shrink)
        # We wait for our stream ourselves, after the copies.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # -1: neither captured nor replayed.
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _execute(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime raises its own classes, all directly under Exception
            if any(text in str(error) for text in _POISONED_TEXTS):
                end_poisoned_process(error)
            raise runtime_error(error) from None

    def close(self) -> None:
        # The session's work ends before the memory that it works on goes.
        self._bindings.clear()
        del self._session
        self._staging.close()
        self._arenas.close()
        self.stream.close()


#: Bindings kept; at the limit all are dropped.
_BINDINGS_MAX = 256
