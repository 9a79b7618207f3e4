"""ONNX Runtime. Inputs and outputs are bound where they lie in the slab; see FACTS 3 for what each choice costs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from forebay.engine.backends.base import (
    Array,
    Arrays,
    Backend,
    DescribedModel,
    DescribedTensor,
    TensorInstance,
    parse_int,
)
from forebay.ipc.errors import BackendFailed, InvalidArgument, NotFound
from forebay.ipc.messages import InstanceSpec

_FROM_ONNX = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
    "tensor(bfloat16)": "TYPE_BF16",
}

#: onnx.TensorProto.BFLOAT16, for which numpy has no type.
_ONNX_BFLOAT16 = 16

#: Config's graph level to ONNX Runtime's; Triton's mapping (spec C-050).
_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


def find_model_file(spec: InstanceSpec) -> str:
    """Return the model file; ``model.onnx`` may be a directory that holds one (spec B-010).

    Raises:
        NotFound: with Triton's text.
    """
    path = os.path.join(spec.version_path, spec.model_file or "model.onnx")
    if os.path.isdir(path):
        path = os.path.join(path, "model.onnx")
    if not os.path.isfile(path):
        shown = os.path.join(str(spec.version), spec.model_file or "model.onnx")
        raise NotFound(f"unable to find '{shown}' for model instance '{spec.instance_name}'")
    return path


def _session_options(spec: InstanceSpec) -> ort.SessionOptions:
    parameters = spec.parameters
    options = ort.SessionOptions()
    default_threads = max(len(spec.cores), 1)
    intra = parse_int(parameters, "intra_op_thread_count", 0)
    options.intra_op_num_threads = intra if intra > 0 else default_threads
    inter = parse_int(parameters, "inter_op_thread_count", 0)
    options.inter_op_num_threads = inter if inter > 0 else 1
    if parse_int(parameters, "execution_mode", 0) == 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = parse_int(parameters, "enable_mem_arena", 1) != 0
    options.enable_mem_pattern = parse_int(parameters, "enable_mem_pattern", 1) != 0
    # Spinning threads take the cores of the frontend and the scheduler (FACTS 3).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    key = "session.use_device_allocator_for_initializers"
    if key in parameters:
        options.add_session_config_entry(key, parameters[key])
    graph: dict[str, Any] = spec.optimization.get("graph", {})
    options.graph_optimization_level = _GRAPH_LEVELS.get(
        int(graph.get("level", 0)), ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    options.log_severity_level = 3
    library = spec.extra.get("op_libraries", ())
    for path in library:
        options.register_custom_ops_library(os.path.join(spec.model_path, path))
    return options


def _open_session(spec: InstanceSpec) -> ort.InferenceSession:
    path = find_model_file(spec)
    options = _session_options(spec)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, all directly under Exception
        text = str(error).replace(path, os.path.join(str(spec.version), os.path.basename(path)))
        raise InvalidArgument(f"failed to load ONNX model '{spec.model}' version {spec.version}: {text}") from None


def _describe_tensors(nodes: Sequence[Any], model: str) -> tuple[DescribedTensor, ...]:
    described: list[DescribedTensor] = []
    for node in nodes:
        data_type = _FROM_ONNX.get(node.type)
        if data_type is None:
            raise InvalidArgument(f"model '{model}', tensor '{node.name}': unsupported ONNX type '{node.type}'")
        shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
        described.append(DescribedTensor(node.name, data_type, shape))
    return tuple(described)


class OnnxInstance(TensorInstance):
    """One session. ``bind`` costs some 12 µs, a bound run of the example model 4 µs (measured, 1 row)."""

    def __init__(self, spec: InstanceSpec, session: ort.InferenceSession) -> None:
        self._session = session
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*spec.inputs, *spec.outputs)}
        self._has_strings = "BYTES" in self._datatypes.values()
        self._has_bf16 = "BF16" in self._datatypes.values()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        if self._has_bf16:
            return self._run_bf16(inputs, outputs)
        feed: dict[str, Any] = dict(inputs)
        if self._has_strings:
            for name, array in inputs.items():
                if self._datatypes[name] == "BYTES":
                    feed[name] = _decode_strings(array)
        try:
            results = self._session.run(list(outputs), feed)
        except Exception as error:
            raise _runtime_error(error) from None
        return {name: np.ascontiguousarray(result) for name, result in zip(outputs, results, strict=True)}

    def _run_bf16(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        # numpy has no bfloat16: tensors go in and come out as OrtValues over uint16 memory.
        binding = self._session.io_binding()
        for name, array in inputs.items():
            self._bind_input(binding, name, array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _runtime_error(error) from None
        results: Arrays = {}
        for name, value in zip(outputs, binding.get_outputs(), strict=True):
            if self._datatypes[name] == "BF16":
                shape = tuple(value.shape())
                source = (np.ctypeslib.ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
                results[name] = np.frombuffer(source, dtype=np.uint16).reshape(shape).copy()
            else:
                results[name] = value.numpy()
        return results

    def _bind_input(self, binding: ort.IOBinding, name: str, array: Array) -> None:
        element = _ONNX_BFLOAT16 if self._datatypes[name] == "BF16" else array.dtype
        binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            self._bind_input(binding, name, array)
        for name, array in outputs.items():
            element = _ONNX_BFLOAT16 if self._datatypes[name] == "BF16" else array.dtype
            binding.bind_output(name, "cpu", 0, element, array.shape, array.ctypes.data)
        # The public run_with_iobinding wraps exactly this call in two Python frames.
        run: Callable[[], None] = functools.partial(_run_bound, self._session, binding, (inputs, outputs))
        return run

    def close(self) -> None:
        del self._session


def _run_bound(session: ort.InferenceSession, binding: ort.IOBinding, _keep_alive: object) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise _runtime_error(error) from None


def _decode_strings(array: Array) -> Array:
    decoded = np.empty(array.shape, dtype=np.object_)
    decoded.reshape(-1)[:] = [
        element.decode("utf-8", "surrogateescape") if isinstance(element, bytes) else element
        for element in array.reshape(-1).tolist()
    ]
    return decoded


def _runtime_error(error: Exception) -> BackendFailed:
    # ONNX Runtime prints "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : text"; Triton "onnx runtime error 2: text" (B-028).
    text = str(error)
    prefix = "[ONNXRuntimeError] : "
    if text.startswith(prefix):
        number, _, rest = text[len(prefix) :].partition(" : ")
        _status, _, message = rest.partition(" : ")
        return BackendFailed(f"onnx runtime error {number}: {message or rest}")
    return BackendFailed(f"onnx runtime error 1: {text}")


class OnnxBackend(Backend):
    """``backend: "onnxruntime"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        session = _open_session(spec)
        return DescribedModel(
            _describe_tensors(session.get_inputs(), spec.model), _describe_tensors(session.get_outputs(), spec.model)
        )

    def load(self, spec: InstanceSpec) -> TensorInstance:
        return OnnxInstance(spec, _open_session(spec))


BACKEND = OnnxBackend
