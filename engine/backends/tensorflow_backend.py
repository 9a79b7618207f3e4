"""TensorFlow SavedModel and frozen graphs (platforms ``tensorflow_savedmodel`` and ``tensorflow_graphdef``).

Triton shipped this backend up to 25.02 (spec B-085, L-045); configurations written for it keep working. A model is one
signature of ``model.savedmodel/``, or the graph of ``model.graphdef`` with the configuration's names as its tensors.
TensorFlow starts threads when it is imported, so that each worker imports it after the fork, at the cost of some
seconds. A SavedModel holds no Python code, but its graph may read and write files: load only what you trust.

Model parameters, as in Triton's backend: ``TF_NUM_INTRA_THREADS``, ``TF_NUM_INTER_THREADS``, ``TF_GRAPH_TAG``,
``TF_SIGNATURE_DEF``, ``TF_INIT_OPS_FILE`` (refused).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from forebay.engine.backends.base import (
    Array,
    Arrays,
    Backend,
    DescribedModel,
    DescribedTensor,
    TensorInstance,
    parse_int,
)
from forebay.ipc.errors import BackendFailed, InvalidArgument, ServingError, Unavailable, Unsupported
from forebay.ipc.tensor import shape_text
from forebay.ipc.worker_messages import InstanceSpec

#: TensorFlow's dtype names to config.pbtxt's.
_DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
    "bfloat16": "TYPE_BF16",
}

DEFAULT_TAG = "serve"
DEFAULT_SIGNATURE = "serving_default"

#: ``name:0``, as tensors of a graph are called.
_TENSOR_NAME = re.compile(r"^(.+):(\d+)$")

#: TensorFlow's CPU accelerators that Triton knew; they are hints that this build applies by itself.
_ACCELERATORS = frozenset({"auto_mixed_precision", "gpu_io", "tensorrt"})

Call = Callable[..., Mapping[str, Any]]


class FoundTensor(NamedTuple):
    """One input or output of a signature."""

    name: str
    data_type: str
    """``TYPE_*``"""
    shape: tuple[int, ...] | None
    """-1 for a size that varies; None: the rank is unknown"""


class Signature(NamedTuple):
    """A model, ready to be called with keyword arguments."""

    inputs: tuple[FoundTensor, ...]
    outputs: tuple[FoundTensor, ...]
    call: Call
    keep_alive: object
    """Variables live as long as the loaded object."""


def import_tensorflow(spec: InstanceSpec) -> Any:
    """Import TensorFlow into this worker, with the threads that the model wants.

    Raises:
        ServingError: a parameter is wrong.
    """
    intra = parse_int(spec.parameters, "TF_NUM_INTRA_THREADS", 0)
    inter = parse_int(spec.parameters, "TF_NUM_INTER_THREADS", 0)
    # Its C++ log goes to standard error past ours; errors are raised anyway.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if spec.kind != "GPU":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(intra if intra > 0 else max(len(spec.cores), 1))
    tf.config.threading.set_inter_op_parallelism_threads(inter if inter > 0 else 1)
    if spec.kind == "GPU":
        _use_gpu(tf, spec)
    return tf


def _use_gpu(tf: Any, spec: InstanceSpec) -> None:
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        raise Unsupported(f"model '{spec.model}': this build of TensorFlow sees no GPU; set 'kind: KIND_CPU'")
    if spec.device_id >= len(devices):
        raise InvalidArgument(f"model '{spec.model}': TensorFlow sees {len(devices)} GPUs, none is {spec.device_id}")
    device = devices[spec.device_id]
    tf.config.set_visible_devices([device], "GPU")
    # The other instances on this GPU need memory too.
    tf.config.experimental.set_memory_growth(device, True)


def check_accelerators(spec: InstanceSpec) -> None:
    """Refuse accelerators that this backend does not know (spec C-053).

    Raises:
        InvalidArgument: with Triton's text.
    """
    optimization = spec.optimization
    for accelerator in (*optimization.get("gpu_accelerators", ()), *optimization.get("cpu_accelerators", ())):
        if accelerator["name"] not in _ACCELERATORS:
            raise InvalidArgument(f"unknown Execution Accelerator '{accelerator['name']}' is requested")


def load_signature(spec: InstanceSpec) -> Signature:
    """Load the model.

    Raises:
        ServingError: the text names the model, the file and the cause.
    """
    check_accelerators(spec)
    if spec.parameters.get("TF_INIT_OPS_FILE"):
        raise Unsupported(
            f"model '{spec.model}': TF_INIT_OPS_FILE is not supported; save the initialised model as a SavedModel"
        )
    is_graph = spec.platform == "tensorflow_graphdef"
    name = spec.model_file or ("model.graphdef" if is_graph else "model.savedmodel")
    path = os.path.join(spec.version_path, name)
    if not (os.path.isfile(path) if is_graph else os.path.isdir(path)):
        raise Unavailable(f"unable to find '{path}' for model instance '{spec.instance_name}'")
    tf = import_tensorflow(spec)
    try:
        return _load_graph(tf, spec, path) if is_graph else _load_saved_model(tf, spec, path)
    except ServingError:
        raise
    except Exception as error:  # TensorFlow raises OSError, ValueError and classes of its own
        raise InvalidArgument(
            f"failed to load TensorFlow model '{spec.model}' version {spec.version} from {name}: {_first_lines(error)}"
        ) from None


def _load_saved_model(tf: Any, spec: InstanceSpec, path: str) -> Signature:
    tag = spec.parameters.get("TF_GRAPH_TAG", DEFAULT_TAG)
    wanted = spec.parameters.get("TF_SIGNATURE_DEF", DEFAULT_SIGNATURE)
    loaded = tf.saved_model.load(path, tags=[tag])
    available = sorted(name for name in loaded.signatures if not name.startswith("__"))
    if wanted not in available and "TF_SIGNATURE_DEF" not in spec.parameters and len(available) == 1:
        wanted = available[0]
    if wanted not in available:
        raise InvalidArgument(
            f"model '{spec.model}': the SavedModel has no signature '{wanted}'; it has: {', '.join(available)}; "
            "name one with the parameter TF_SIGNATURE_DEF"
        )
    function = loaded.signatures[wanted]
    _positional, keyword = function.structured_input_signature
    return Signature(
        inputs=tuple(_found(spec, name, keyword[name]) for name in sorted(keyword)),
        outputs=tuple(_found(spec, name, value) for name, value in sorted(function.structured_outputs.items())),
        call=function,
        keep_alive=loaded,
    )


def _load_graph(tf: Any, spec: InstanceSpec, path: str) -> Signature:
    if not spec.inputs or not spec.outputs:
        raise InvalidArgument(
            f"model '{spec.model}': a graph does not say which of its tensors are inputs and outputs; "
            "the model configuration must"
        )
    definition = tf.compat.v1.GraphDef()
    with open(path, "rb") as file:
        definition.ParseFromString(file.read())
    wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    feeds = {tensor.name: wrapped.graph.as_graph_element(_tensor_name(tensor.name)) for tensor in spec.inputs}
    fetches = {tensor.name: wrapped.graph.as_graph_element(_tensor_name(tensor.name)) for tensor in spec.outputs}
    order = tuple(feeds)
    pruned = wrapped.prune([feeds[name] for name in order], fetches)

    def call(**inputs: Any) -> Mapping[str, Any]:
        results: Mapping[str, Any] = pruned(*(inputs[name] for name in order))
        return results

    return Signature(
        inputs=tuple(_found(spec, name, value) for name, value in feeds.items()),
        outputs=tuple(_found(spec, name, value) for name, value in fetches.items()),
        call=call,
        keep_alive=(wrapped, pruned),
    )


def _tensor_name(name: str) -> str:
    return name if _TENSOR_NAME.match(name) else f"{name}:0"


def _found(spec: InstanceSpec, name: str, value: Any) -> FoundTensor:
    data_type = _DATA_TYPES.get(value.dtype.name)
    if data_type is None:
        raise InvalidArgument(
            f"model '{spec.model}', tensor '{name}': unsupported TensorFlow type '{value.dtype.name}'"
        )
    shape = None if value.shape.rank is None else tuple(-1 if dim is None else int(dim) for dim in value.shape)
    return FoundTensor(name, data_type, shape)


def check_config(spec: InstanceSpec, signature: Signature) -> None:
    """Compare a configuration with the signature.

    Raises:
        InvalidArgument: with the texts of Triton's backend.
    """
    for kind, configured, found in (
        ("input", spec.inputs, signature.inputs),
        ("output", spec.outputs, signature.outputs),
    ):
        known = {tensor.name: tensor for tensor in found}
        if kind == "input" and len(configured) != len(found):
            raise InvalidArgument(
                f"unable to load model '{spec.model}', configuration expects {len(configured)} inputs, "
                f"model provides {len(found)}: {', '.join(known)}"
            )
        for tensor in configured:
            match = known.get(tensor.name)
            if match is None:
                raise InvalidArgument(
                    f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(sorted(known))}"
                )
            data_type = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
            if data_type != match.data_type:
                raise InvalidArgument(
                    f"unable to load model '{spec.model}', configuration expects datatype {data_type} for {kind} "
                    f"'{tensor.name}', model provides {match.data_type}"
                )
            dims = (-1, *tensor.backend_dims) if spec.max_batch_size > 0 else tensor.backend_dims
            if match.shape is not None and not _fits(match.shape, dims) and (match.shape or dims != (1,)):
                raise InvalidArgument(
                    f"unable to load model '{spec.model}', tensor '{tensor.name}': the model expects "
                    f"{len(match.shape)} dimensions (shape {shape_text(match.shape)}) but the model configuration "
                    f"specifies {len(dims)} dimensions (shape {shape_text(dims)})"
                )


def _fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    return len(shape) == len(dims) and all(have in (-1, want) for have, want in zip(shape, dims, strict=True))


class TensorflowInstance(TensorInstance):
    """One signature of one model."""

    def __init__(self, spec: InstanceSpec, signature: Signature) -> None:
        import tensorflow as tf

        self._tf: Any = tf
        self._signature = signature
        self._bf16 = frozenset(tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.datatype == "BF16")
        #: Scalars of models that do not batch, which are configured as ``dims: [1]`` (spec D-013).
        self._scalars = frozenset(
            tensor.name
            for tensor in (*signature.inputs, *signature.outputs)
            if tensor.shape == () and spec.max_batch_size == 0
        )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        tf = self._tf
        try:
            results = self._signature.call(**{name: self._tensor(name, array) for name, array in inputs.items()})
            arrays: Arrays = {}
            for name in outputs:
                value = results[name]
                array = _as_array((tf.bitcast(value, tf.uint16) if name in self._bf16 else value).numpy())
                arrays[name] = array.reshape(1) if name in self._scalars else array
        except Exception as error:  # see load_signature
            raise BackendFailed(f"TensorFlow execute failure: {_first_lines(error)}") from None
        return arrays

    def _tensor(self, name: str, array: Array) -> Any:
        tensor = self._tf.constant(array.reshape(()) if name in self._scalars else array)
        return self._tf.bitcast(tensor, self._tf.bfloat16) if name in self._bf16 else tensor


def _as_array(value: Any) -> Array:
    if not isinstance(value, bytes):
        array: Array = np.asarray(value, order="C")
        return array
    # A scalar string.
    text: Array = np.empty((), dtype=np.object_)
    text[()] = value
    return text


def _first_lines(error: Exception) -> str:
    """Return what went wrong without the traceback of where the graph was made."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [
        line for line in lines if not line.startswith(("Detected at node", "<stack traces", "Graph execution error"))
    ]
    return " ".join((told or lines)[:3])[:2000] or type(error).__name__


class TensorflowBackend(Backend):
    """``backend: "tensorflow"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        signature = load_signature(spec)
        return DescribedModel(
            inputs=tuple(_described(tensor) for tensor in signature.inputs),
            outputs=tuple(_described(tensor) for tensor in signature.outputs),
        )

    def load(self, spec: InstanceSpec) -> TensorInstance:
        signature = load_signature(spec)
        check_config(spec, signature)
        return TensorflowInstance(spec, signature)


def _described(tensor: FoundTensor) -> DescribedTensor:
    if tensor.shape is None:
        raise InvalidArgument(
            f"tensor '{tensor.name}' has no known rank; write it into the model configuration (input or output)"
        )
    return DescribedTensor(tensor.name, tensor.data_type, tensor.shape)


BACKEND = TensorflowBackend
