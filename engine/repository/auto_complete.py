"""Complete a partial configuration from what a backend found in the model file, and compare the two.

The model file is never opened here: a worker process looks into it and sends back a :class:`DescribedModel`. The rules
depend on the backend: :func:`complete_config` is for backends that know their tensors (ONNX Runtime, OpenVINO,
TorchScript with a signature), :func:`merge_completed` for the Python backend, whose model edits the configuration
itself; TensorRT's are in ``engine_auto_complete.py``. The file on disk is never changed (spec R-068).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from forebay.engine.repository.config_problem import ConfigError, Problem, likely_meant
from forebay.engine.repository.model_config_schema import (
    FieldPath,
    ModelConfig,
    enum_name,
    enum_number,
)
from forebay.engine.repository.normalise import normalise_defaults
from forebay.ipc.errors import NotFound
from forebay.ipc.tensor import shape_text

#: ``default-max-batch-size`` of ``--backend-config`` where none is given (spec B-002).
DEFAULT_MAX_BATCH_SIZE = 4


class DescribedTensor(msgspec.Struct, frozen=True):
    """One input or output as the model file declares it."""

    name: str
    datatype: str
    """Config name, for example ``TYPE_FP32``."""
    shape: tuple[int, ...]
    """Whole shape, batch dimension included; -1 for a size that varies; () for a scalar."""
    optional: bool = False
    """The model has a default for this input."""
    is_shape_tensor: bool = False
    """Its values are shapes (TensorRT)."""


class DescribedModel(msgspec.Struct, frozen=True):
    """What a backend found in a model file."""

    inputs: tuple[DescribedTensor, ...]
    outputs: tuple[DescribedTensor, ...]
    supports_batching: bool | None = None
    """What the backend knows about it; None: if and only if every tensor's first dimension varies (spec R-063)."""
    max_batch_size: int | None = None
    """Largest batch that the file allows, 0 for none (TensorRT); None: it does not say."""

    @property
    def can_batch(self) -> bool:
        """True if the first dimension of every tensor can be the batch."""
        tensors = (*self.inputs, *self.outputs)
        varies = all(tensor.shape[:1] == (-1,) for tensor in tensors)
        return varies if self.supports_batching is None else self.supports_batching


class Completed(msgspec.Struct, frozen=True):
    """A completed configuration."""

    config: ModelConfig
    """A copy; the configuration that was passed in is unchanged."""
    log: tuple[str, ...] = ()
    """Sentences for the log, in Triton's words."""


def is_complete(config: ModelConfig) -> bool:
    """True if inputs and outputs are given, so that nothing need be asked of the model file (spec R-064)."""
    return bool(config.message.input) and bool(config.message.output)


def require_config(config: ModelConfig, has_config: bool) -> None:
    """Refuse a model of a backend that cannot complete configurations (spec R-061, R-067).

    Args:
        has_config: the model has a configuration file or an override.

    Raises:
        NotFound: it has none.
    """
    if not has_config:
        raise NotFound(f"model configuration is not provided for model '{config.name}'")


def complete_config(
    config: ModelConfig, described: DescribedModel, *, default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
) -> Completed:
    """Add inputs, outputs, ``max_batch_size`` and the dynamic batcher where they are missing (spec R-062..R-064).

    Raises:
        ConfigError: ``max_batch_size`` is given, and the model does not batch (spec B-020).
    """
    name = config.name
    if is_complete(config):
        return Completed(
            config,
            (f"skipping model configuration auto-complete for '{name}': inputs and outputs already specified",),
        )
    completed = config.copy()
    message = completed.message
    log: list[str] = []
    if described.can_batch:
        if message.max_batch_size == 0:
            message.max_batch_size = max(default_max_batch_size, 0)
            log.append(
                f"autofilled max_batch_size to {message.max_batch_size} for model '{name}' since batching is "
                "supporrted but no max_batch_size is specified in model configuration. Must specify max_batch_size to "
                "utilize autofill with a larger max batch size"
            )
        if message.max_batch_size > 1 and message.WhichOneof("scheduling_choice") is None:
            message.dynamic_batching.SetInParent()
    elif message.max_batch_size > 0:
        problem = Problem(
            f"autofill failed for model '{name}': model does not support batching while non-zero max_batch_size is "
            "specified",
            path=("max_batch_size",),
            suggestion="max_batch_size: 0",
            hint=_fixed_batch_hint(described),
        )
        raise ConfigError([problem.located(config.source)])
    internal = internal_tensors(message)
    if not message.input:
        for tensor in described.inputs:
            if tensor.name not in internal:
                added = message.input.add()
                fill_tensor(added, tensor, message.max_batch_size)
                added.optional = tensor.optional and message.max_batch_size == 0
    if not message.output:
        for tensor in described.outputs:
            if tensor.name not in internal:
                fill_tensor(message.output.add(), tensor, message.max_batch_size)
    normalise_defaults(completed)
    return Completed(completed, tuple(log))


def merge_completed(config: ModelConfig, completed: ModelConfig) -> Completed:
    """Take over what a backend may set of a configuration that it completed itself; the rest is ignored (spec R-062).

    Args:
        completed: for Python models, what ``auto_complete_config`` returned.
    """
    merged = config.copy()
    target, given = merged.message, completed.message
    target.max_batch_size = given.max_batch_size
    for part in ("input", "output"):
        target.ClearField(part)
        getattr(target, part).extend(getattr(given, part))
    choice = given.WhichOneof("scheduling_choice")
    if choice is not None and target.WhichOneof("scheduling_choice") is None:
        getattr(target, choice).CopyFrom(getattr(given, choice))
    if given.HasField("model_transaction_policy"):
        target.model_transaction_policy.CopyFrom(given.model_transaction_policy)
    normalise_defaults(merged)
    return Completed(merged)


def described_problems(config: ModelConfig, described: DescribedModel) -> list[Problem]:
    """Return where a completed configuration contradicts the model file.

    The sentences are those of Triton's ONNX Runtime backend (spec B-011, B-020..B-026).
    """
    message = config.message
    problems = [
        *_tensor_problems(message, "input", described.inputs),
        *_tensor_problems(message, "output", described.outputs),
        *_control_problems(message, described),
    ]
    return [problem.located(config.source) for problem in problems]


def check_described(config: ModelConfig, described: DescribedModel) -> None:
    """Raise ConfigError with everything that :func:`described_problems` finds."""
    problems = described_problems(config, described)
    if problems:
        raise ConfigError(problems)


# ---- completing ------------------------------------------------------------------------------------------------------


def fill_tensor(target: Any, tensor: DescribedTensor, max_batch_size: int) -> None:
    """Write what a tensor lacks; a scalar per item becomes dims [1] with an empty reshape (spec D-016).

    Without batching a scalar is dims [1] alone: an empty reshape is refused there (spec D-013). What the target has is
    kept, its name apart.
    """
    target.name = tensor.name
    if not target.data_type:
        target.data_type = enum_number("DataType", tensor.datatype)
    if target.dims:
        return
    dims = tensor.shape
    if max_batch_size > 0:
        # A shape tensor has the batch size in front of its values instead of a batch dimension (spec D-018).
        dims = tuple(size - 1 for size in dims) if tensor.is_shape_tensor else dims[1:]
    if dims:
        target.dims.extend(dims)
    else:
        target.dims.append(1)
        if max_batch_size > 0:
            target.reshape.SetInParent()


def internal_tensors(message: Any) -> set[str]:
    """Return the model's tensors that the server feeds or keeps itself: controls, state, batch inputs."""
    batching = message.sequence_batching
    names = {control.name for control in batching.control_input}
    for state in batching.state:
        names.update((state.input_name, state.output_name))
    for item in message.batch_input:
        names.update(item.target_name)
    return names


def _fixed_batch_hint(described: DescribedModel) -> str:
    fixed = [tensor for tensor in (*described.inputs, *described.outputs) if tensor.shape[:1] != (-1,)]
    listed = ", ".join(f"'{tensor.name}' {shape_text(tensor.shape)}" for tensor in fixed[:4])
    return f"The first dimension is fixed in {listed}; export the model with a variable one." if fixed else ""


# ---- comparing -------------------------------------------------------------------------------------------------------


def _tensor_problems(message: Any, direction: str, described: tuple[DescribedTensor, ...]) -> Iterator[Problem]:
    name = message.name
    known = {tensor.name: tensor for tensor in described}
    tensors = list(getattr(message, direction))
    internal = internal_tensors(message) & set(known)
    expected = len(tensors) + (len(internal) if direction == "input" else 0)
    if expected > len(known):
        yield Problem(
            f"unable to load model '{name}', configuration expects {expected} {direction}s, model provides at most "
            f"{len(known)}",
            (direction,),
            possible=tuple(known),
        )
    if direction == "input":
        given = {tensor.name for tensor in tensors} | internal
        missing = [tensor.name for tensor in described if tensor.name not in given and not tensor.optional]
        if missing and len(given & set(known)) == len(given):
            yield Problem(
                f"unable to load model '{name}', configuration expects {expected} inputs, model provides {len(known)}",
                ("input",),
                hint=f"Not in the configuration: {', '.join(missing)}.",
            )
    for index, tensor in enumerate(tensors):
        found = known.get(tensor.name)
        path: FieldPath = (direction, index)
        if found is None:
            allowed = ", ".join(sorted(known))
            yield Problem(
                f"unexpected inference {direction} '{tensor.name}', allowed {direction}s are: {allowed}",
                (*path, "name"),
                possible=tuple(sorted(known)),
                suggestion=likely_meant(tensor.name, known),
            )
            continue
        configured = enum_name("DataType", tensor.data_type)
        if configured != found.datatype:
            yield Problem(
                f"unable to load model '{name}', configuration expects datatype {configured} for {direction} "
                f"'{tensor.name}', model provides {found.datatype}",
                (*path, "data_type"),
                suggestion=found.datatype,
            )
        yield from _shape_problems(message, tensor, found, direction, path)


def _shape_problems(
    message: Any, tensor: Any, found: DescribedTensor, direction: str, path: FieldPath
) -> Iterator[Problem]:
    prefix = f"model '{message.name}', tensor '{tensor.name}': "
    batching = message.max_batch_size > 0
    if direction == "input" and batching and tensor.optional:
        yield Problem(
            f"optional input '{tensor.name}' is not supported for models that support batching", (*path, "optional")
        )
    if direction == "input" and tensor.allow_ragged_batch:
        if found.shape != (-1,):
            yield Problem(
                f"{prefix}allow_ragged_batch needs an input of shape [-1]; but shape expected by the model is "
                f"{shape_text(found.shape)}",
                (*path, "allow_ragged_batch"),
            )
        return
    if direction == "output" and any(tensor.name in item.target_name for item in message.batch_output):
        return  # Divided by the shape of an input; what the model makes is of any shape.
    dims = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else tuple(tensor.dims)
    if batching and found.shape[:1] != (-1,):
        yield Problem(
            f"{prefix}for the model to support batching the shape should have at least 1 dimension and the first "
            f"dimension must be -1; but shape expected by the model is {shape_text(found.shape)}",
            ("max_batch_size",),
            hint=f"Set 'max_batch_size: 0' and dims {shape_text(found.shape)}, or export the model with a variable "
            "first dimension.",
        )
        return
    full = (-1, *dims) if batching else dims
    if not batching and not found.shape and full == (1,):
        return  # A scalar; backends take the one dimension off and put it on (spec D-013).
    if len(full) == len(found.shape) and all(
        model in (-1, given) for model, given in zip(found.shape, full, strict=True)
    ):
        return
    text = (
        f"{prefix}the model expects {len(found.shape)} dimensions (shape {shape_text(found.shape)}) but the model "
        f"configuration specifies {len(full)} dimensions "
    )
    if batching:
        text += (
            "(an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making "
            f"complete shape {shape_text(full)})"
        )
    else:
        text += f"(shape {shape_text(full)})"
    right = found.shape[1:] if batching else found.shape
    yield Problem(text, (*path, "dims"), suggestion=f"dims: {shape_text(right)}" if right else "")


def _control_problems(message: Any, described: DescribedModel) -> Iterator[Problem]:
    """Sequence controls are model inputs of one element per request (spec B-026)."""
    known = {tensor.name: tensor for tensor in described.inputs}
    wanted_shape = (-1, 1) if message.max_batch_size > 0 else (1,)
    for index, given in enumerate(message.sequence_batching.control_input):
        path: FieldPath = ("sequence_batching", "control_input", index)
        found = known.get(given.name)
        if found is None:
            yield Problem(
                f"unable to load model '{message.name}', configured sequence control '{given.name}' is not provided "
                "by the model",
                path,
                possible=tuple(known),
                suggestion=likely_meant(given.name, known),
            )
            continue
        for control in given.control:
            datatype = _control_datatype(control)
            if datatype != found.datatype:
                yield Problem(
                    f"unable to load model '{message.name}', configuration expects datatype {datatype} for sequence "
                    f"control '{given.name}', model provides {found.datatype}",
                    path,
                )
        if len(found.shape) != len(wanted_shape) or any(
            dim not in (-1, wanted) for dim, wanted in zip(found.shape, wanted_shape, strict=True)
        ):
            yield Problem(
                f"unable to load model '{message.name}', sequence control '{given.name}' must have shape "
                f"{shape_text(wanted_shape)}, model provides {shape_text(found.shape)}",
                path,
            )


def _control_datatype(control: Any) -> str:
    for field, datatype in (
        ("int32_false_true", "TYPE_INT32"),
        ("fp32_false_true", "TYPE_FP32"),
        ("bool_false_true", "TYPE_BOOL"),
    ):
        if len(getattr(control, field)):
            return datatype
    return enum_name("DataType", control.data_type)
