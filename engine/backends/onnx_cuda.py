"""ONNX Runtime on a GPU: inputs go to fixed device buffers on the instance's own stream, outputs come back likewise.

A batch costs one copy per input and segment, one run and one copy per output; nothing waits for the whole device.
Where shapes are fixed and ``optimization.cuda.graphs`` is set, ONNX Runtime captures one CUDA graph per batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from forebay.engine.backends.base import Array, Arrays, TensorInstance
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
from forebay.engine.backends.watched_instance import WatchedInstance
from forebay.engine.devices.base import Device, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.staging import Staging, stream_priority
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.worker_messages import InstanceSpec

#: ``gpu_graph_id`` of runs that are neither captured nor replayed.
_NO_GRAPH = -1


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
        return WatchedInstance(OnnxInstance(spec, session, signature), device)
    on_host = inputs_on_host(session) if device.kind == "cuda" else frozenset[str]()
    return OnnxDeviceInstance(spec, session, signature, device, stream, on_host)


def inputs_on_host(session: ort.InferenceSession) -> frozenset[str]:
    """Return the inputs that a session on a GPU reads in host memory: shapes, and what nodes on the CPU take.

    So may inputs in place of initializers be, of which ONNX Runtime does not tell.
    """
    places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    names = {node.name for node, memory in places if memory.name.lower().startswith("cpu")}
    return frozenset(names | {node.name for node in session.get_overridable_initializers()})


def with_stream(provider: Provider, stream: Stream) -> Provider:
    """Return a GPU provider that works on our stream."""
    if provider.name not in (CUDA_PROVIDER, TENSORRT_PROVIDER):
        return provider
    # That there is one is no option of its own: the TensorRT provider would refuse it.
    return Provider(provider.name, {**provider.options, "user_compute_stream": str(stream.handle)})


class _Binding(NamedTuple):
    """A session bound to device buffers."""

    binding: ort.IOBinding
    options: ort.RunOptions
    graph: int


class OnnxDeviceInstance(DeviceInstance):
    """One session on one GPU, with one stream; or, to be tested without one, on the host as a device."""

    def __init__(
        self,
        spec: InstanceSpec,
        session: ort.InferenceSession,
        signature: Signature,
        device: Device,
        stream: Stream,
        on_host: frozenset[str] = frozenset(),
    ) -> None:
        """Take ownership of the stream.

        Args:
            on_host: inputs that the session reads in host memory.
        """
        super().__init__(spec, device, stream)
        self._session = session
        self._on_host = on_host
        #: What the last run may still read there.
        self._host_inputs: Arrays = {}
        #: ONNX Runtime's name for the device.
        self._place = "cuda" if device.kind == "cuda" else "cpu"
        self._ort_index = device.index if device.kind == "cuda" else 0
        self._is_batching = spec.max_batch_size > 0
        self._is_fixed = all(tensor.is_fixed for tensor in (*spec.inputs, *spec.outputs))
        # With room for the largest batch at once, so that nothing moves.
        self._staging = Staging(device, stream, rows_max=spec.max_batch_size if self._is_fixed else 0)
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*signature.inputs, *signature.outputs)}
        self._scalars = find_scalars(spec, signature)
        self._shrink = spec.parameters.get(SHRINK_KEY)
        self._run_options = self._make_options(_NO_GRAPH)
        # What a graph read on the host when it was captured it would have read for good.
        reads_host = any(tensor.name in on_host for tensor in spec.inputs)
        self._uses_graphs = bool(spec.optimization.get("cuda_graphs")) and self._is_fixed and not reads_host
        self._output_dims = {tensor.name: tensor.backend_dims for tensor in spec.outputs}
        #: By rows and outputs, bound to buffers as of one generation of the staging.
        self._bindings: dict[tuple[object, ...], _Binding] = {}
        self._bound_generation = 0
        self._graph_count = 0

    # --- requests ---

    def compute(self, batch: Sequence[Mapping[str, PlacedTensor]], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        self._host_inputs = {name: self._join_on_host(name, batch) for name in batch[0] if name in self._on_host}
        placed = self._staging.gather(
            [{name: tensors[name] for name in tensors if name not in self._host_inputs} for tensors in batch]
            if self._host_inputs
            else batch
        )
        if self._is_fixed:
            return self._compute_fixed(placed, outputs)
        binding = self._session.io_binding()
        self._bind_inputs(binding, placed)
        self._bind_host_inputs(binding)
        for name in outputs:
            binding.bind_output(name, self._place, self._ort_index)
        self._execute(binding, self._run_options)
        values: list[Any] = binding.get_outputs()
        results: dict[str, DeviceArray] = {}
        for name, value in zip(outputs, values, strict=True):
            shape = (1,) if name in self._scalars else tuple(value.shape())
            # The value owns the memory.
            results[name] = DeviceArray(value.data_ptr(), shape, self._dtype(name), value)
        return results

    def _join_on_host(self, name: str, batch: Sequence[Mapping[str, PlacedTensor]]) -> Array:
        parts: list[Array] = []
        for tensors in batch:
            tensor = tensors[name]
            parts.append(self.fetch({name: tensor})[name] if isinstance(tensor, DeviceArray) else tensor)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _compute_fixed(self, placed: Mapping[str, DeviceArray], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        """Run on buffers that stay where they are, bound once for each number of rows; graphs want it so."""
        shapes = [array.shape for arrays in (placed, self._host_inputs) for array in arrays.values()]
        rows = shapes[0][0] if shapes and self._is_batching else 0
        results = {
            name: self._staging.place(name, self._output_shape(name, rows), self._dtype(name)) for name in outputs
        }
        generation = self._staging.generation
        key = (rows, tuple(placed), tuple(self._host_inputs), *outputs)
        if generation != self._bound_generation:
            self._forget_bindings()
            self._bound_generation = generation
        bound = self._bindings.get(key)
        if bound is None:
            if len(self._bindings) >= _BINDINGS_MAX:
                self._forget_bindings()
            bound = self._bindings[key] = self._bind_fixed(placed, results)
        elif self._uses_graphs:
            # ONNX Runtime captures at the first run of a binding, and launches from then on.
            self.device.traffic.graph_launches += 1
        self._bind_host_inputs(bound.binding)
        self._execute(bound.binding, bound.options)
        return results

    def _bind_fixed(self, placed: Mapping[str, DeviceArray], results: Mapping[str, DeviceArray]) -> _Binding:
        binding = self._session.io_binding()
        self._bind_inputs(binding, placed)
        for name, array in results.items():
            element = self._element(name, array)
            binding.bind_output(name, self._place, self._ort_index, element, self._shape(name, array), array.address)
        self._graph_count += 1
        graph = self._graph_count if self._uses_graphs else _NO_GRAPH
        return _Binding(binding, self._make_options(graph), graph)

    def _forget_bindings(self) -> None:
        for bound in self._bindings.values():
            if bound.graph != _NO_GRAPH:
                self._session.release_captured_graph(bound.graph)
        self._bindings.clear()

    def _bind_inputs(self, binding: ort.IOBinding, placed: Mapping[str, DeviceArray]) -> None:
        for name, array in placed.items():
            element = self._element(name, array)
            binding.bind_input(name, self._place, self._ort_index, element, self._shape(name, array), array.address)

    def _bind_host_inputs(self, binding: ort.IOBinding) -> None:
        # Anew for each run: ONNX Runtime may copy at once what lies elsewhere than it is read.
        for name, array in self._host_inputs.items():
            element = self._element(name, array)
            binding.bind_input(name, "cpu", 0, element, self._shape(name, array), array.ctypes.data)

    def _shape(self, name: str, array: PlacedTensor) -> tuple[int, ...]:
        return () if name in self._scalars else array.shape

    def _output_shape(self, name: str, rows: int) -> tuple[int, ...]:
        dims = self._output_dims[name]
        return (rows, *dims) if self._is_batching else dims

    def _dtype(self, name: str) -> np.dtype[np.generic]:
        return DATATYPES[self._datatypes[name]].numpy_dtype

    def _element(self, name: str, array: PlacedTensor) -> object:
        return ONNX_BFLOAT16 if self._datatypes[name] == "BF16" else array.dtype

    def _make_options(self, graph: int) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._shrink is not None:
            options.add_run_config_entry(SHRINK_KEY, self._shrink)
        # We wait for our stream ourselves, after the copies.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _execute(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime raises its own classes, all directly under Exception
            raise runtime_error(error) from None

    def close(self) -> None:
        # The session's work ends before the memory that it works on goes.
        self.stream.synchronize()
        self._bindings.clear()
        del self._session
        self._staging.close()
        self._arenas.close()
        self.stream.close()


#: Bindings kept; at the limit all are dropped.
_BINDINGS_MAX = 256
