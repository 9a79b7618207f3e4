"""Whether an ensemble's graph makes sense by itself (spec C-100, C-123, S-102).

What its models say of the tensors is compared later, in ``ensemble_check.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.normalise import ENSEMBLE

#: Ensemble parameter: with ``true`` its samples are run. Without it they are refused, as by Triton (spec C-100, L-054).
WARMUP_PARAMETER = "forebay_ensemble_warmup"


@dataclass(eq=False)
class _Tensor:
    """One tensor of an ensemble's graph; it depends on ``sources`` and feeds ``targets``."""

    name: str
    is_output: bool = False
    is_ready: bool = False
    sources: list[_Tensor] = field(default_factory=list["_Tensor"])
    targets: list[_Tensor] = field(default_factory=list["_Tensor"])


def graph_problems(message: Any) -> Iterator[Problem]:
    """Yield what is wrong with the graph of a ModelConfig message that has ``ensemble_scheduling``."""
    name = message.name
    if message.platform != ENSEMBLE:
        yield Problem(
            f"ensemble scheduling cannot be set for model '{name}' whose platform is not {ENSEMBLE}", ("platform",)
        )
    if message.instance_group:
        yield Problem(f"instance group should not be specified for ensemble '{name}'", ("instance_group",))
    if message.HasField("optimization"):
        yield Problem(f"optimization should not be specified for ensemble '{name}'", ("optimization",))
    if message.model_warmup and not _wants_samples_run(message):
        yield Problem(
            f"model_warmup can not be specified for ensemble '{name}'",
            ("model_warmup",),
            hint=f'It can here, if the parameter {WARMUP_PARAMETER} is "true".',
        )
    if not message.ensemble_scheduling.step:
        yield Problem(f"must specify 'step' for ensemble '{name}'", ("ensemble_scheduling",))
        return
    problems: list[Problem] = []
    tensors = _ensemble_graph(message, problems)
    yield from problems
    if not problems:
        yield from _ensemble_flow(message, tensors)


def _wants_samples_run(message: Any) -> bool:
    # Looking a key up would add it.
    parameters = message.parameters
    return WARMUP_PARAMETER in parameters and parameters[WARMUP_PARAMETER].string_value == "true"


def _ensemble_graph(message: Any, problems: list[Problem]) -> dict[str, _Tensor]:
    """Return the ensemble's tensors by name, linked; appends what is wrong with single steps."""
    name = message.name
    tensors: dict[str, _Tensor] = {}
    for index, step in enumerate(message.ensemble_scheduling.step):
        path = ("ensemble_scheduling", "step", index)
        missing = [part for part in ("model_name", "input_map", "output_map") if not getattr(step, part)]
        problems += [Problem(f"must specify '{part}' in step {index} of ensemble '{name}'", path) for part in missing]
        outputs: list[_Tensor] = []
        for key in sorted(step.output_map):
            tensor = tensors.setdefault(step.output_map[key], _Tensor(step.output_map[key]))
            if tensor.is_output:
                problems.append(
                    Problem(
                        f"ensemble tensor '{tensor.name}' can appear in an output map only once for ensemble "
                        f"'{name}' step {index}",
                        (*path, "output_map", key),
                    )
                )
            tensor.is_output = True
            outputs.append(tensor)
        for key in sorted(step.input_map):
            source = tensors.setdefault(step.input_map[key], _Tensor(step.input_map[key]))
            for target in outputs:
                target.sources.append(source)
                source.targets.append(target)
    return tensors


def _ensemble_flow(message: Any, tensors: dict[str, _Tensor]) -> Iterator[Problem]:
    """Check that every tensor is written and used (spec S-102)."""
    name = message.name
    ready: deque[_Tensor] = deque()
    for index, given in enumerate(message.input):
        tensor = tensors.get(given.name)
        if tensor is None:
            yield Problem(f"ensemble input '{given.name}' for ensemble {name}' is not used", ("input", index))
            continue
        tensor.is_ready = True
        ready.append(tensor)
    while ready:
        for target in ready.popleft().targets:
            if not target.is_ready and all(source.is_ready for source in target.sources):
                target.is_ready = True
                ready.append(target)
    outputs: set[str] = set()
    unwritten = False
    for index, given in enumerate(message.output):
        tensor = tensors.get(given.name)
        if tensor is None:
            yield Problem(f"ensemble output '{given.name}' for ensemble {name}' is not used", ("output", index))
            continue
        outputs.add(given.name)
        if not tensor.is_ready:
            unwritten = True
            text = f"output '{given.name}' for ensemble '{name}' is not written"
            cause = _unready_source(tensor)
            if cause is not tensor:
                text += f": at least one of its depending tensors, '{cause.name}', is not connected"
            yield Problem(text, ("output", index))
    if unwritten:
        return  # what follows from it would only repeat it
    for tensor in tensors.values():
        if tensor.name not in outputs and (not tensor.is_ready or not tensor.targets):
            yield Problem(f"ensemble tensor '{tensor.name}' is unused in ensemble '{name}'", ("ensemble_scheduling",))


def _unready_source(tensor: _Tensor) -> _Tensor:
    """Return the tensor furthest up that is not written; the graph may have circles."""
    seen: set[str] = set()
    last = tensor
    while True:
        upstream = next((node for node in last.sources if not node.is_ready and node.name not in seen), None)
        if upstream is None:
            return last
        seen.add(upstream.name)
        last = upstream
