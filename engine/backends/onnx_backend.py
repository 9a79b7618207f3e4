"""ONNX Runtime on the CPU. Inputs and outputs are bound where they lie in the slab; see FACTS 3 for what that costs.

What a configuration may say is in ``onnx_options.py``, how instances share weights in ``onnx_weights.py``, and how a
session runs on a GPU in ``onnx_cuda.py``.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from forebay.engine.backends.base import (
    Array,
    Arrays,
    Backend,
    DescribedModel,
    DescribedTensor,
    TensorInstance,
)
from forebay.engine.backends.onnx_options import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    SHRINK_KEY,
    Provider,
    find_model_file,
    providers,
    session_options,
)
from forebay.engine.backends.onnx_weights import find_shared_copy
from forebay.engine.backends.shared_models import shared
from forebay.engine.devices.opening import played_gpu_count
from forebay.engine.repository.auto_complete import DescribedModel as ComparedModel
from forebay.engine.repository.auto_complete import DescribedTensor as ComparedTensor
from forebay.engine.repository.auto_complete import check_described
from forebay.engine.repository.config import parse_config_json
from forebay.engine.repository.model_config_schema import ModelConfig, message_class
from forebay.ipc.errors import BackendFailed, Internal, InvalidArgument, ServingError
from forebay.ipc.log import log
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.worker_messages import InstanceSpec

#: ONNX Runtime's type to the datatype of the protocol; sequences, maps and optional types are not served (spec B-029).
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
    "tensor(bfloat16)": "BF16",
}

#: onnx.TensorProto.BFLOAT16, for which numpy has no type.
ONNX_BFLOAT16 = 16

# Built once in the zygote, the configuration's descriptors are shared by its workers.
message_class("ModelConfig")


class GraphTensor(NamedTuple):
    """One input or output as the session declares it."""

    name: str
    datatype: str
    """Protocol name, for example ``FP32``."""
    shape: tuple[int, ...]
    """-1 for a size that varies; () also for a tensor of unknown rank: ONNX Runtime does not tell the two apart."""
    is_optional: bool = False
    """An initializer that an input may replace."""


class Signature(NamedTuple):
    """What a session takes and gives."""

    inputs: tuple[GraphTensor, ...]
    """Those that may be left out come last."""
    outputs: tuple[GraphTensor, ...]


def open_session(spec: InstanceSpec, *, share_weights: bool) -> ort.InferenceSession:
    """Open the model file as the configuration wants it.

    Args:
        share_weights: use, or make, the copy that all instances map.

    Raises:
        ServingError: a setting is wrong, or ONNX Runtime does not take the file.
    """
    path = find_model_file(spec)
    chosen = providers(spec)
    options = session_options(spec)
    only_cpu = [provider.name for provider in chosen] == [CPU_PROVIDER]
    if share_weights and only_cpu:
        copy = find_shared_copy(spec, path, functools.partial(session_options, spec))
        if copy is not None:
            session = _open_copy(spec, copy)
            if session is not None:
                return session
    return open_plain_session(spec, path, options, chosen)


def _open_copy(spec: InstanceSpec, copy: str) -> ort.InferenceSession | None:
    options = session_options(spec)
    # It is optimised already.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(copy, options, providers=[CPU_PROVIDER])
    except Exception as error:  # see open_plain_session
        log.warning(f"model '{spec.model}': the copy with shared weights cannot be used, loading plainly: {error}")
        return None


def open_plain_session(
    spec: InstanceSpec, path: str, options: ort.SessionOptions, chosen: Sequence[Provider]
) -> ort.InferenceSession:
    """Open a model file with these providers and no others.

    Raises:
        InvalidArgument: ONNX Runtime does not take the file.
        Internal: a provider could not be started.
    """
    try:
        # Otherwise a provider that fails is silently replaced by the CPU's, now or in the middle of serving.
        session = ort.InferenceSession(
            path, options, providers=[(provider.name, provider.options) for provider in chosen], enable_fallback=False
        )
    except Exception as error:  # ONNX Runtime raises its own classes, all directly under Exception
        text = without_source_places(str(error))
        raise InvalidArgument(f"failed to load ONNX model '{spec.model}' version {spec.version}: {text}") from None
    wanted = {provider.name for provider in chosen}
    if missing := wanted - set(session.get_providers()):
        raise Internal(
            f"failed to load ONNX model '{spec.model}' version {spec.version}: ONNX Runtime could not start "
            f"{', '.join(sorted(missing))}; its reason is in the log above"
        )
    return session


def read_signature(spec: InstanceSpec, session: ort.InferenceSession) -> Signature:
    """Return what the session takes and gives.

    Raises:
        InvalidArgument: a tensor has a type that cannot be served.
    """
    inputs = _graph_tensors(spec, session.get_inputs(), is_optional=False)
    replaceable = _graph_tensors(spec, session.get_overridable_initializers(), is_optional=True)
    return Signature((*inputs, *replaceable), _graph_tensors(spec, session.get_outputs(), is_optional=False))


def _graph_tensors(spec: InstanceSpec, nodes: Sequence[Any], *, is_optional: bool) -> tuple[GraphTensor, ...]:
    tensors: list[GraphTensor] = []
    for node in nodes:
        datatype = _DATATYPES.get(node.type)
        if datatype is None:
            if is_optional:
                continue
            raise InvalidArgument(f"model '{spec.model}', tensor '{node.name}': unsupported ONNX type '{node.type}'")
        shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
        tensors.append(GraphTensor(node.name, datatype, shape, is_optional))
    return tuple(tensors)


def check_config(spec: InstanceSpec, signature: Signature) -> None:
    """Compare a configuration with the model file (spec B-011, B-020..B-026).

    Raises:
        ConfigError: they contradict each other; with Triton's texts.
    """
    config = parse_config_json(spec.config_json.decode())
    config.message.name = spec.model
    check_described(
        config,
        ComparedModel(
            inputs=tuple(_compared(config, "input", tensor) for tensor in signature.inputs),
            outputs=tuple(_compared(config, "output", tensor) for tensor in signature.outputs),
        ),
    )


def _compared(config: ModelConfig, direction: str, tensor: GraphTensor) -> ComparedTensor:
    message = config.message
    shape = tensor.shape
    if not shape and message.max_batch_size == 0:
        # A scalar is configured as dims [1]; a tensor of unknown rank as whatever the author knows better than the
        # file. The two look alike here.
        for given in getattr(message, direction):
            if given.name == tensor.name and not given.HasField("reshape"):
                shape = tuple(given.dims)
    return ComparedTensor(tensor.name, DATATYPES[tensor.datatype].config_name, shape, optional=tensor.is_optional)


class OnnxInstance(TensorInstance):
    """One session on the CPU. ``bind`` costs some 12 µs, a bound run of the example model 4 µs (measured, 1 row)."""

    def __init__(self, spec: InstanceSpec, session: ort.InferenceSession, signature: Signature) -> None:
        self._session = session
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*signature.inputs, *signature.outputs)}
        self._strings = frozenset(name for name, datatype in self._datatypes.items() if datatype == "BYTES")
        self._has_bf16 = "BF16" in self._datatypes.values()
        self._scalars = find_scalars(spec, signature)
        # Outputs that nobody wants are neither fetched nor copied (spec B-027). ONNX Runtime computes them all the
        # same: only its training builds heed only_execute_path_to_fetches (microsoft/onnxruntime#16013).
        self._run_options = make_run_options(spec)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        if self._has_bf16:
            return self._run_bound_once(inputs, outputs)
        feed: dict[str, Any] = dict(inputs)
        for name in self._strings & feed.keys():
            feed[name] = decode_strings(name, feed[name])
        for name in self._scalars & feed.keys():
            feed[name] = feed[name].reshape(())
        try:
            results = self._session.run(list(outputs), feed, self._run_options)
        except Exception as error:  # see open_plain_session
            raise runtime_error(error) from None
        return {
            name: np.ascontiguousarray(result).reshape(1 if name in self._scalars else result.shape)
            for name, result in zip(outputs, results, strict=True)
        }

    def _run_bound_once(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        # numpy has no bfloat16: tensors go in and come out as OrtValues over uint16 memory.
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if name in self._strings:
                binding.bind_cpu_input(name, decode_strings(name, array))
            else:
                self._bind_input(binding, name, array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._run_binding(binding, inputs, outputs)
        results: Arrays = {}
        for name, value in zip(outputs, binding.get_outputs(), strict=True):
            result = copy_bf16(value) if self._datatypes[name] == "BF16" else value.numpy()
            results[name] = result.reshape(1) if name in self._scalars else result
        return results

    def _bind_input(self, binding: ort.IOBinding, name: str, array: Array) -> None:
        binding.bind_input(name, "cpu", 0, self._element(name, array), self._shape(name, array), array.ctypes.data)

    def _element(self, name: str, array: Array) -> object:
        return ONNX_BFLOAT16 if self._datatypes[name] == "BF16" else array.dtype

    def _shape(self, name: str, array: Array) -> tuple[int, ...]:
        return () if name in self._scalars else array.shape

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            self._bind_input(binding, name, array)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, self._element(name, array), self._shape(name, array), array.ctypes.data)
        # The arrays are passed along to live as long as the binding, which knows their addresses only.
        return functools.partial(self._run_binding, binding, inputs, outputs)

    def _run_binding(self, binding: ort.IOBinding, inputs: Mapping[str, Array], outputs: object) -> None:
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # see open_plain_session
            raise self._explain(error, inputs) from None

    def _explain(self, error: Exception, inputs: Mapping[str, Array]) -> ServingError:
        # Python's call for bindings drops the status code that Triton shows; the plain call has it.
        if not self._has_bf16:
            try:
                self.run(inputs, ())
            except ServingError as explained:
                return explained
        return runtime_error(error)

    def close(self) -> None:
        del self._session


def make_run_options(spec: InstanceSpec) -> ort.RunOptions | None:
    """Return what the configuration wants of every run, or None for nothing."""
    shrink = spec.parameters.get(SHRINK_KEY)
    if shrink is None:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry(SHRINK_KEY, shrink)
    return options


def find_scalars(spec: InstanceSpec, signature: Signature) -> frozenset[str]:
    """Return the tensors that are configured as ``dims: [1]`` and are scalars in the model."""
    if spec.max_batch_size > 0:
        return frozenset()
    configured = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    return frozenset(
        tensor.name
        for tensor in (*signature.inputs, *signature.outputs)
        if not tensor.shape
        and (found := configured.get(tensor.name)) is not None
        and found.reshape is None
        and found.dims == (1,)
    )


def copy_bf16(value: ort.OrtValue) -> Array:
    """Return a bfloat16 tensor in host memory as uint16."""
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, np.uint16)
    return np.frombuffer(ctypes.string_at(value.data_ptr(), 2 * count), np.uint16).reshape(shape)


def decode_strings(name: str, array: Array) -> Array:
    """Return BYTES elements as the ``str`` objects that ONNX Runtime takes (spec B-030).

    Raises:
        InvalidArgument: an element is not UTF-8.
    """
    decoded = np.empty(array.shape, dtype=np.object_)
    try:
        decoded.reshape(-1)[:] = [
            element.decode() if isinstance(element, bytes) else element for element in array.reshape(-1).tolist()
        ]
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input '{name}' has an element that is not UTF-8: {error.reason}") from None
    return decoded


#: What ONNX Runtime's checks put before their texts: the file and line of their C++ code, and the function's signature.
_SOURCE_PLACE = re.compile(r"/\S+\.(?:cc|cpp|cu|h|cuh):\d+ [^()]*(?:\((?:[^()]|\([^()]*\))*\)[^() ]*)+(?: const)? ")


def without_source_places(text: str) -> str:
    """Return a text of ONNX Runtime without the places in its own code, which say nothing about the model."""
    return _SOURCE_PLACE.sub("", text).strip()


def runtime_error(error: Exception) -> BackendFailed:
    """Translate what ONNX Runtime raised.

    It prints ``[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : text``, Triton ``onnx runtime error 2: text`` (spec B-028).
    """
    text = str(error)
    prefix = "[ONNXRuntimeError] : "
    if text.startswith(prefix):
        number, _, rest = text[len(prefix) :].partition(" : ")
        _status, _, message = rest.partition(" : ")
        return BackendFailed(f"onnx runtime error {number}: {message or rest}")
    text = text.removeprefix("Error in execution: ")
    if isinstance(error, UnicodeDecodeError):
        return BackendFailed(f"onnx runtime error 1: the model produced a string that is not UTF-8: {error.reason}")
    return BackendFailed(f"onnx runtime error {2 if isinstance(error, ValueError) else 1}: {text}")


class OnnxBackend(Backend):
    """``backend: "onnxruntime"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        signature = read_signature(spec, open_session(spec, share_weights=False))
        return DescribedModel(
            inputs=tuple(_described(tensor) for tensor in signature.inputs if not tensor.is_optional),
            outputs=tuple(_described(tensor) for tensor in signature.outputs),
        )

    def load(self, spec: InstanceSpec) -> TensorInstance:
        if (spec.kind == "GPU" and played_gpu_count()) or any(
            provider.name == CUDA_PROVIDER for provider in providers(spec)
        ):
            # Imported only here: a machine without a GPU need not have CuPy.
            from forebay.engine.backends.onnx_cuda import load_on_gpu

            return load_on_gpu(spec)
        # A session may run in several threads at a time.
        key = ("onnxruntime", spec.version_path, spec.kind, len(spec.cores))
        session = shared(key, lambda: open_session(spec, share_weights=True))
        signature = read_signature(spec, session)
        check_config(spec, signature)
        return OnnxInstance(spec, session, signature)


def _described(tensor: GraphTensor) -> DescribedTensor:
    return DescribedTensor(tensor.name, DATATYPES[tensor.datatype].config_name, tensor.shape)


BACKEND = OnnxBackend
