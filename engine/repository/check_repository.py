"""Judge whole repositories without loading anything: every problem of every model at once. For ``forebay validate``.

Pure file code, as the rest of this folder. Whether a model file can be loaded, and has the tensors that the
configuration promises, only a worker can say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from forebay.engine.repository.auto_complete import is_complete
from forebay.engine.repository.config_problem import ConfigError, Problem
from forebay.engine.repository.ensemble_check import circle_problem, dependencies, ensemble_problems
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.repository.latency_objective import objective_us
from forebay.engine.repository.model_config_schema import FieldPath, ModelConfig
from forebay.engine.repository.model_files import read_labels, resolve_model_file
from forebay.engine.repository.model_spec import ModelSpec
from forebay.engine.repository.normalise import DEFAULT_MIN_COMPUTE_CAPABILITY, Gpu, normalise_instance_groups
from forebay.engine.repository.packaged_files import MODEL_FILE, missing_packages, packaged_model_file
from forebay.engine.repository.spec_reader import spec_from_config
from forebay.engine.repository.validate import load_problems
from forebay.ipc.errors import NotFound, ServingError

#: Backends whose models are one file or directory called ``default_model_filename`` in each version.
FILE_BACKENDS = frozenset({"onnxruntime", "openvino", "pytorch", "tensorflow", "tensorrt", "python"})


class ModelReport(msgspec.Struct, kw_only=True):
    """What is to be said of one model."""

    name: str
    namespace: str = ""
    backend: str = ""
    versions: tuple[int, ...] = ()
    """Those that the version policy selects."""
    problems: list[Problem] = []
    """Why it cannot be served; empty: nothing is known to be wrong."""
    notes: list[str] = []
    """What is not wrong, and yet worth knowing."""
    missing: list[str] = []
    """What must be installed before it can be served here; no defect of the repository."""

    @property
    def identity(self) -> str:
        """``name``, or ``namespace::name``."""
        return f"{self.namespace}::{self.name}" if self.namespace else self.name


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What models may ask for."""

    gpus_of: Mapping[str, tuple[Gpu, ...]] = {}
    """By backend; a backend that is not here has none."""
    min_compute_capability: float = DEFAULT_MIN_COMPUTE_CAPABILITY
    gpu_fallback: bool = False
    """Models for GPUs may run on the CPU."""


def check_models(found: Sequence[FoundModel], machine: Machine) -> list[ModelReport]:
    """Judge every model by itself, then ensembles together with their models."""
    reports: dict[str, ModelReport] = {}
    specs: dict[str, ModelSpec] = {}
    for model in found:
        report = reports[model.identity] = _check_model(model, machine)
        if not report.problems and model.config is not None and is_complete(model.config):
            try:
                specs[model.identity] = spec_from_config(model.config)
            except ServingError as error:
                report.problems.append(Problem(error.text, code=error.code))
    graph = {name: dependencies(spec) for name, spec in specs.items()}
    for name, spec in specs.items():
        if spec.is_ensemble:
            reports[name].problems += _check_ensemble(name, spec, specs, graph, reports)
    return list(reports.values())


def _check_model(model: FoundModel, machine: Machine) -> ModelReport:
    report = ModelReport(
        name=model.name, namespace=model.namespace, problems=list(model.problems), notes=[], missing=[]
    )
    config = model.config
    if config is None:
        return report
    report.backend = config.backend or config.message.platform
    report.notes += model.versions.warnings
    if report.problems:
        return report
    try:
        chosen = model.chosen_versions()
    except ConfigError as error:
        report.problems += error.problems
        return report
    report.versions = chosen.numbers
    report.notes += chosen.errors
    report.problems += _config_problems(config, machine, report.notes)
    report.problems += _file_problems(model, config, chosen.numbers)
    with contextlib.suppress(ServingError):
        if (missing := missing_packages(config)) is not None:
            report.missing.append(missing)
    return report


def _config_problems(config: ModelConfig, machine: Machine, notes: list[str]) -> list[Problem]:
    if not is_complete(config):
        notes.append("inputs and outputs are taken from the model file when it is loaded")
        return []  # What can be said without them has been said.
    completed = config.copy()
    gpus = machine.gpus_of.get(config.backend, ())
    try:
        notes += normalise_instance_groups(
            completed,
            gpus,
            min_compute_capability=machine.min_compute_capability,
            gpu_fallback=machine.gpu_fallback,
        )
    except ConfigError as error:
        return list(error.problems)
    problems = load_problems(completed, gpus, min_compute_capability=machine.min_compute_capability)
    return problems or _objective_problems(completed)


def _objective_problems(config: ModelConfig) -> list[Problem]:
    """Return what is wrong with a model's latency objective."""
    try:
        objective_us(spec_from_config(config), "triton")
    except ServingError as error:
        return [Problem(error.text, ("parameters",), code=error.code).located(config.source)]
    return []


def _file_problems(model: FoundModel, config: ModelConfig, versions: Sequence[int]) -> list[Problem]:
    """Return what is missing of the files that the configuration names."""
    message, root = config.message, model.temporary_directory or model.repository
    problems: list[Problem] = []
    name = message.default_model_filename
    if MODEL_FILE in message.parameters:
        problems += _packaged_problems(config)
    elif name and config.backend in FILE_BACKENDS and not message.cc_model_filenames and not message.runtime:
        for version in versions:
            try:
                is_there = resolve_model_file(model.path, root, f"{version}/{name}") is not None
            except ServingError as error:
                problems.append(Problem(error.text, ("default_model_filename",), code=error.code))
                break
            if not is_there:
                problems.append(Problem(f"version {version} has no '{name}'", code=NotFound.code))
    for path, name in _named_files(config):
        try:
            if path[0] == "output":
                read_labels(model.path, root, name)
            elif resolve_model_file(model.path, root, name) is None:
                problems.append(Problem(f"there is no file '{name}'", path, code=NotFound.code).located(config.source))
        except ServingError as error:
            problems.append(Problem(error.text, path, code=error.code).located(config.source))
    return problems


def _packaged_problems(config: ModelConfig) -> list[Problem]:
    """Return what is wrong with a model file that an installed package ships."""
    try:
        if missing_packages(config) is None:
            packaged_model_file(config)
    except ServingError as error:
        return [Problem(error.text, ("parameters",), code=error.code).located(config.source)]
    return []


def _named_files(config: ModelConfig) -> Iterator[tuple[FieldPath, str]]:
    """Yield the files that a configuration names, below the model directory, each with its field."""
    message = config.message
    for index, output in enumerate(message.output):
        if output.label_filename:
            yield ("output", index, "label_filename"), output.label_filename
    for index, sample in enumerate(message.model_warmup):
        for key in sample.inputs:
            if file := sample.inputs[key].input_data_file:
                yield ("model_warmup", index, "inputs", key, "input_data_file"), f"warmup/{file}"


def _check_ensemble(
    name: str,
    spec: ModelSpec,
    specs: Mapping[str, ModelSpec],
    graph: Mapping[str, tuple[str, ...]],
    reports: Mapping[str, ModelReport],
) -> list[Problem]:
    """Compare an ensemble with its models, as far as those are known without being loaded."""
    circle = circle_problem(name, graph)
    if circle is not None:
        return [circle]
    problems: list[Problem] = []
    for needed in dependencies(spec):
        report = reports.get(needed)
        if report is not None and report.problems:
            problems.append(
                Problem(f"ensemble '{name}' depends on '{needed}' which is not valid", ("ensemble_scheduling",))
            )
        elif report is not None and needed not in specs:
            reports[name].notes.append(f"not compared with '{needed}', whose configuration is completed when it loads")
            return problems
    return problems or ensemble_problems(spec, specs)
