"""PyTorch: TorchScript files, AOTInductor packages and plain modules (spec 8.3, FACTS 4).

All three kinds end as one flat call, tensors in and tensors out; what differs is how configured names map to positions.
Inputs are tensors over the slab's memory, outputs are copied into it once. TorchScript and ``model.py`` are code: load
only what you trust.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import msgspec
import numpy as np

from forebay.engine.backends.base import (
    Array,
    Arrays,
    Backend,
    DescribedModel,
    DescribedTensor,
    TensorInstance,
    parse_bool,
    parse_int,
)
from forebay.ipc.errors import BackendFailed, Internal, InvalidArgument, NotFound, ServingError, Unsupported
from forebay.ipc.log import log
from forebay.ipc.messages import InstanceSpec
from forebay.ipc.tensor import DATATYPES, TensorSpec

# As Any: PyTorch's own annotations are incomplete, and a checkout without it must type-check too.
torch: Any = importlib.import_module("torch")
pytree: Any = importlib.import_module("torch.utils._pytree")
Tensor: TypeAlias = Any
Device: TypeAlias = Any

#: The whole of TorchScript is deprecated in PyTorch's eyes; Triton's ``model.pt`` is TorchScript all the same.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch(\..*)?$")
warnings.filterwarnings("ignore", message=r".*torch\.jit.*deprecated.*", category=DeprecationWarning)

Call = Callable[[list[Any]], list[Any]]

#: TorchScript looks at two calls before it compiles in the third.
_PRIMING_CALLS = 3

_INDEXED_NAME = re.compile(r"__(\d+)$")

#: Source locations in TorchScript's error texts; only the file's name is for clients.
_TRACEBACK_FILE = re.compile(r'File "[^"]*/([^"/]*)"')

_OUTPUT_KIND_TEXT = (
    "output must be of type Tensor, List[str] or Tuple containing one of these two types. "
    "It should not be a List / Dictionary of Tensors or a Scalar"
)

_DATA_TYPES: dict[Any, str] = {
    torch.bool: "TYPE_BOOL",
    torch.uint8: "TYPE_UINT8",
    torch.int8: "TYPE_INT8",
    torch.int16: "TYPE_INT16",
    torch.int32: "TYPE_INT32",
    torch.int64: "TYPE_INT64",
    torch.float16: "TYPE_FP16",
    torch.float32: "TYPE_FP32",
    torch.float64: "TYPE_FP64",
    torch.bfloat16: "TYPE_BF16",
}


class Signature(NamedTuple):
    """How configured names map to the flat call."""

    inputs: tuple[str, ...]
    """Configured input names in the order of the call."""
    outputs: dict[str, int]
    """Configured output name to its position among the results."""


class Loaded(NamedTuple):
    """A model of any kind, ready to be called."""

    call: Call
    signature: Signature
    device: Device
    keeps_state: bool = True
    """False if the model is known to give the same answer however often it was called before."""


# --- names -----------------------------------------------------------------------------------------------------------


def name_index(name: str) -> int | None:
    """Return the index of ``<name>__<index>``, or None if the name has none."""
    found = _INDEXED_NAME.search(name)
    return int(found.group(1)) if found else None


def order_inputs(spec: InstanceSpec, arguments: Sequence[str], required_count: int) -> tuple[str, ...]:
    """Return the configured input names in the order of ``forward``'s arguments (spec B-041).

    Args:
        arguments: names of forward's arguments, without ``self``.
        required_count: how many of them have no default.

    Raises:
        InvalidArgument: the configuration has more inputs than the model, too few, or an impossible index.
    """
    names = [tensor.name for tensor in spec.inputs]
    if len(names) > len(arguments):
        raise InvalidArgument(
            f"unable to load model '{spec.model}', configuration expects {len(names)} inputs, "
            f"model provides at most {len(arguments)} inputs"
        )
    if len(names) < required_count:
        raise InvalidArgument(
            f"unable to load model '{spec.model}', configuration specifies {len(names)} inputs, "
            f"but forward() needs {required_count}: {', '.join(arguments[:required_count])}"
        )
    if all(name in arguments for name in names):
        positions = {name: list(arguments).index(name) for name in names}
    else:
        indices = {name: name_index(name) for name in names}
        if any(index is None for index in indices.values()):
            log.warning(
                f"model '{spec.model}': the inputs {names} are not arguments of forward(), nor do they follow the "
                "<name>__<index> naming convention; they are passed in the order of the model configuration"
            )
            return tuple(names)
        positions = {name: index for name, index in indices.items() if index is not None}
    by_position = {position: name for name, position in positions.items()}
    if sorted(by_position) != list(range(len(names))):
        raise InvalidArgument(
            f"unable to load model '{spec.model}', the inputs {names} do not name each of the first {len(names)} "
            f"arguments of forward() once: {', '.join(arguments)}"
        )
    return tuple(by_position[position] for position in range(len(names)))


def index_outputs(spec: InstanceSpec) -> dict[str, int]:
    """Return the position of each configured output (spec B-042).

    Raises:
        InvalidArgument: a name has no index and is not the only one.
    """
    positions: dict[str, int] = {}
    for tensor in spec.outputs:
        index = name_index(tensor.name)
        if index is None:
            if len(spec.outputs) > 1:
                raise InvalidArgument(f"output '{tensor.name}' does not follow <name>__<index> naming convention.")
            index = 0
        positions[tensor.name] = index
    return positions


def check_strings(spec: InstanceSpec) -> None:
    """Refuse string tensors of more than one dimension (spec B-046)."""
    for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        for tensor in tensors:
            if tensor.datatype == "BYTES" and len(tensor.backend_dims) > 1:
                raise InvalidArgument(
                    f"Triton only supports 1 dimensional List of String as {kind} for '{tensor.name}' "
                    f"for model '{spec.model}'"
                )


# --- running ---------------------------------------------------------------------------------------------------------


def to_tensor(array: Array, datatype: str) -> Tensor:
    """Return a CPU tensor over the array's memory; BF16 arrives as uint16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if datatype == "BF16" else tensor


def to_array(tensor: Tensor) -> Array:
    """Return a C-contiguous numpy array, over the tensor's memory where that is possible; BF16 as uint16."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        plain = plain.view(torch.uint16)
    array: Array = plain.numpy()
    return array


def to_strings(array: Array, name: str) -> list[str]:
    """Return the elements as ``str``, for a ``List[str]`` argument.

    Raises:
        InvalidArgument: an element is not UTF-8.
    """
    try:
        return [
            element.decode() if isinstance(element, bytes) else str(element) for element in array.reshape(-1).tolist()
        ]
    except UnicodeDecodeError:
        raise InvalidArgument(f"input '{name}' has an element that is not UTF-8, but PyTorch takes only text") from None


def execution_error(error: Exception) -> BackendFailed:
    """Return what a client is told when the model raised (spec B-049), without directories of any machine."""
    text = _TRACEBACK_FILE.sub(r'File "\1"', str(error))
    return BackendFailed(f"PyTorch execute failure: {text}")


def flatten_result(result: Any) -> list[Any]:
    """Return a model's results as a list (spec B-043).

    Raises:
        BackendFailed: the result is of a kind that has no positions.
    """
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple):
        items: list[Any] = [*result]
        if not all(isinstance(item, torch.Tensor) or _is_strings(item) for item in items):
            raise BackendFailed(_OUTPUT_KIND_TEXT)
        return items
    if _is_strings(result):
        return [result]
    raise BackendFailed(_OUTPUT_KIND_TEXT)


def _is_strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)  # pyright: ignore[reportUnknownVariableType]


class TorchInstance(TensorInstance):
    """One loaded model, called under one inference guard that is entered once for the life of the worker."""

    def __init__(self, spec: InstanceSpec, loaded: Loaded) -> None:
        self._call = loaded.call
        self._signature = loaded.signature
        self._device = loaded.device
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*spec.inputs, *spec.outputs)}
        self._rank_one_outputs = {tensor.name for tensor in spec.outputs if len(tensor.backend_dims) == 1}
        self._batches = spec.max_batch_size > 0
        self._cleans_cache = parse_bool(spec.parameters, "ENABLE_CACHE_CLEANING", False)
        wants_inference_mode = parse_bool(spec.parameters, "INFERENCE_MODE", True)
        # Entering a guard costs about as much as a small layer, so it is not done per batch (FACTS 4).
        self._guard: Any = torch.inference_mode() if wants_inference_mode else torch.no_grad()
        self._guard.__enter__()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        arguments: list[Any] = []
        for name in self._signature.inputs:
            array = inputs.get(name)
            if array is None:
                raise InvalidArgument(f"input '{name}' is missing")
            if self._datatypes[name] == "BYTES":
                arguments.append(to_strings(array, name))
            else:
                arguments.append(to_tensor(array, self._datatypes[name]).to(self._device))
        rows = next(iter(inputs.values())).shape[0] if self._batches and inputs else 0
        results = self._execute(arguments)
        answers: Arrays = {}
        for name in outputs:
            value = self._pick(results, name)
            if isinstance(value, torch.Tensor):
                if value.dim() == 0:
                    raise InvalidArgument(f"output '{name}' is a scalar which is not supported.")
                answers[name] = to_array(value)
            else:
                strings = np.empty(len(value), dtype=np.object_)
                strings[:] = [text.encode() for text in value]
                per_row = rows > 0 and name in self._rank_one_outputs and len(value) % rows == 0
                answers[name] = strings.reshape(rows, -1) if per_row else strings
        return answers

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        if any(self._datatypes[name] == "BYTES" for name in (*inputs, *outputs)):
            return super().bind(inputs, outputs)
        missing = [name for name in self._signature.inputs if name not in inputs]
        if missing:
            raise InvalidArgument(f"input '{missing[0]}' is missing")
        sources = [to_tensor(inputs[name], self._datatypes[name]) for name in self._signature.inputs]
        targets = [
            (name, self._signature.outputs[name], to_tensor(array, self._datatypes[name]))
            for name, array in outputs.items()
        ]
        on_host = self._device.type == "cpu"

        def run_in_place() -> None:
            results = self._execute(sources if on_host else [source.to(self._device) for source in sources])
            for name, position, target in targets:
                value = results[position] if position < len(results) else self._pick(results, name)
                if not isinstance(value, torch.Tensor) or value.shape != target.shape or value.dtype != target.dtype:
                    raise _unexpected_output(name, value, target)
                target.copy_(value)

        return run_in_place

    def _execute(self, arguments: list[Any]) -> list[Any]:
        try:
            return self._call(arguments)
        except BackendFailed:
            raise
        except Exception as error:  # TorchScript raises RuntimeError, torch.jit.Error; a module whatever it likes
            raise execution_error(error) from None
        finally:
            if self._cleans_cache and self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _pick(self, results: list[Any], name: str) -> Any:
        position = self._signature.outputs[name]
        if position >= len(results):
            raise BackendFailed(
                f"The output {name} in the model configuration refers to an output index which doesn't exist. "
                f"This model has {len(results)} outputs"
            )
        return results[position]

    def prime(self, spec: InstanceSpec) -> None:
        """Run a row of zeros a few times: a first call compiles, which takes a thousand times as long as the others."""
        if any(tensor.datatype == "BYTES" or -1 in tensor.backend_dims for tensor in spec.inputs):
            return
        rows = (1,) if self._batches else ()
        inputs: Arrays = {
            tensor.name: np.zeros((*rows, *tensor.backend_dims), DATATYPES[tensor.datatype].numpy_dtype)
            for tensor in spec.inputs
        }
        try:
            for _ in range(_PRIMING_CALLS):
                self.run(inputs, tuple(self._signature.outputs))
        except ServingError as error:
            # Zeros may be no input that the model accepts; its own requests will tell.
            log.verbose(1, f"model '{spec.model}' was not primed: {error}")

    def close(self) -> None:
        self._guard.__exit__(None, None, None)


def _unexpected_output(name: str, value: Any, target: Tensor) -> BackendFailed | InvalidArgument:
    expected = f"{_data_type(target.dtype)} {list(target.shape)}"
    if not isinstance(value, torch.Tensor):
        return BackendFailed(
            f"the model produced strings for output '{name}', but its configuration promises {expected}"
        )
    if value.dim() == 0:
        return InvalidArgument(f"output '{name}' is a scalar which is not supported.")
    return BackendFailed(
        f"the model produced output '{name}' as {_data_type(value.dtype)} {list(value.shape)}, "
        f"but its configuration promises {expected}"
    )


def _data_type(dtype: Any) -> str:
    return _DATA_TYPES.get(dtype, str(dtype).replace("torch.", "TYPE_").upper())


# --- loading ---------------------------------------------------------------------------------------------------------


def find_model_file(spec: InstanceSpec, default: str) -> str:
    """Return the model file's path.

    Raises:
        NotFound: with Triton's text.
    """
    name = spec.model_file or default
    path = os.path.join(spec.version_path, name)
    if not os.path.exists(path):
        shown = os.path.join(str(spec.version), name)
        raise NotFound(f"unable to find '{shown}' for model instance '{spec.instance_name}'")
    return path


def choose_device(spec: InstanceSpec) -> Device | None:
    """Return where the instance runs; None for KIND_MODEL: wherever the module itself is (spec B-048)."""
    if spec.kind == "GPU":
        if not torch.cuda.is_available():
            raise Unsupported(
                f"model '{spec.model}' asks for KIND_GPU, but this PyTorch ({torch.__version__}) sees no CUDA device"
            )
        return torch.device("cuda", spec.device_id)
    return None if spec.kind == "MODEL" else torch.device("cpu")


def apply_settings(spec: InstanceSpec, *, intra: str, inter: str) -> None:
    """Apply the process-wide parameters; a worker has its process for itself, unlike in Triton (spec B-047, L-044)."""
    parameters = spec.parameters
    threads = parse_int(parameters, intra, 0)
    torch.set_num_threads(threads if threads > 0 else max(len(spec.cores), 1))
    inter_threads = parse_int(parameters, inter, 0)
    # PyTorch allows this once, before any parallel work; a reloaded describe-then-load worker has done it already.
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(inter_threads if inter_threads > 0 else 1)
    torch.backends.cudnn.enabled = not parse_bool(parameters, "DISABLE_CUDNN", False)
    # Weights cannot be shared between processes of one model; checked all the same, so that a typing error is noticed.
    parse_bool(parameters, "ENABLE_WEIGHT_SHARING", False)
    switches: dict[str, Callable[[bool], object]] = {
        "ENABLE_JIT_EXECUTOR": torch._C._jit_set_profiling_executor,
        "ENABLE_JIT_PROFILING": torch._C._jit_set_profiling_mode,
        "ENABLE_TENSOR_FUSER": torch._C._jit_set_texpr_fuser_enabled,
    }
    for key, switch in switches.items():
        if key in parameters:
            switch(parse_bool(parameters, key, True))
    torch._C._set_graph_executor_optimize(not parse_bool(parameters, "DISABLE_OPTIMIZED_EXECUTION", False))


def module_device(module: Any) -> Device:
    """Return the device of a module's first parameter or buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        return torch.device(tensor.device)
    return torch.device("cpu")


def load_script(spec: InstanceSpec, path: str) -> Any:
    """Return the TorchScript module of ``path`` in evaluation mode.

    Raises:
        InvalidArgument: the file is not TorchScript; the text says what it is if that can be told.
    """
    _register_operators(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location=choose_device(spec)).eval()
    except (Unsupported, MemoryError):
        raise
    except Exception as error:  # RuntimeError mostly, its text is several lines of C++ frames
        shown = os.path.join(str(spec.version), os.path.basename(path))
        reason = str(error).replace(path, shown).split("\n")[0].strip()
        raise InvalidArgument(
            f"failed to load model '{spec.model}': '{shown}' is not a TorchScript file that PyTorch "
            f"{torch.__version__} can read: {reason}"
        ) from None


def _register_operators(spec: InstanceSpec) -> None:
    for library in spec.extra.get("op_libraries", ()):
        try:
            torch.ops.load_library(os.path.join(spec.model_path, library))
        except OSError as error:
            raise InvalidArgument(
                f"failed to load custom operators '{library}' of model '{spec.model}': {os.path.basename(str(error))}"
            ) from None


def prepare_script(spec: InstanceSpec) -> Loaded:
    """Load ``model.pt``, platform pytorch_libtorch."""
    apply_settings(spec, intra="INTRA_OP_THREAD_COUNT", inter="INTER_OP_THREAD_COUNT")
    module = load_script(spec, find_model_file(spec, "model.pt"))
    outputs = index_outputs(spec)
    check_strings(spec)
    # Before freezing, which may turn parameters into constants.
    device = choose_device(spec) or module_device(module)
    arguments = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    kinds = [argument.type.kind() for argument in arguments]
    frozen = _freeze(spec, module)
    # What freezing could not make constant is written to by the model.
    keeps_state = frozen is module or "prim::GetAttr" in str(frozen.graph)
    forward = frozen.forward
    if kinds == ["DictType"]:
        names = tuple(tensor.name for tensor in spec.inputs)

        def call_with_dictionary(tensors: list[Any]) -> list[Any]:
            return flatten_result(forward(dict(zip(names, tensors, strict=True))))

        return Loaded(call_with_dictionary, Signature(names, outputs), device, keeps_state)
    if kinds == ["ListType"] and arguments[0].type.getElementType().kind() == "TensorType":
        names = order_inputs(spec, [arguments[0].name] * len(spec.inputs), len(spec.inputs))

        def call_with_list(tensors: list[Any]) -> list[Any]:
            return flatten_result(forward(tensors))

        return Loaded(call_with_list, Signature(names, outputs), device, keeps_state)
    for argument, kind in zip(arguments, kinds, strict=True):
        is_strings = kind == "ListType" and argument.type.getElementType().kind() == "StringType"
        if kind != "TensorType" and not is_strings and not argument.has_default_value():
            raise Internal(
                f"An input of type '{argument.type}' was detected in the model. Only a single input of type "
                "Dict(str, Tensor) or input(s) of type Tensor are supported."
            )
    required = sum(not argument.has_default_value() for argument in arguments)
    names = order_inputs(spec, [argument.name for argument in arguments], required)

    def call_with_arguments(tensors: list[Any]) -> list[Any]:
        return flatten_result(forward(*tensors))

    return Loaded(call_with_arguments, Signature(names, outputs), device, keeps_state)


def _freeze(spec: InstanceSpec, module: Any) -> Any:
    # Inlines the submodules' calls and their parameters: a fifth less time per call for small models. A model that
    # writes its own attributes is left as it is.
    if parse_bool(spec.parameters, "DISABLE_OPTIMIZED_EXECUTION", False):
        return module
    try:
        if "prim::SetAttr" in str(module.inlined_graph):
            return module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.freeze(module)
    except Exception as error:  # only an optimisation: whatever stops it, the module itself still runs
        log.verbose(1, f"model '{spec.model}' runs without freezing: {error}")
        return module


def prepare_package(spec: InstanceSpec) -> Loaded:
    """Load ``model.pt2``, an AOTInductor package, platform torch_aoti (spec B-050)."""
    apply_settings(spec, intra="INTRA_OP_THREAD_COUNT", inter="INTER_OP_THREAD_COUNT")
    loader, input_names, output_names = open_package(spec)
    order: list[str | None] = [None] * len(input_names)
    for tensor in spec.inputs:
        position = _package_position(spec, tensor, input_names, "input")
        if order[position] is not None:
            raise InvalidArgument(
                f"inputs '{order[position]}' and '{tensor.name}' of model '{spec.model}' are the same"
            )
        order[position] = tensor.name
    for position, name in enumerate(order):
        if name is None:
            raise InvalidArgument(
                f"unable to load model '{spec.model}', configuration has no input for {input_names[position]} "
                f"(or INPUT__{position}) of the package"
            )
    outputs = {tensor.name: _package_position(spec, tensor, output_names, "output") for tensor in spec.outputs}
    signature = Signature(tuple(name for name in order if name is not None), outputs)
    device = choose_device(spec) or torch.device("cpu")

    def call(tensors: list[Any]) -> list[Any]:
        # "Boxed": it empties the list that it is given.
        results: list[Any] = loader.boxed_run([*tensors])
        return results

    return Loaded(call, signature, device)


def open_package(spec: InstanceSpec) -> tuple[Any, list[str], list[str]]:
    """Return a package's loader and the structural names of its inputs and outputs, in flattened order.

    Raises:
        InvalidArgument: the file is no package, or none for this machine.
    """
    path = find_model_file(spec, "model.pt2")
    device = choose_device(spec)
    index = device.index if device is not None and device.type == "cuda" else -1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # One request at a time runs in a worker, so the package needs no pool of runners.
            model: Any = torch._inductor.aoti_load_package(path, run_single_threaded=True, device_index=index)
        in_spec, out_spec = (pytree.treespec_loads(text) for text in model.loader.get_call_spec())
    except Exception as error:  # whatever a native library may raise while it is opened
        shown = os.path.join(str(spec.version), os.path.basename(path))
        reason = str(error).replace(path, shown).split("\n")[0].strip()
        raise InvalidArgument(
            f"failed to load model '{spec.model}': '{shown}' is not an AOTInductor package that PyTorch "
            f"{torch.__version__} can run here: {reason}"
        ) from None
    inputs = ["ARGS" + path[3:] if path.startswith("[0]") else "KWARGS" + path[3:] for path in _leaf_paths(in_spec)]
    outputs = ["RESULT" + path for path in _leaf_paths(out_spec)]
    return model.loader, inputs, outputs


def _leaf_paths(spec: Any) -> list[str]:
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return ["".join(f"[{getattr(key, 'idx', getattr(key, 'key', key))}]" for key in path) for path, _leaf in leaves]


def _package_position(spec: InstanceSpec, tensor: TensorSpec, names: list[str], kind: str) -> int:
    if tensor.name in names:
        return names.index(tensor.name)
    found = re.fullmatch(rf"{kind.upper()}__(\d+)", tensor.name)
    if found is not None and int(found.group(1)) < len(names):
        return int(found.group(1))
    raise InvalidArgument(
        f"{kind} '{tensor.name}' of model '{spec.model}' is not in the package, which has: "
        + ", ".join(f"{name} ({kind.upper()}__{index})" for index, name in enumerate(names))
    )


def prepare_module(spec: InstanceSpec) -> Loaded:
    """Load ``model.py`` with a ``torch.nn.Module`` and its weights, or plain TorchScript (spec B-051)."""
    apply_settings(spec, intra="NUM_THREADS", inter="NUM_INTEROP_THREADS")
    source = os.path.join(spec.version_path, "model.py")
    weights = os.path.join(spec.version_path, "model.pt")
    if os.path.isfile(source):
        module = _construct_module(spec, source)
        if os.path.isfile(weights):
            try:
                module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except Exception as error:  # a truncated file, other keys, other shapes
                raise InvalidArgument(
                    f"failed to load model '{spec.model}': '{spec.version}/model.pt' does not fit model.py: {error}"
                ) from None
    else:
        module = load_script(spec, find_model_file(spec, "model.pt"))
    device = choose_device(spec) or module_device(module)
    module = module.to(device).eval()
    options = _compile_options(spec)
    if not options.pop("disable", False) and not isinstance(module, torch.jit.ScriptModule):
        # Without a C++ compiler on this machine the module runs as it is.
        torch._dynamo.config.suppress_errors = True
        module = torch.compile(module, **options)
    names = tuple(tensor.name for tensor in spec.inputs)
    outputs = {tensor.name: position for position, tensor in enumerate(spec.outputs)}

    def call(tensors: list[Any]) -> list[Any]:
        result = module(*tensors)
        if isinstance(result, list) and not _is_strings(result):
            return flatten_result((*result,))
        return flatten_result(result)

    return Loaded(call, Signature(names, outputs), device)


def _compile_options(spec: InstanceSpec) -> dict[str, Any]:
    text = spec.parameters.get("TORCH_COMPILE_OPTIONAL_PARAMETERS", "{}")
    try:
        options = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidArgument(
            f"model parameter 'TORCH_COMPILE_OPTIONAL_PARAMETERS' must be a JSON object: {error}"
        ) from None
    unknown = sorted(set(options) - {"fullgraph", "dynamic", "backend", "mode", "options", "disable"})
    if unknown:
        raise InvalidArgument(f"model parameter 'TORCH_COMPILE_OPTIONAL_PARAMETERS' has unknown keys: {unknown}")
    return options


def _construct_module(spec: InstanceSpec, source: str) -> Any:
    name = f"forebay_torch_model_{spec.version}"
    module_spec = importlib.util.spec_from_file_location(name, source)
    assert module_spec is not None
    assert module_spec.loader is not None
    python_module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = python_module
    sys.path.insert(0, spec.version_path)
    try:
        module_spec.loader.exec_module(python_module)
        classes = [
            value
            for _name, value in inspect.getmembers(python_module, inspect.isclass)
            if issubclass(value, torch.nn.Module)
        ]
        # Triton takes the first by name, which may be an imported layer; the file's own classes come first here.
        classes.sort(key=lambda value: value.__module__ != name)
        if not classes:
            raise InvalidArgument(
                f"failed to load model '{spec.model}': '{spec.version}/model.py' has no subclass of torch.nn.Module"
            )
        return classes[0]()
    except InvalidArgument:
        raise
    except Exception as error:  # the model's own code
        raise InvalidArgument(
            f"failed to load model '{spec.model}': '{spec.version}/model.py' raised {type(error).__name__}: {error}"
        ) from None


# --- auto-complete ---------------------------------------------------------------------------------------------------


def describe_script(spec: InstanceSpec) -> DescribedModel:
    """Derive inputs and outputs of a TorchScript model where its first layers tell them (L-019).

    A file says how many tensors there are, but rarely their types. The input of a linear, convolution or embedding
    layer follows from that layer's weights; then the model is tried with one and two rows, which shows the outputs and
    whether it batches.

    Raises:
        InvalidArgument: the file does not tell enough; the text asks for a configuration.
    """
    module = load_script(spec, find_model_file(spec, "model.pt"))
    give_up = InvalidArgument(
        f"model configuration is not complete for model '{spec.model}': its TorchScript file does not tell datatypes "
        "and shapes of all inputs; give 'input' and 'output' in config.pbtxt"
    )
    arguments = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    if not arguments or any(argument.type.kind() != "TensorType" for argument in arguments):
        raise give_up
    graph = torch.jit.freeze(module).graph
    samples: list[tuple[str, Any, tuple[int, ...]]] = []
    for argument, value in zip(arguments, list(graph.inputs())[1:], strict=False):
        found = _input_of_first_layer(value)
        if found is None:
            raise give_up
        samples.append((argument.name, *found))
    try:
        one, two = (_try_rows(module, samples, rows) for rows in (1, 2))
    except Exception:  # a guess that did not fit; the configuration must say it
        raise give_up from None
    outputs: list[DescribedTensor] = []
    for index, (first, second) in enumerate(zip(one, two, strict=True)):
        shape = tuple(a if a == b else -1 for a, b in zip(first.shape, second.shape, strict=True))
        name = "OUTPUT__0" if len(one) == 1 else f"OUTPUT__{index}"
        outputs.append(DescribedTensor(name, _data_type(first.dtype), shape))
    inputs = tuple(DescribedTensor(name, _data_type(dtype), (-1, *dims)) for name, dtype, dims in samples)
    return DescribedModel(inputs, tuple(outputs))


def _input_of_first_layer(value: Any) -> tuple[Any, tuple[int, ...]] | None:
    for use in value.uses():
        node = use.user
        operands = list(node.inputs())
        if len(operands) < 2:
            continue
        if node.kind() == "aten::embedding" and operands[1].debugName() == value.debugName():
            return torch.int64, (-1,)
        weight = operands[1].toIValue()
        if not isinstance(weight, torch.Tensor) or operands[0].debugName() != value.debugName():
            continue
        if node.kind() == "aten::linear":
            return weight.dtype, (int(weight.shape[1]),)
        if node.kind() in ("aten::conv1d", "aten::conv2d", "aten::conv3d"):
            groups = operands[-1].toIValue()
            spatial = weight.dim() - 2
            return weight.dtype, (int(weight.shape[1]) * int(groups), *([-1] * spatial))
    return None


def _try_rows(module: Any, samples: Sequence[tuple[str, Any, tuple[int, ...]]], rows: int) -> list[Tensor]:
    # Large enough for the strides and poolings of common vision models.
    size_for_variable = 224
    tensors = [
        torch.zeros((rows, *(size_for_variable if dim < 0 else dim for dim in dims)), dtype=dtype)
        for _name, dtype, dims in samples
    ]
    with torch.no_grad():
        results = flatten_result(module.forward(*tensors))
    if not all(isinstance(result, torch.Tensor) for result in results):
        raise BackendFailed(_OUTPUT_KIND_TEXT)
    return results


# --- the backend -----------------------------------------------------------------------------------------------------


def _runtime(spec: InstanceSpec) -> str:
    config: dict[str, Any] = msgspec.json.decode(spec.config_json or b"{}")
    return str(config.get("runtime", ""))


class TorchBackend(Backend):
    """``backend: "pytorch"``, platforms pytorch_libtorch and torch_aoti, ``runtime: "model.py"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        if _runtime(spec) == "model.py" or _is_package(spec):
            raise Unsupported(
                f"model configuration is not provided for model '{spec.model}': only TorchScript files can be "
                "auto-completed"
            )
        return describe_script(spec)

    def load(self, spec: InstanceSpec) -> TensorInstance:
        if _runtime(spec) == "model.py":
            return TorchInstance(spec, prepare_module(spec))
        if _is_package(spec):
            return TorchInstance(spec, prepare_package(spec))
        loaded = prepare_script(spec)
        instance = TorchInstance(spec, loaded)
        if not loaded.keeps_state:
            instance.prime(spec)
        return instance


def _is_package(spec: InstanceSpec) -> bool:
    return spec.platform == "torch_aoti" or spec.model_file.endswith(".pt2")


BACKEND = TorchBackend
