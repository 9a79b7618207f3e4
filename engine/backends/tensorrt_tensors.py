"""What a TensorRT engine says of its tensors, and whether a model's configuration fits."""

from __future__ import annotations

from typing import Any

from forebay.engine.backends.base import DescribedModel, DescribedTensor
from forebay.engine.backends.tensorrt_profiles import Profile, profile_numbers
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import DATATYPES, TensorSpec, shape_text
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
    return protocol_datatype(engine.get_tensor_dtype(name), name)


def protocol_datatype(kind: Any, name: str) -> str:
    """Return the protocol's name of a ``tensorrt.DataType``.

    Args:
        name: of the tensor that has it.

    Raises:
        InvalidArgument: there is none.
    """
    if kind.name not in _DATATYPES:
        raise InvalidArgument(f"tensor '{name}' has the TensorRT type {kind.name}, which the protocol has no name for")
    return _DATATYPES[kind.name]


def describe_engine(spec: InstanceSpec, trt: Any, engine: Any) -> DescribedModel:
    """Return what an engine says of its tensors, and how large its batches can be under the configured profiles.

    Raises:
        InvalidArgument: there is no such profile, or a tensor has a type that the protocol has no name for.
    """
    inputs = tensor_names(trt, engine, "INPUT")
    profiles = [Profile(engine, number, inputs) for number in profile_numbers(spec, engine.num_optimization_profiles)]
    return DescribedModel(
        tuple(_describe_tensor(engine, name) for name in inputs),
        tuple(_describe_tensor(engine, name) for name in tensor_names(trt, engine, "OUTPUT")),
        max_batch_size=max(profile.max_batch_size for profile in profiles),
    )


def _describe_tensor(engine: Any, name: str) -> DescribedTensor:
    return DescribedTensor(
        name,
        DATATYPES[datatype_of_tensor(engine, name)].config_name,
        tuple(int(size) for size in engine.get_tensor_shape(name)),
        is_shape_tensor=bool(engine.is_shape_inference_io(name)),
    )


def check_config(spec: InstanceSpec, trt: Any, engine: Any) -> None:
    """Compare a configuration with an engine.

    Raises:
        InvalidArgument: with Triton's texts.
    """
    known = {"input": tensor_names(trt, engine, "INPUT"), "output": tensor_names(trt, engine, "OUTPUT")}
    configured = [("input", tensor) for tensor in spec.inputs] + [("output", tensor) for tensor in spec.outputs]
    if len(spec.inputs) > len(known["input"]):
        raise InvalidArgument(
            f"unable to load model '{spec.model}', configuration expects {len(spec.inputs)} inputs, model provides at "
            f"most {len(known['input'])}"
        )
    for kind, tensor in configured:
        if tensor.name not in known[kind]:
            raise InvalidArgument(
                f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(sorted(known[kind]))}"
            )
    for kind, tensor in configured:
        _check_mark(spec, engine, kind, tensor)
        _check_format(spec, trt, engine, kind, tensor)
    for kind, tensor in configured:
        _check_datatype(spec, engine, kind, tensor)
        if tensor.is_shape_tensor:
            _check_value_count(spec, engine, tensor)
        else:
            _check_dims(spec, engine, tensor)
    missing = set(known["input"]) - {tensor.name for tensor in spec.inputs}
    if missing:
        raise InvalidArgument(f"expected configuration for input '{min(missing)}' for {spec.instance_name}")


def _check_mark(spec: InstanceSpec, engine: Any, kind: str, tensor: TensorSpec) -> None:
    is_shape_tensor = engine.is_shape_inference_io(tensor.name)
    if is_shape_tensor and not tensor.is_shape_tensor:
        raise InvalidArgument(
            f"{kind} '{tensor.name}' for model '{spec.model}' is a shape tensor but the model configuration doesn't "
            "mark it as a shape tensor."
        )
    if tensor.is_shape_tensor and not is_shape_tensor:
        raise InvalidArgument(
            f"{kind} '{tensor.name}' for model '{spec.model}' is incorrectly marked as a shape tensor in the model "
            "configuration."
        )


def _check_format(spec: InstanceSpec, trt: Any, engine: Any, kind: str, tensor: TensorSpec) -> None:
    """Refuse vectorised layouts: they take more bytes than their shapes say, in memory that would not have them."""
    description: str = engine.get_tensor_format_desc(tensor.name)
    if hasattr(trt, "TensorFormat"):
        is_linear = engine.get_tensor_format(tensor.name) == trt.TensorFormat.LINEAR
    else:
        # The lean runtime has no names for formats.
        is_linear = "linear" in description.lower()
    if not is_linear:
        raise InvalidArgument(
            f"{kind} '{tensor.name}' for model '{spec.model}' has the non-linear format '{description}', which is not "
            "supported; build the plan with linear ones"
        )


def _check_datatype(spec: InstanceSpec, engine: Any, kind: str, tensor: TensorSpec) -> None:
    found = datatype_of_tensor(engine, tensor.name)
    if found == tensor.datatype:
        return
    what = f"in engine for shape {kind}" if tensor.is_shape_tensor else f"for inference {kind}"
    raise InvalidArgument(
        f"unexpected datatype TYPE_{found} {what} '{tensor.name}', expecting TYPE_{tensor.datatype} for "
        f"{spec.instance_name}"
    )


def _check_value_count(spec: InstanceSpec, engine: Any, tensor: TensorSpec) -> None:
    """A shape tensor has as many values as configured, and the batch size (spec D-018)."""
    shape = tuple(engine.get_tensor_shape(tensor.name))
    if len(shape) > 1:
        raise InvalidArgument(
            f"unable to load model '{spec.instance_name}', shape binding '{tensor.name}' can only be 0-d or 1-D "
            f"tensor, got {shape_text(shape)}"
        )
    dims = tensor.backend_dims
    if tuple(size + (spec.max_batch_size > 0) for size in dims) != shape:
        raise InvalidArgument(
            f"unable to load model '{spec.instance_name}', binding '{tensor.name}' shape expected by framework "
            f"{shape_text(shape)} doesn't match model configuration shape {shape_text(dims)}"
        )


def _check_dims(spec: InstanceSpec, engine: Any, tensor: TensorSpec) -> None:
    shape = tuple(engine.get_tensor_shape(tensor.name))
    is_batched = spec.max_batch_size > 0
    dims = (-1, *tensor.backend_dims) if is_batched else tensor.backend_dims
    if len(shape) == len(dims) and all(
        have == want or -1 in (have, want) for have, want in zip(shape, dims, strict=True)
    ):
        return
    whole = (
        "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making complete "
        if is_batched
        else ""
    )
    raise InvalidArgument(
        f"model '{spec.model}', tensor '{tensor.name}': the model expects {len(shape)} dimensions (shape "
        f"{shape_text(shape)}) but the model configuration specifies {len(dims)} dimensions ({whole}shape "
        f"{shape_text(dims)})"
    )
