"""Complete a configuration from a TensorRT engine (spec R-065): Triton's rules for it are not those for other backends.

An engine says how large its batches can be, so ``max_batch_size`` comes from there, and so does which of its tensors
are shapes. A configuration is compared with its engine even if it is complete. Behaviour and sentences are those of
Triton's TensorRT backend (``ModelState::AutoCompleteConfigHelper``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forebay.engine.repository.auto_complete import (
    Completed,
    DescribedModel,
    DescribedTensor,
    fill_tensor,
    internal_tensors,
)
from forebay.engine.repository.config_problem import ConfigError, Problem, likely_meant
from forebay.engine.repository.model_config_schema import FieldPath, ModelConfig
from forebay.engine.repository.normalise import normalise_defaults


def complete_engine_config(config: ModelConfig, described: DescribedModel) -> Completed:
    """Add what a configuration lacks, and compare the rest with the engine.

    Args:
        described: with ``max_batch_size``; only tensors' first sizes say whether they have a batch dimension.

    Raises:
        ConfigError: the configuration contradicts the engine.
    """
    completed = config.copy()
    message = completed.message
    try:
        log = _complete_batching(message, described)
        for direction, tensors in (("input", described.inputs), ("output", described.outputs)):
            _complete_tensors(message, direction, tensors)
    except _Contradiction as found:
        raise ConfigError([found.problem.located(config.source)]) from None
    normalise_defaults(completed)
    return Completed(completed, log)


class _Contradiction(Exception):
    """A problem whose place is not known yet."""

    def __init__(self, text: str, path: FieldPath, *, suggestion: str = "") -> None:
        super().__init__(text)
        self.problem = Problem(text, path, suggestion=suggestion)


def _complete_batching(message: Any, described: DescribedModel) -> tuple[str, ...]:
    """Set the largest batch and the dynamic batcher where they are missing; returns sentences for the log."""
    largest = described.max_batch_size or 0
    log: tuple[str, ...] = ()
    has_batch = _dims_leave_out_batch(message, described)
    if has_batch and largest == 0:
        raise _Contradiction(
            f"autofill failed for model '{message.name}': model tensor shape configuration hints for dynamic batching "
            "but the underlying engine doesn't support batching.",
            ("max_batch_size",),
        )
    if has_batch is False:
        log = (f"The specified dimensions in model config for {message.name} hints that batching is unavailable",)
        largest = 0
    if message.max_batch_size > largest:
        raise _Contradiction(
            f"autofill failed for model '{message.name}': configuration specified max-batch {message.max_batch_size} "
            f"but TensorRT engine only supports max-batch {largest}",
            ("max_batch_size",),
            suggestion=f"max_batch_size: {largest}",
        )
    message.max_batch_size = message.max_batch_size or largest
    if largest > 1 and message.WhichOneof("scheduling_choice") is None:
        message.dynamic_batching.SetInParent()
    return log


def _dims_leave_out_batch(message: Any, described: DescribedModel) -> bool | None:
    """Return whether the configured dims are those of a model that batches; None: none are configured.

    Raises:
        _Contradiction: some are, some are not, or an engine has no such tensor.
    """
    has_batch: bool | None = None
    for direction, tensors in (("input", described.inputs), ("output", described.outputs)):
        known = {tensor.name: tensor for tensor in tensors}
        for index, tensor in enumerate(getattr(message, direction)):
            if direction == "input" and tensor.allow_ragged_batch:
                return True
            found = known.get(tensor.name)
            if found is None:
                raise _unknown_tensor(tensor.name, (direction, index, "name"), sorted(known))
            dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            if not dims:
                continue
            leaves_out = _leaves_out_batch(dims, found)
            if has_batch and not leaves_out:
                raise _Contradiction(
                    f"unable to autofill for '{message.name}', model tensor configurations are contradicting each "
                    "other in terms of whether batching is supported",
                    (direction, index, "dims"),
                )
            has_batch = leaves_out
    return has_batch


def _leaves_out_batch(dims: Sequence[int], found: DescribedTensor) -> bool:
    if found.is_shape_tensor:
        return found.shape[:1] == (dims[0] + 1,)
    return len(found.shape) == len(dims) + 1


def _unknown_tensor(name: str, path: FieldPath, known: Sequence[str]) -> _Contradiction:
    direction = path[0]
    return _Contradiction(
        f"unexpected inference {direction} '{name}', allowed {direction}s are: {', '.join(known)}",
        path,
        suggestion=likely_meant(name, known),
    )


def _complete_tensors(message: Any, direction: str, described: tuple[DescribedTensor, ...]) -> None:
    """Write the inputs or outputs, or what those that are given lack."""
    given = getattr(message, direction)
    known = {tensor.name: tensor for tensor in described}
    for index, tensor in enumerate(given):
        found = known.get(tensor.name)
        if found is None:
            raise _unknown_tensor(tensor.name, (direction, index, "name"), sorted(known))
        if tensor.is_shape_tensor != found.is_shape_tensor:
            kind = "a shape tensor" if tensor.is_shape_tensor else "an execution tensor"
            raise _Contradiction(
                f"'{tensor.name}' is incorrectly specified as {kind}.",
                (direction, index, "is_shape_tensor"),
                suggestion=f"is_shape_tensor: {str(found.is_shape_tensor).lower()}",
            )
        fill_tensor(tensor, found, message.max_batch_size)
    if given:
        return
    internal = internal_tensors(message)
    for found in described:
        if found.name not in internal:
            added = given.add()
            fill_tensor(added, found, message.max_batch_size)
            added.is_shape_tensor = found.is_shape_tensor
