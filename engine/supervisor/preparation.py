"""From a model directory to what is loaded: completes, checks and reads the configuration of each version.

What a model file holds is asked of a worker that is thrown away afterwards (spec R-063, R-066): a broken file ends that
process, not the supervisor.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import msgspec

from forebay.engine.backend_families import family_of, missing_library
from forebay.engine.function_repository import BACKEND_NAME as FUNCTION_BACKEND
from forebay.engine.option_values import spin_us
from forebay.engine.repository.auto_complete import (
    DEFAULT_MAX_BATCH_SIZE,
    DescribedModel,
    DescribedTensor,
    check_described,
    complete_config,
    described_problems,
    is_complete,
    merge_completed,
    require_config,
)
from forebay.engine.repository.check_repository import FILE_BACKENDS
from forebay.engine.repository.config import config_json, parse_config_json
from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.engine_auto_complete import complete_engine_config
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.model_files import read_labels, resolve_model_file
from forebay.engine.repository.model_runtime import ModelRuntime, find_runtime
from forebay.engine.repository.model_spec import (
    DynamicBatchingSpec,
    EnsembleSpec,
    ModelSpec,
    OldestStrategy,
    SequenceBatchingSpec,
)
from forebay.engine.repository.normalise import normalise_defaults, normalise_instance_groups, usable_gpus
from forebay.engine.repository.packaged_files import missing_packages, packaged_model_file
from forebay.engine.repository.spec_reader import spec_from_config
from forebay.engine.repository.validate import check_load
from forebay.engine.supervisor.batching_policy import batching_policy
from forebay.engine.supervisor.gpus import device_extra, gpus_of_backend
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.rate_limits import check_resources, resources_of
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.errors import InvalidArgument, NotFound, ServingError, Unavailable
from forebay.ipc.log import log
from forebay.ipc.scheduler_messages import BatchingPolicy
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import Described, InstanceSpec

#: Backends whose models may set their own configuration; asked even if it is complete (spec R-066).
_SELF_COMPLETING = frozenset({"python"})

#: Backends whose models say their whole configuration: functions, by their declaration.
_SELF_CONFIGURED = frozenset({FUNCTION_BACKEND})

#: Backends whose model files are looked into even if the configuration is complete, to compare the two (spec R-065).
_ALWAYS_DESCRIBED = _SELF_COMPLETING | {"tensorrt"}

#: Backends that can say what their model files hold.
_DESCRIBING = frozenset({"onnxruntime", "openvino", "tensorrt", "python", "pytorch", "tensorflow"})

#: ``optimization.graph.level`` for a look into a file: what the graph could be made into does not matter.
_NO_GRAPH_OPTIMIZATION = 2

#: Backends that see each request with its id and parameters, or answer requests one by one.
_WANTS_PARCELS = frozenset({"forebay_fault", "identity"})
#: Backends that get requests one by one, and can do with slab rows for those that carry nothing but tensors.
_SEES_REQUESTS = frozenset({"python"})

#: Model parameter that overrides ``--worker-timeout-secs``.
WORKER_TIMEOUT_PARAMETER = "worker_timeout_secs"


class MissingLibrary(Unavailable):
    """An optional framework is not installed.

    Does not count for ``--exit-on-error``: the model cannot be served on this machine before somebody installs
    something, which is no defect of the repository, and the reason says what to do.
    """


@dataclass(frozen=True, slots=True)
class PreparedVersion:
    """One version of a model, ready to be loaded."""

    found: FoundModel
    version: int
    config: ModelConfig
    spec: ModelSpec
    runtime: ModelRuntime
    """What runs it; an ensemble is run by nobody."""
    config_json: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: BatchingPolicy
    """How the scheduler forms batches."""
    steps: tuple[EnsembleStep, ...] = ()
    """Of an ensemble, once it was joined with its models."""
    worker_timeout_s: float = 0.0
    """How long one execution may take; 0: any time."""

    @property
    def title(self) -> str:
        return f"{self.found.identity}:{self.version}"

    @property
    def wants_parcels(self) -> bool:
        """True if the engine must see every request by itself (DESIGN: such models are never granted)."""
        spec = self.spec
        return (
            self.runtime.backend in _WANTS_PARCELS
            # There are no rows of nothing.
            or not (self.inputs and self.outputs)
            or spec.decoupled
            or spec.is_ensemble
            or isinstance(spec.scheduling, SequenceBatchingSpec)
            or (isinstance(spec.scheduling, DynamicBatchingSpec) and spec.scheduling.has_queue_policy)
            or preserves_ordering(spec)
            or bool(spec.batch_inputs or spec.batch_outputs)
        )

    @property
    def sees_requests(self) -> bool:
        """True if the backend gets requests one by one, also those in slab rows."""
        return self.runtime.backend in _SEES_REQUESTS


async def prepare_version(plant: Plant, found: FoundModel, version: int, *, quietly: bool = False) -> PreparedVersion:
    """Complete and check one version's configuration.

    Args:
        quietly: others serve meanwhile; none of their requests waits for a look into the model.

    Raises:
        MissingLibrary: the backend's framework is not installed.
        ServingError: everything else that is wrong, with Triton's sentence.
    """
    config = found.usable_config.copy()
    backend = config.backend
    if (missing := missing_library(backend) or missing_packages(config)) is not None:
        raise MissingLibrary(missing)
    is_ensemble = config.message.WhichOneof("scheduling_choice") == "ensemble_scheduling"
    if not is_ensemble and not await asyncio.to_thread(os.path.isdir, found.version_path(version)):
        raise NotFound(f"failed to find version {version} of model '{found.name}'")
    runtime = ModelRuntime("")
    if not is_ensemble:
        runtime = await asyncio.to_thread(find_runtime, backend, plant.settings.backend.directory)
    await asyncio.to_thread(_check_model_file, found, version, config)
    if not plant.settings.repository.disable_auto_complete_config and not is_ensemble:
        config = await _auto_complete(plant, found, version, config, runtime, quietly=quietly)
    settings = plant.settings.gpu
    gpus = gpus_of_backend(plant.gpus, config)
    notes = normalise_instance_groups(
        config,
        gpus,
        min_compute_capability=settings.min_supported_compute_capability,
        gpu_fallback=settings.fallback == "cpu",
    )
    for note in notes:
        log.warning(note)
    try:
        check_load(config, gpus, min_compute_capability=settings.min_supported_compute_capability)
    except InvalidArgument as error:
        if "KIND_GPU" in error.text or "gpu id" in error.text:
            raise InvalidArgument(
                f"{error.text}; set 'kind: KIND_CPU' in instance_group, or start with --gpu-fallback cpu to serve such "
                "models on the CPU"
            ) from None
        raise
    spec = spec_from_config(config)
    check_resources(spec, plant.settings.rate_limit)
    outputs = await asyncio.to_thread(_read_outputs, found, spec)
    return PreparedVersion(
        found=found,
        version=version,
        config=config,
        spec=spec,
        runtime=runtime,
        config_json=config_json(config).encode(),
        inputs=tuple(tensor.tensor() for tensor in spec.inputs),
        outputs=outputs,
        batching=batching_policy(spec, plant.settings.scheduler.batching),
        worker_timeout_s=_worker_timeout_s(spec, plant.settings.process.worker_timeout_secs),
    )


def _check_model_file(found: FoundModel, version: int, config: ModelConfig) -> None:
    """Refuse a model file that lies outside its repository; backends' libraries open it by name (spec C-039).

    Raises:
        Refused: its name or a link leads out.
    """
    name = config.message.default_model_filename
    if name and config.backend in FILE_BACKENDS:
        # One that is not there is the backend's to complain about: it knows other names for it.
        resolve_model_file(found.path, found.temporary_directory or found.repository, f"{version}/{name}")


def _worker_timeout_s(spec: ModelSpec, default_s: float) -> float:
    """Return how long one execution of a model may take.

    Raises:
        InvalidArgument: its parameter is no number of seconds.
    """
    text = spec.parameters.get(WORKER_TIMEOUT_PARAMETER)
    if text is None:
        # A decoupled model may well stream for longer.
        return 0.0 if spec.decoupled else default_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InvalidArgument(
            f"parameter '{WORKER_TIMEOUT_PARAMETER}' must be a number of seconds, 0 for no limit, got '{text}'"
        )
    return seconds


def _read_outputs(found: FoundModel, spec: ModelSpec) -> tuple[TensorSpec, ...]:
    root = found.temporary_directory or found.repository
    return tuple(
        output.tensor(read_labels(found.path, root, output.label_filename) if output.label_filename else ())
        for output in spec.outputs
    )


async def _auto_complete(
    plant: Plant, found: FoundModel, version: int, config: ModelConfig, runtime: ModelRuntime, *, quietly: bool
) -> ModelConfig:
    backend = runtime.backend
    if backend in _SELF_CONFIGURED:
        return _declared_config(config, await _describe(plant, found, version, config, runtime, quietly=quietly))
    if backend not in _DESCRIBING:
        if not is_complete(config):
            require_config(config, bool(found.config_file) or found.is_override)
        return config
    if is_complete(config) and backend not in _ALWAYS_DESCRIBED:
        log.verbose(
            1,
            f"skipping model configuration auto-complete for '{found.name}': inputs and outputs already specified",
        )
        return config
    described = await _describe(plant, found, version, config, runtime, quietly=quietly)
    if backend in _SELF_COMPLETING:
        completed = merge_completed(config, _edited_config(config, described))
    elif described.max_batch_size is not None:
        completed = complete_engine_config(config, _described_model(described))
    else:
        tensors = _described_model(described)
        options = plant.settings.backend.options(backend)
        completed = complete_config(
            config, tensors, default_max_batch_size=_default_max_batch_size(options.get("default-max-batch-size"))
        )
        check_described(completed.config, tensors)
    for line in completed.log:
        log.info(line)
    return completed.config


async def contradictions(plant: Plant, found: FoundModel, version: int) -> list[Problem]:
    """Return everything in which a configuration contradicts the model file that it is for; empty if nothing is known.

    Loading says the first of them only, in the backend's own words.
    """
    config = found.usable_config
    try:
        runtime = await asyncio.to_thread(find_runtime, config.backend, plant.settings.backend.directory)
        if runtime.backend not in _DESCRIBING - _ALWAYS_DESCRIBED:
            return []
        described = await _describe(plant, found, version, config, runtime)
    except ServingError:
        return []
    problems = described_problems(config, _described_model(described))
    return [problem.located(config.source) for problem in problems]


def _default_max_batch_size(text: str | None) -> int:
    if text is None:
        return DEFAULT_MAX_BATCH_SIZE
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(f"backend setting 'default-max-batch-size' must be an integer, got '{text}'") from None


def _declared_config(config: ModelConfig, described: Described) -> ModelConfig:
    """Return a configuration that says where a model is, together with all that the model says itself."""
    declared = config.copy()
    declared.message.MergeFrom(parse_config_json(json.dumps(described.config)).message)
    normalise_defaults(declared)
    return declared


def _edited_config(config: ModelConfig, described: Described) -> ModelConfig:
    """Return what a model made of its configuration; nothing if its backend did not say."""
    return parse_config_json(json.dumps(described.config)) if described.config else config


def _described_model(described: Described) -> DescribedModel:
    return DescribedModel(
        inputs=tuple(_described_tensor(item) for item in described.inputs),
        outputs=tuple(_described_tensor(item) for item in described.outputs),
        max_batch_size=described.max_batch_size,
    )


def _described_tensor(item: dict[str, Any]) -> DescribedTensor:
    return DescribedTensor(
        name=item["name"],
        datatype=item["data_type"],
        shape=tuple(item["shape"]),
        optional=item.get("optional", False),
        is_shape_tensor=item.get("is_shape_tensor", False),
    )


async def _describe(
    plant: Plant, found: FoundModel, version: int, config: ModelConfig, runtime: ModelRuntime, *, quietly: bool = False
) -> Described:
    """Fork a worker, ask it, end it."""
    number = next(plant.next_instance)
    worker = WorkerHandle(number, f"{found.name}:{version} describe", lambda _worker: None)
    worker.loads_quietly = quietly
    message = config.message
    groups = message.instance_group
    usable = usable_gpus(plant.gpus, plant.settings.gpu.min_supported_compute_capability)
    spec = InstanceSpec(
        model=found.name,
        version=version,
        route=0,
        instance=number,
        instance_name=f"{found.name}_0",
        backend=runtime.backend,
        model_path=found.path,
        version_path=found.version_path(version),
        model_file=packaged_model_file(config) or config.default_model_filename,
        device_id=next(iter([*(groups[0].gpus if groups else ()), *usable]), 0),
        max_batch_size=config.max_batch_size,
        parameters={key: message.parameters[key].string_value for key in message.parameters},
        backend_config=plant.settings.backend.options(config.backend),
        config_json=config_json(config).encode(),
        platform=config.platform,
        optimization={"graph_level": _NO_GRAPH_OPTIMIZATION},
        extra={
            "runtime": str(message.runtime),
            "backend_file": runtime.backend_file,
            "cc_model_filenames": dict(message.cc_model_filenames),
            "profiles": [profile for group in groups for profile in group.profile],
        },
    )
    try:
        await plant.fork(family_of(runtime.backend), worker)
        return await worker.describe(spec, plant.settings.process.load_timeout_secs)
    finally:
        # It holds nothing that must be put in order. One that is just being forked is ended as soon as it is known.
        if not worker.ended.is_set():
            worker.kill()


# --- what other processes get of a specification


def scheduling_extra(spec: ModelSpec) -> dict[str, object]:
    """Return scheduling beyond the dynamic batcher, by kind, as plain data."""
    extra: dict[str, object] = {}
    if isinstance(spec.scheduling, SequenceBatchingSpec):
        extra["sequence"] = msgspec.to_builtins(spec.scheduling)
    elif isinstance(spec.scheduling, EnsembleSpec):
        extra["ensemble"] = msgspec.to_builtins(spec.scheduling)
    if spec.decoupled:
        # Its instance is free for others long before its requests are answered: never granted.
        extra["decoupled"] = True
    return extra


def preserves_ordering(spec: ModelSpec) -> bool:
    """Return whether answers must come in the order of the requests (spec S-024, S-067)."""
    scheduling = spec.scheduling
    if isinstance(scheduling, DynamicBatchingSpec):
        return scheduling.preserve_ordering
    return (
        isinstance(scheduling, SequenceBatchingSpec)
        and isinstance(scheduling.strategy, OldestStrategy)
        and scheduling.strategy.preserve_ordering
    )


def default_timeout_us(spec: ModelSpec) -> int:
    """Return how long a request may queue by default; 0: for ever."""
    scheduling = spec.scheduling
    return scheduling.default_queue_policy.default_timeout_us if isinstance(scheduling, DynamicBatchingSpec) else 0


def sequence_idle_us(spec: ModelSpec) -> int:
    """Return after how long without a request a sequence is over; 0: the model has none."""
    return spec.scheduling.max_sequence_idle_us if isinstance(spec.scheduling, SequenceBatchingSpec) else 0


def instance_specs(plant: Plant, prepared: PreparedVersion, route: int) -> list[InstanceSpec]:
    """Return what each worker of a version needs, complete but for what belongs to its slot."""
    spec, found = prepared.spec, prepared.found
    # Control tensors and implicit state are made in the worker.
    is_sequence = isinstance(spec.scheduling, SequenceBatchingSpec)
    sequence = msgspec.to_builtins(spec.scheduling) if is_sequence else None
    is_fixed = all(tensor.is_fixed for tensor in (*prepared.inputs, *prepared.outputs))
    # Labels are for frontends, and may be a million lines.
    outputs = tuple(msgspec.structs.replace(tensor, labels=()) for tensor in prepared.outputs)
    return [
        InstanceSpec(
            model=found.name,
            version=prepared.version,
            route=route,
            instance=0,
            instance_name=instance.name,
            backend=prepared.runtime.backend,
            model_path=found.path,
            version_path=found.version_path(prepared.version),
            model_file=packaged_model_file(prepared.config) or spec.default_model_filename,
            kind=str(instance.kind),
            device_id=instance.device_id,
            max_batch_size=spec.max_batch_size,
            inputs=prepared.inputs,
            outputs=outputs,
            parameters=spec.parameters,
            backend_config=plant.settings.backend.options(spec.backend),
            config_json=prepared.config_json,
            platform=spec.platform,
            decoupled=spec.decoupled,
            optimization=msgspec.to_builtins(spec.optimization),
            warmup=tuple(msgspec.to_builtins(sample) for sample in spec.warmup),
            extra={
                "runtime": spec.runtime,
                "backend_file": prepared.runtime.backend_file,
                "op_libraries": list(spec.op_libraries),
                "cc_model_filenames": spec.cc_model_filenames,
                "profiles": list(instance.profiles),
                "host_policy": instance.host_policy,
                "resources": msgspec.to_builtins(resources_of(instance)),
                "rate_priority": instance.rate_priority,
                "passive": instance.passive,
                **device_extra(plant.settings, str(instance.kind), instance.device_id),
                "batch_inputs": msgspec.to_builtins(spec.batch_inputs),
                "batch_outputs": msgspec.to_builtins(spec.batch_outputs),
                **({"sequence": sequence} if sequence is not None else {}),
            },
            rows_mode=is_fixed and not prepared.wants_parcels,
            spin_us=spin_us(plant.settings.process.wait),
        )
        for instance in spec.instances
    ]
