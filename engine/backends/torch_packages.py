"""AOTInductor packages: ``model.pt2``, platform torch_aoti (spec B-050)."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

from forebay.engine.backends.torch_library import LoadedModule, Signature, pytree, torch
from forebay.engine.backends.torch_scripts import apply_settings, choose_device, find_model_file
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec


def prepare_package(spec: InstanceSpec) -> LoadedModule:
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
    # KIND_MODEL: where it was compiled for (spec B-048).
    device = choose_device(spec) or torch.device(loader.get_metadata().get("AOTI_DEVICE_KEY", "cpu"))

    def call(tensors: list[Any]) -> list[Any]:
        # "Boxed": it empties the list that it is given.
        results: list[Any] = loader.boxed_run([*tensors])
        return results

    return LoadedModule(call, signature, device)


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
