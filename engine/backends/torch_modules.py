"""Plain modules: ``model.py`` with a ``torch.nn.Module`` and its weights (spec B-051)."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from typing import Any

import msgspec

from forebay.engine.backends.torch_library import LoadedModule, Signature, torch
from forebay.engine.backends.torch_scripts import (
    apply_settings,
    choose_device,
    find_model_file,
    load_script,
    module_device,
)
from forebay.engine.backends.torch_tensors import flatten_result, is_strings
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec


def prepare_module(spec: InstanceSpec) -> LoadedModule:
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
        if isinstance(result, list) and not is_strings(result):
            return flatten_result((*result,))
        return flatten_result(result)

    return LoadedModule(call, Signature(names, outputs), device)


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
