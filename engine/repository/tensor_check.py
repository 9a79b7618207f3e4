"""Whether the inputs and outputs of a configuration make sense (spec C-007, C-030..C-038, C-124, D-013..D-015)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from forebay.engine.repository.config_problem import Problem, likely_meant
from forebay.engine.repository.model_config_schema import FieldPath, enum_name, enum_type

#: Backends that have a sentence of their own about missing inputs and outputs (spec B-082), or do without.
_JUDGE_THEMSELVES = frozenset({"identity", "python"})


def tensor_problems(message: Any) -> Iterator[Problem]:
    """Yield what is wrong with the tensors of a ModelConfig message, in Triton's order and with its sentences."""
    name, max_batch_size = message.name, message.max_batch_size
    is_tensorrt = message.platform == "tensorrt_plan"
    problems: list[Problem] = []
    for direction in ("input", "output"):
        tensors = getattr(message, direction)
        if not tensors and message.backend not in _JUDGE_THEMSELVES:
            problems.append(Problem(f"must specify one or more '{direction}'s", (direction,)))
        seen: set[str] = set()
        for index, tensor in enumerate(tensors):
            path = (direction, index)
            found = list(_tensor(tensor, direction, max_batch_size, path))
            found += _special_tensor(tensor, direction, is_tensorrt, path)
            if tensor.name and tensor.name in seen:
                found.append(Problem(f"model {direction} '{tensor.name}' is specified more than once", (*path, "name")))
            seen.add(tensor.name)
            problems += found
    problems += _batch_tensors(message)
    for problem in problems:
        yield msgspec.structs.replace(problem, text=f"{problem.text} for {name}")


def _tensor(tensor: Any, direction: str, max_batch_size: int, path: FieldPath) -> Iterator[Problem]:
    """One input or output: name, datatype, dims and reshape (spec C-030..C-034, D-013..D-015)."""
    if not tensor.name:
        yield Problem(f"model {direction} must specify 'name'", path)
        return
    prefix = f"model {direction} '{tensor.name}' "
    if not tensor.data_type:
        yield Problem(f"{prefix}must specify 'data_type'", path)
    elif tensor.data_type not in enum_type("DataType").values_by_number:
        yield Problem(f"{prefix}has an unknown 'data_type', {tensor.data_type}", (*path, "data_type"))
    if not tensor.dims:
        yield Problem(f"{prefix}must specify 'dims'", path)
        return
    if tensor.HasField("reshape") and not tensor.reshape.shape and max_batch_size == 0:
        yield Problem(
            f"{prefix}cannot have empty reshape for non-batching model as scalar tensors are not supported",
            (*path, "reshape"),
        )
        return
    bad = [index for index, dim in enumerate(tensor.dims) if dim < 1 and dim != -1]
    if bad:
        yield Problem(
            f"{prefix}dimension must be integer >= 1, or -1 to indicate a variable-size dimension",
            (*path, "dims", bad[0]),
        )
        return
    if tensor.HasField("reshape"):
        yield from _reshape(tuple(tensor.dims), tuple(tensor.reshape.shape), prefix, (*path, "reshape"))


def _reshape(dims: tuple[int, ...], shape: tuple[int, ...], prefix: str, path: FieldPath) -> Iterator[Problem]:
    if any(dim < 1 and dim != -1 for dim in shape):
        yield Problem(
            f"{prefix}reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension", path
        )
        return
    dims_products, shape_products = _products(dims), _products(shape)
    if not shape:
        if dims_products != [1]:
            yield Problem(f"{prefix}has different size for dims and reshape", path)
    elif len(dims_products) != len(shape_products) and len(dims_products) > 1 and len(shape_products) > 1:
        yield Problem(f"{prefix}has different number of variable-size dimensions for dims and reshape", path)
    elif dims_products != shape_products:
        yield Problem(f"{prefix}has different size for dims and reshape", path)


def _products(dims: tuple[int, ...]) -> list[int]:
    """Return the element counts of the runs between variable dimensions: ``[2, 4, -1, 6]`` gives ``[8, 6]``."""
    products = [1]
    for dim in dims:
        if dim == -1:
            products.append(1)
        else:
            products[-1] *= dim
    return products


def _special_tensor(tensor: Any, direction: str, is_tensorrt: bool, path: FieldPath) -> Iterator[Problem]:
    if direction == "input" and tensor.format and len(tensor.dims) != 3:
        yield Problem("model input NHWC/NCHW require 3 dims", (*path, "format"))
    if tensor.is_shape_tensor and not is_tensorrt:
        yield Problem("shape tensors are only supported for TensorRT platform", (*path, "is_shape_tensor"))
    if tensor.is_non_linear_format_io:
        here = (*path, "is_non_linear_format_io")
        if not is_tensorrt:
            yield Problem("Non-linear IO format is only supported for the TensorRT platform", here)
        elif len(tensor.dims) != 3:
            yield Problem(f"Non-linear IO format {direction} requires 3 dims", here)


def _batch_tensors(message: Any) -> Iterator[Problem]:
    """``batch_input`` and ``batch_output`` (spec C-124)."""
    inputs = {tensor.name for tensor in message.input}
    outputs = {tensor.name for tensor in message.output}
    for direction, kinds in (("input", "BatchInput.Kind"), ("output", "BatchOutput.Kind")):
        for index, item in enumerate(getattr(message, f"batch_{direction}")):
            path = (f"batch_{direction}", index)
            kind = enum_name(kinds, item.kind)
            if kind.isdigit():
                yield Problem(f"unknown batch {direction} kind '{kind}'", (*path, "kind"))
            elif len(item.source_input) != 1:
                yield Problem(
                    f"batch {direction} kind '{kind}' expects 1 source input, got {len(item.source_input)}", path
                )
            if direction == "input" and enum_name("DataType", item.data_type) not in ("TYPE_INT32", "TYPE_FP32"):
                yield Problem("batch input data type must be TYPE_INT32 or TYPE_FP32", (*path, "data_type"))
            for source in item.source_input:
                if source not in inputs:
                    yield Problem(
                        f"unknown source input name '{source}'",
                        (*path, "source_input"),
                        suggestion=likely_meant(source, inputs),
                    )
            if direction == "output":
                yield from _scatter_targets(item, outputs, path)


def _scatter_targets(item: Any, outputs: set[str], path: FieldPath) -> Iterator[Problem]:
    seen: set[str] = set()
    for target in item.target_name:
        here = (*path, "target_name")
        if target not in outputs:
            yield Problem(f"unknown target output name '{target}'", here, suggestion=likely_meant(target, outputs))
        elif target in seen:
            yield Problem(f"target output name '{target}' can only be specified once", here)
        seen.add(target)
