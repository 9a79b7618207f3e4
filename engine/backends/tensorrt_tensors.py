"""What a TensorRT engine says of its tensors, and whether a model's configuration fits."""

from __future__ import annotations

from typing import Any

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.worker_messages import InstanceSpec

#: TensorRT's names for types to the protocol's.
_DATATYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}


def tensor_names(trt: Any, engine: Any, mode: str) -> list[str]:
    """Return the names of inputs (``INPUT``) or outputs (``OUTPUT``)."""
    wanted = trt.TensorIOMode.__members__[mode]
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == wanted]


def datatype_of_tensor(engine: Any, name: str) -> str:
    """Return the protocol's name of a tensor's type.

    Raises:
        InvalidArgument: there is none.
    """
    kind: str = engine.get_tensor_dtype(name).name
    if kind not in _DATATYPES:
        raise InvalidArgument(f"tensor '{name}' has the TensorRT type {kind}, which the protocol has no name for")
    return _DATATYPES[kind]


def check_config(spec: InstanceSpec, trt: Any, engine: Any) -> None:
    """Compare a configuration with an engine.

    Raises:
        InvalidArgument: with texts like those of the other backends.
    """
    for kind, configured, mode in (("input", spec.inputs, "INPUT"), ("output", spec.outputs, "OUTPUT")):
        known = tensor_names(trt, engine, mode)
        if kind == "input" and len(configured) != len(known):
            raise InvalidArgument(
                f"unable to load model '{spec.model}', configuration expects {len(configured)} inputs, "
                f"model provides {len(known)}: {', '.join(known)}"
            )
        for tensor in configured:
            if tensor.name not in known:
                raise InvalidArgument(
                    f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(sorted(known))}"
                )
            found = datatype_of_tensor(engine, tensor.name)
            if found != tensor.datatype:
                raise InvalidArgument(
                    f"unable to load model '{spec.model}', configuration expects datatype "
                    f"{DATATYPES[tensor.datatype].config_name} for {kind} '{tensor.name}', model provides "
                    f"{DATATYPES[found].config_name}"
                )
            shape = tuple(engine.get_tensor_shape(tensor.name))
            is_batched = spec.max_batch_size > 0 and not tensor.is_shape_tensor
            dims = (-1, *tensor.backend_dims) if is_batched else tensor.backend_dims
            if spec.max_batch_size > 0 and tensor.is_shape_tensor:
                # The batch size is the first of the values (spec D-018).
                dims = tuple(-1 if size < 0 else size + 1 for size in tensor.dims)
            if len(shape) != len(dims) or any(
                have not in (-1, want) and not (index == 0 and is_batched)
                for index, (have, want) in enumerate(zip(shape, dims, strict=True))
            ):
                raise InvalidArgument(
                    f"model '{spec.model}', tensor '{tensor.name}': the model expects shape {list(shape)} but the "
                    f"model configuration specifies {list(dims)}"
                )


def parse_profiles(spec: InstanceSpec, count: int) -> list[int]:
    """Return the numbers of the optimisation profiles that the instance uses; by default the first.

    Raises:
        InvalidArgument: with Triton's text (spec C-097).
    """
    numbers: list[int] = []
    for text in spec.extra.get("profiles", ()):
        if not str(text).isdigit() or int(text) >= count:
            raise InvalidArgument(
                f"model '{spec.model}' instance '{spec.instance_name}' specifies invalid profile '{text}'; the plan "
                f"has profiles 0 to {count - 1}"
            )
        numbers.append(int(text))
    return numbers or [0]
