"""Compare an ensemble with the models that it is made of, once those are loaded and their configurations complete.

``validate.py`` judges an ensemble's graph by itself; here datatypes, shapes and batch sizes of its steps are joined
(spec S-102..S-104, S-109; source: core ``ensemble_utils.cc``). Models are named by their identity: the name, or
``namespace::name``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from forebay.engine.repository.config_problem import ConfigError, Problem, likely_meant
from forebay.engine.repository.model_spec import EnsembleSpec, EnsembleStepSpec, InputSpec, ModelSpec, OutputSpec
from forebay.ipc.tensor import DATATYPES, shape_text


def step_identity(step: EnsembleStepSpec) -> str:
    """Return how a step's model is called among all models."""
    return f"{step.model_namespace}::{step.model_name}" if step.model_namespace else step.model_name


def dependencies(ensemble: ModelSpec) -> tuple[str, ...]:
    """Return the identities of an ensemble's models, each once, in the order of the steps; empty for other models."""
    if not isinstance(ensemble.scheduling, EnsembleSpec):
        return ()
    return tuple(dict.fromkeys(step_identity(step) for step in ensemble.scheduling.steps))


def circle_problem(name: str, depends_on: Mapping[str, tuple[str, ...]]) -> Problem | None:
    """Return the problem of an ensemble that contains itself, directly or through others (spec R-097).

    Args:
        name: identity of the ensemble.
        depends_on: identity of each known model to the identities of its models.
    """
    pending = [(name, dependency) for dependency in depends_on.get(name, ())]
    seen: set[str] = set()
    while pending:
        user, model = pending.pop()
        if model == name:
            return Problem(f"circular dependency between ensembles: {name} -> ... -> {user} -> {name}")
        if model not in seen:
            seen.add(model)
            pending += [(model, dependency) for dependency in depends_on.get(model, ())]
    return None


def check_ensemble(ensemble: ModelSpec, models: Mapping[str, ModelSpec]) -> bool:
    """Check an ensemble against its models.

    Args:
        models: the latest loaded version of each model of :func:`dependencies`, by identity.

    Returns:
        Whether the ensemble is decoupled: it is as soon as one of its steps is (spec S-109).

    Raises:
        ConfigError: with everything that :func:`ensemble_problems` finds.
    """
    problems = ensemble_problems(ensemble, models)
    if problems:
        raise ConfigError(problems)
    return any(models[identity].decoupled for identity in dependencies(ensemble))


def ensemble_problems(ensemble: ModelSpec, models: Mapping[str, ModelSpec]) -> list[Problem]:
    """Return where an ensemble contradicts its models, with Triton's sentences."""
    if not isinstance(ensemble.scheduling, EnsembleSpec):
        return []
    own: list[InputSpec | OutputSpec] = [*ensemble.outputs, *ensemble.inputs]
    tensors = {
        tensor.name: _Tensor(ensemble.name, tensor.datatype, tensor.dims, ensemble.is_batching, tensor.reshape)
        for tensor in own
    }
    problems: list[Problem] = []
    for index, step in enumerate(ensemble.scheduling.steps):
        model = models.get(step_identity(step))
        path = ("ensemble_scheduling", "step", index)
        if model is None:
            text = f"ensemble '{ensemble.name}' depends on '{step_identity(step)}' which has no loaded version."
            problems.append(Problem(text, path))
            continue
        if 0 < model.max_batch_size < ensemble.max_batch_size:
            problems.append(
                Problem(
                    f"ensemble {ensemble.name} allows maximum batch size {ensemble.max_batch_size}, but it contains "
                    f"model {step.model_name} which only allows maximum batch size to be {model.max_batch_size}",
                    ("max_batch_size",),
                )
            )
        problems += _step_inputs(ensemble.name, step, model, tensors, index)
        problems += _step_outputs(ensemble.name, step, model, tensors, index)
        for name in step.output_map.values():
            if name in tensors:
                sources = [tensors[source] for source in step.input_map.values() if source in tensors]
                tensors[name].written_by(index, model, sources)
    if not problems:
        problems += _mixed_decoupling(ensemble, tensors)
    return problems


@dataclass(eq=False)
class _Tensor:
    """One tensor of an ensemble, as the model says it that was met first."""

    model: str
    datatype: str
    dims: tuple[int, ...]
    is_batching: bool
    reshape: tuple[int, ...] | None = None
    writer: str = ""
    step: int = -1
    is_decoupled: bool = False
    sources: list[_Tensor] = field(default_factory=list["_Tensor"])
    targets: list[_Tensor] = field(default_factory=list["_Tensor"])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dims if self.reshape is None else self.reshape

    @property
    def full_shape(self) -> tuple[int, ...]:
        """With the batch dimension."""
        return (-1, *self.shape) if self.is_batching else self.shape

    def written_by(self, step: int, model: ModelSpec, sources: list[_Tensor]) -> None:
        self.step, self.writer, self.is_decoupled = step, model.name, model.decoupled
        for source in sources:
            self.sources.append(source)
            source.targets.append(self)


def _step_inputs(
    ensemble: str, step: EnsembleStepSpec, model: ModelSpec, tensors: dict[str, _Tensor], index: int
) -> Iterator[Problem]:
    known = {tensor.name: tensor for tensor in model.inputs}
    identity = step_identity(step)
    path = ("ensemble_scheduling", "step", index, "input_map")
    for name, tensor in step.input_map.items():
        if name not in known:
            yield Problem(
                f"in ensemble {ensemble}, ensemble tensor {tensor} is mapping to non-existing input {name} in model "
                f"{identity}",
                (*path, name),
                possible=tuple(known),
                suggestion=likely_meant(name, known),
            )
    for given in model.inputs:
        if given.name in step.input_map:
            yield from _join(ensemble, step.input_map[given.name], given, model, identity, tensors, (*path, given.name))
        elif not given.optional:
            yield Problem(
                f"in ensemble {ensemble}, input {given.name} in model {identity} is not mapped to any ensemble tensors",
                path,
            )


def _step_outputs(
    ensemble: str, step: EnsembleStepSpec, model: ModelSpec, tensors: dict[str, _Tensor], index: int
) -> Iterator[Problem]:
    known = {tensor.name: tensor for tensor in model.outputs}
    path = ("ensemble_scheduling", "step", index, "output_map")
    for name, tensor in step.output_map.items():
        if name not in known:
            yield Problem(
                f"in ensemble {ensemble}, ensemble tensor {tensor} is mapped from non-existing output {name} in model "
                f"{step.model_name}",
                (*path, name),
                possible=tuple(known),
                suggestion=likely_meant(name, known),
            )
        else:
            yield from _join(ensemble, tensor, known[name], model, step_identity(step), tensors, (*path, name))


def _join(
    ensemble: str,
    name: str,
    given: InputSpec | OutputSpec,
    model: ModelSpec,
    identity: str,
    tensors: dict[str, _Tensor],
    path: tuple[str | int, ...],
) -> Iterator[Problem]:
    """Compare what a model says of an ensemble's tensor with what is known of it (spec S-102, S-104)."""
    met = _Tensor(identity, given.datatype, given.dims, model.is_batching)
    known = tensors.setdefault(name, met)
    if known is met:
        return
    prefix = f"in ensemble {ensemble}, ensemble tensor {name}: "
    if known.datatype != met.datatype:
        yield Problem(
            f"{prefix}inconsistent data type: {DATATYPES[known.datatype].config_name} is inferred from model "
            f"{known.model} while {DATATYPES[met.datatype].config_name} is inferred from model {met.model}",
            path,
        )
    elif not _agree(known.shape, met.shape) and not _agree(known.full_shape, met.full_shape):
        yield Problem(
            f"{prefix}inconsistent shape: {shape_text(known.full_shape)} is inferred from model {known.model} while "
            f"{shape_text(met.full_shape)} is inferred from model {met.model}",
            path,
        )


def _agree(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return len(left) == len(right) and all(-1 in (a, b) or a == b for a, b in zip(left, right, strict=True))


def _mixed_decoupling(ensemble: ModelSpec, tensors: dict[str, _Tensor]) -> Iterator[Problem]:
    """A step must not join the responses of different decoupled steps: they have no common count."""
    origins: dict[_Tensor, int] = {tensors[given.name]: -1 for given in ensemble.inputs}
    ready = deque(origins)
    while ready:
        for target in ready.popleft().targets:
            if target in origins or any(source not in origins for source in target.sources):
                continue
            found = {origins[source] for source in target.sources}
            if len(found) > 1:
                yield Problem(
                    f"in ensemble {ensemble.name}, step of model '{target.writer}' receives inputs originated from "
                    "different decoupled models",
                    ("ensemble_scheduling", "step", target.step),
                )
                return
            origins[target] = target.step if target.is_decoupled else found.pop()
            ready.append(target)
