"""TorchScript files: ``model.pt``, platform pytorch_libtorch."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import Any

from forebay.engine.backends.base import parse_bool, parse_int
from forebay.engine.backends.torch_library import Device, LoadedModule, Signature, torch
from forebay.engine.backends.torch_names import check_strings, index_outputs, order_inputs
from forebay.engine.backends.torch_tensors import flatten_result
from forebay.engine.devices.opening import played_gpu_count
from forebay.ipc.errors import Internal, InvalidArgument, NotFound, Unsupported
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec


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
    if spec.kind == "GPU" and played_gpu_count():
        return torch.device("cpu")
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


def prepare_script(spec: InstanceSpec) -> LoadedModule:
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

        return LoadedModule(call_with_dictionary, Signature(names, outputs), device, keeps_state)
    if kinds == ["ListType"] and arguments[0].type.getElementType().kind() == "TensorType":
        names = order_inputs(spec, [arguments[0].name] * len(spec.inputs), len(spec.inputs))

        def call_with_list(tensors: list[Any]) -> list[Any]:
            return flatten_result(forward(tensors))

        return LoadedModule(call_with_list, Signature(names, outputs), device, keeps_state)
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

    return LoadedModule(call_with_arguments, Signature(names, outputs), device, keeps_state)


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
