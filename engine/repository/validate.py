"""Judge a normalised configuration, with Triton's sentences (spec 05, 06; source: core ``model_config_utils.cc``).

Triton checks in two stages and the difference is visible (spec C-121): what :func:`poll_problems` finds keeps the model
out of the repository ("failed to poll"), what :func:`load_problems` finds makes its load fail with the sentence. Both
yield every problem, in Triton's order, so the first one is what Triton would have said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from forebay.engine.repository.config_problem import ConfigError, Problem, likely_meant
from forebay.engine.repository.ensemble_graph import graph_problems
from forebay.engine.repository.model_config_schema import FieldPath, ModelConfig, enum_name, enum_number
from forebay.engine.repository.normalise import DEFAULT_MIN_COMPUTE_CAPABILITY, ENSEMBLE, Gpu, usable_gpus
from forebay.engine.repository.tensor_check import tensor_problems
from forebay.ipc.errors import Code

#: Platforms that a known backend may have (spec R-043); a backend that is not here may have any.
PLATFORMS = {
    "tensorflow": ("tensorflow_graphdef", "tensorflow_savedmodel"),
    "tensorrt": ("tensorrt_plan",),
    "onnxruntime": ("onnxruntime_onnx",),
    "pytorch": ("pytorch_libtorch", "torch_aoti"),
}

#: Accelerators that ``execution_accelerators`` may name (spec C-053).
GPU_ACCELERATORS = ("tensorrt", "cuda", "auto_mixed_precision", "gpu_io")
CPU_ACCELERATORS = ("openvino",)

#: Instances of one version of a model, all groups together; each is a process.
MAX_INSTANCES = 1024

_KINDS = "ModelSequenceBatching.Control.Kind"
_CORRID_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


def poll_problems(config: ModelConfig, *, auto_complete: bool = True) -> list[Problem]:
    """Return what is wrong before anything of the model is loaded.

    Args:
        auto_complete: the server completes configurations, so that inputs and outputs may be incomplete still.
    """
    message = config.message
    problems = [*_general(message), *_scheduling(message)]
    if not auto_complete:
        problems += tensor_problems(message)
    return [problem.located(config.source) for problem in problems]


def load_problems(
    config: ModelConfig,
    gpus: Sequence[Gpu] = (),
    *,
    min_compute_capability: float = DEFAULT_MIN_COMPUTE_CAPABILITY,
) -> list[Problem]:
    """Return what is wrong with a completed configuration, instance groups included."""
    message = config.message
    problems = [
        *_general(message),
        *_scheduling(message),
        *tensor_problems(message),
        *_instance_groups(message, usable_gpus(gpus, min_compute_capability), min_compute_capability),
        *_rate_limiter(message),
        *_states(message),
        *_warmup(message),
        *_accelerators(message),
    ]
    return [problem.located(config.source) for problem in problems]


def check_poll(config: ModelConfig, *, auto_complete: bool = True) -> None:
    """Raise ConfigError with everything that :func:`poll_problems` finds."""
    raise_problems(poll_problems(config, auto_complete=auto_complete))


def check_load(
    config: ModelConfig,
    gpus: Sequence[Gpu] = (),
    *,
    min_compute_capability: float = DEFAULT_MIN_COMPUTE_CAPABILITY,
) -> None:
    """Raise ConfigError with everything that :func:`load_problems` finds."""
    raise_problems(load_problems(config, gpus, min_compute_capability=min_compute_capability))


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise ConfigError if there is any problem."""
    found = list(problems)
    if found:
        raise ConfigError(found)


def directory_name_problem(config: ModelConfig, directory: str) -> Problem | None:
    """Return spec R-009's problem if a model's name differs from its directory's."""
    if config.name == directory:
        return None
    return Problem(
        f"unexpected directory name '{directory}' for model '{config.name}', directory name must equal model name",
        path=("name",),
        suggestion=directory,
        hint="Leave 'name' out and the directory's name is used.",
    ).located(config.source)


# ---- top level -------------------------------------------------------------------------------------------------------


def _general(message: Any) -> Iterator[Problem]:
    name, backend, platform = message.name, message.backend, message.platform
    if not name:
        yield Problem("model configuration must specify 'name'", ("name",))
    if not backend and not platform:
        yield Problem(f"must specify 'platform' or 'backend' for '{name}'", ("backend",))
    elif not backend and platform != ENSEMBLE:
        known = (ENSEMBLE, *(platform for platforms in PLATFORMS.values() for platform in platforms))
        yield Problem(
            f"unexpected platform type '{platform}' for {name}",
            ("platform",),
            possible=known,
            suggestion=likely_meant(platform, known),
        )
    elif backend and platform == ENSEMBLE:
        yield Problem(
            f"Ensemble model '{name}' must have platform type '{platform}' and empty backend type", ("backend",)
        )
    elif backend in PLATFORMS and platform not in PLATFORMS[backend]:
        yield Problem(
            f"unexpected 'platform' and 'backend' pair, got:{platform}, {backend}",
            ("platform",),
            possible=PLATFORMS[backend],
        )
    if message.max_batch_size < 0:
        yield Problem(f"'max_batch_size' must be non-negative value for {name}", ("max_batch_size",))
    if message.version_policy.WhichOneof("policy_choice") is None:
        yield Problem(f"must specify 'version policy' for {name}", ("version_policy",))


def _scheduling(message: Any) -> Iterator[Problem]:
    name = message.name
    scheduling = message.WhichOneof("scheduling_choice")
    if scheduling == "dynamic_batching":
        yield from _dynamic_batching(message)
    elif scheduling == "sequence_batching":
        yield from _sequence_batching(message)
    if scheduling == "ensemble_scheduling":
        yield from graph_problems(message)
    elif message.platform == ENSEMBLE:
        yield Problem(
            f"ensemble scheduling must be set for ensemble {name} whose platform is {ENSEMBLE}",
            ("ensemble_scheduling",),
        )
    if message.model_transaction_policy.decoupled and message.response_cache.enable:
        yield Problem(
            f"Response Cache does not currently support model {name} with 'decoupled' transaction policy. "
            "Please disable the response cache.",
            ("response_cache",),
        )
    for index, control in enumerate(message.model_metrics.metric_control):
        path = ("model_metrics", "metric_control", index)
        if not control.HasField("metric_identifier"):
            yield Problem("metric control must specify 'metric_identifier'", path)
        elif not control.metric_identifier.family:
            yield Problem("metric identifier must specify non-empty 'family'", (*path, "metric_identifier"))
        elif not control.HasField("histogram_options"):
            yield Problem("metric control must specify 'histogram_options'", path)
        elif not control.histogram_options.buckets:
            yield Problem("histogram options must specify non-empty 'buckets'", (*path, "histogram_options"))


def _dynamic_batching(message: Any) -> Iterator[Problem]:
    name, batching = message.name, message.dynamic_batching
    path = ("dynamic_batching",)
    for index, size in enumerate(batching.preferred_batch_size):
        here = (*path, "preferred_batch_size", index)
        if size <= 0:
            yield Problem(f"dynamic batching preferred size must be positive for {name}", here)
        elif size > message.max_batch_size:
            yield Problem(f"dynamic batching preferred size must be <= max batch size for {name}", here)
    levels = batching.priority_levels
    if levels:
        if not 1 <= batching.default_priority_level <= levels:
            yield Problem(
                f"default priority level must be in range [1, {levels}] for {name}", (*path, "default_priority_level")
            )
        for level in sorted(batching.priority_queue_policy):
            if not 1 <= level <= levels:
                yield Problem(
                    f"priority queue policy must have priority level in range [1, {levels}] for {name}",
                    (*path, "priority_queue_policy", str(level)),
                )
    if batching.preserve_ordering:
        if levels > 1:
            yield Problem(
                f"Only one priority level is allowed when 'preserve_ordering' is true for {name}",
                (*path, "priority_levels"),
            )
        delay = enum_number("ModelQueuePolicy.TimeoutAction", "DELAY")
        policies = [(("default_queue_policy",), batching.default_queue_policy)] + [
            (("priority_queue_policy", str(level)), batching.priority_queue_policy[level])
            for level in sorted(batching.priority_queue_policy)
        ]
        for where, policy in policies:
            if policy.default_timeout_microseconds and policy.timeout_action == delay:
                yield Problem(
                    "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for " + name,
                    (*path, *where),
                )


def _sequence_batching(message: Any) -> Iterator[Problem]:
    name, batching = message.name, message.sequence_batching
    path = ("sequence_batching",)
    if message.response_cache.enable:
        yield Problem(
            f"Response Cache does not currently support model {name} with sequence batching scheduler. "
            "Please disable the response cache.",
            ("response_cache",),
        )
    yield from _controls(message)
    if batching.HasField("oldest"):
        for index, size in enumerate(batching.oldest.preferred_batch_size):
            here = (*path, "oldest", "preferred_batch_size", index)
            if size <= 0:
                yield Problem(f"sequence batching preferred batch size must be positive for {name}", here)
            elif size > message.max_batch_size:
                yield Problem(f"sequence batching preferred batch size must be <= max batch size for {name}", here)
    if batching.HasField("direct") and not 0.0 <= batching.direct.minimum_slot_utilization <= 1.0:
        yield Problem(
            f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {name}",
            (*path, "direct", "minimum_slot_utilization"),
        )


def _controls(message: Any) -> Iterator[Problem]:
    """Control tensors of a sequence batcher (spec C-079)."""
    name = message.name
    tensors: set[str] = set()
    kinds: set[str] = set()
    for index, control_input in enumerate(message.sequence_batching.control_input):
        path: FieldPath = ("sequence_batching", "control_input", index)
        if not control_input.name:
            yield Problem(f"sequence batching control tensor must have a name for {name}", path)
        elif control_input.name in tensors:
            yield Problem(
                f"sequence batching control tensor '{control_input.name}' is specified for multiple control kinds "
                f"for {name}",
                (*path, "name"),
            )
        tensors.add(control_input.name)
        for number, control in enumerate(control_input.control):
            here = (*path, "control", number)
            kind = enum_name(_KINDS, control.kind)
            if kind in kinds:
                yield Problem(f"sequence batching specifies multiple {kind} tensors for {name}", here)
            kinds.add(kind)
            if kind == "CONTROL_SEQUENCE_CORRID":
                yield from _corrid_control(control, name, here)
            else:
                yield from _boolean_control(control, kind, name, here)


def _boolean_control(control: Any, kind: str, name: str, path: FieldPath) -> Iterator[Problem]:
    fields = ("int32_false_true", "fp32_false_true", "bool_false_true")
    given = [field for field in fields if len(getattr(control, field))]
    if not given:
        yield Problem(
            "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for "
            f"{kind} for {name}",
            path,
        )
    elif len(given) > 1:
        yield Problem(
            "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
            f"'bool_false_true' for {kind} for {name}",
            path,
        )
    elif len(getattr(control, given[0])) != 2:
        yield Problem(
            f"sequence batching control '{given[0]}' must have exactly 2 entries for {kind} for {name}",
            (*path, given[0]),
        )


def _corrid_control(control: Any, name: str, path: FieldPath) -> Iterator[Problem]:
    kind = "CONTROL_SEQUENCE_CORRID"
    if len(control.int32_false_true) or len(control.fp32_false_true) or len(control.bool_false_true):
        yield Problem(
            "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for "
            f"{kind} for {name}",
            path,
        )
    if enum_name("DataType", control.data_type) not in _CORRID_TYPES:
        yield Problem(
            f"unexpected data type for control {kind} for {name}. Allowed data types are TYPE_UINT64, TYPE_INT64, "
            "TYPE_UINT32, TYPE_INT32 and TYPE_STRING",
            (*path, "data_type"),
            possible=_CORRID_TYPES,
        )


# ---- instances -------------------------------------------------------------------------------------------------------


def _instance_groups(message: Any, usable: list[int], min_compute_capability: float) -> Iterator[Problem]:
    name = message.name
    if message.WhichOneof("scheduling_choice") == "ensemble_scheduling" or message.platform == ENSEMBLE:
        return
    if not message.instance_group:
        yield Problem(f"must specify one or more 'instance group's for {name}", ("instance_group",))
    elif all(group.passive for group in message.instance_group):
        yield Problem(
            f"model '{name}' has passive instances only, which get no requests; add an instance_group without "
            "'passive'",
            ("instance_group",),
        )
    yield from _instance_count(message)
    for index, group in enumerate(message.instance_group):
        path = ("instance_group", index)
        prefix = f"instance group {group.name} of model {name}"
        kind = enum_name("ModelInstanceGroup.Kind", group.kind)
        if kind in ("KIND_CPU", "KIND_MODEL"):
            if group.gpus:
                yield Problem(f"{prefix} has kind {kind} but specifies one or more GPUs", (*path, "gpus"))
        elif kind == "KIND_GPU":
            yield from _gpu_group(group, prefix, usable, min_compute_capability, path)
        else:
            yield Problem(f"{prefix} has unexpected kind {kind}", (*path, "kind"), code=Code.INTERNAL)
        yield from _profiles(group, message.platform, prefix, (*path, "profile"))


def _instance_count(message: Any) -> Iterator[Problem]:
    counts = [group.count * max(len(group.gpus), 1) for group in message.instance_group]
    if sum(counts) > MAX_INSTANCES:
        yield Problem(
            f"model {message.name} asks for {sum(counts)} instances, more than the {MAX_INSTANCES} that one model may "
            "have: each is a process of its own",
            ("instance_group", counts.index(max(counts)), "count"),
        )


def _gpu_group(
    group: Any, prefix: str, usable: list[int], min_compute_capability: float, path: FieldPath
) -> Iterator[Problem]:
    hint = "Set 'kind: KIND_CPU', or start the server with --gpu-fallback=cpu to serve it on the CPU."
    if not group.gpus:
        missing = "specifies no GPUs" if usable else "no GPUs are available"
        yield Problem(f"{prefix} has kind KIND_GPU but {missing}", (*path, "kind"), hint=hint)
    for index, gpu in enumerate(group.gpus):
        if gpu not in usable:
            listed = ", ".join(str(known) for known in usable)
            yield Problem(
                f"{prefix} specifies invalid or unsupported gpu id {gpu}. GPUs with at least the minimum required "
                f"CUDA compute compatibility of {min_compute_capability:.6f} are: {listed}",
                (*path, "gpus", index),
                hint=hint,
            )


def _profiles(group: Any, platform: str, prefix: str, path: FieldPath) -> Iterator[Problem]:
    if group.profile and platform != "tensorrt_plan":
        yield Problem(
            # Without a blank, as Triton has it.
            f"{prefix} and platform {platform}specifies profile field which is only supported for TensorRT models",
            path,
        )
        return
    for index, profile in enumerate(group.profile):
        if not (profile.isascii() and profile.isdigit()):
            yield Problem(
                f"{prefix} and platform {platform} specifies invalid profile {profile}. The field should contain the "
                "string representation of a non-negative integer.",
                (*path, index),
            )


def _rate_limiter(message: Any) -> Iterator[Problem]:
    """A resource is global or per device, not both (spec S-153)."""
    scopes: dict[str, bool] = {}
    for index, group in enumerate(message.instance_group):
        for number, resource in enumerate(group.rate_limiter.resources):
            known = getattr(resource, "global")
            if scopes.setdefault(resource.name, known) != known:
                yield Problem(
                    f'Resource "{resource.name}" is present as both global and device-specific resource in the model '
                    "configuration.",
                    ("instance_group", index, "rate_limiter", "resources", number),
                )


# ---- sequence state, warm-up, accelerators ---------------------------------------------------------------------------


def _states(message: Any) -> Iterator[Problem]:
    """Implicit state (spec C-080, S-081, S-086)."""
    names: dict[str, set[str]] = {"input_name": set(), "output_name": set()}
    for index, state in enumerate(message.sequence_batching.state):
        path = ("sequence_batching", "state", index)
        for part, seen in names.items():
            tensor = getattr(state, part)
            if not tensor:
                yield Problem(f"sequence batching state must specify '{part}' for {message.name}", path)
            elif tensor in seen:
                yield Problem(
                    f"sequence batching state '{tensor}' is specified more than once for {message.name}", (*path, part)
                )
            seen.add(tensor)
        label = f"sequence batching state '{state.input_name}'"
        if not state.data_type:
            yield Problem(f"{label} must specify 'data_type' for {message.name}", path)
        if not state.dims or any(dim < 1 and dim != -1 for dim in state.dims):
            yield Problem(f"{label} must specify 'dims' of integers >= 1, or -1, for {message.name}", path)
        if len(state.initial_state) > 1:
            yield Problem(
                f"initial_state field for state input '{state.input_name}' must contain exactly one or zero element. "
                f"Found '{len(state.initial_state)}' elements.",
                (*path, "initial_state"),
            )
        for number, initial in enumerate(state.initial_state):
            yield from _initial_state(state, initial, (*path, "initial_state", number))


def _initial_state(state: Any, initial: Any, path: FieldPath) -> Iterator[Problem]:
    name = state.input_name
    if initial.data_type != state.data_type:
        yield Problem(
            f"The data type used for 'initial_state' field of state '{name}' does not match the state data type.",
            (*path, "data_type"),
        )
    if not initial.name:
        yield Problem(f"Field 'name' must be set when using initial_state for state input '{name}'.", path)
    if len(initial.dims) != len(state.dims):
        yield Problem(
            "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input "
            f"'{name}'. {len(initial.dims)} != {len(state.dims)}",
            (*path, "dims"),
        )
    else:
        yield from _initial_dims(name, state.dims, initial.dims, (*path, "dims"))
    if initial.WhichOneof("state_data") is None:
        yield Problem(f"initial_state setting expects state'{name}' to have state_data set", path)


def _initial_dims(name: str, dims: Sequence[int], initial_dims: Sequence[int], path: FieldPath) -> Iterator[Problem]:
    for dim, initial in zip(dims, initial_dims, strict=True):
        if initial < 0:
            yield Problem(f"'initial_state' field for state input name '{name}' contains variable dimensions.", path)
        elif dim not in (-1, initial):
            yield Problem(
                f"'initial_state' dim for input name '{name}' doesn't match 'state' dim description. "
                f"{initial} != {dim}",
                path,
            )


def _warmup(message: Any) -> Iterator[Problem]:
    for index, sample in enumerate(message.model_warmup):
        path = ("model_warmup", index)
        if sample.batch_size > max(message.max_batch_size, 1):
            yield Problem(
                f"warmup sample '{sample.name}' has batch size {sample.batch_size}, but the model's maximum is "
                f"{message.max_batch_size}",
                (*path, "batch_size"),
            )
        for key in sorted(sample.inputs):
            given = sample.inputs[key]
            here = (*path, "inputs", key)
            if any(dim < 0 for dim in given.dims):
                yield Problem(
                    f"warmup setting expects all variable-size dimensions are specified for input '{key}'", here
                )
            if not given.data_type:
                yield Problem(f"warmup setting must specify 'data_type' for input '{key}'", here)
            if given.WhichOneof("input_data_type") is None:
                text = f"warmup setting expects input '{key}' to have input_data_type set"
                yield Problem(f"[request id: <id_unknown>] {text}", here)


def _accelerators(message: Any) -> Iterator[Problem]:
    """Only for ONNX Runtime, whose backend refuses what it does not know (spec C-053, B-015)."""
    if message.backend != "onnxruntime":
        return
    accelerators = message.optimization.execution_accelerators
    for part, known in (
        ("gpu_execution_accelerator", GPU_ACCELERATORS),
        ("cpu_execution_accelerator", CPU_ACCELERATORS),
    ):
        for index, accelerator in enumerate(getattr(accelerators, part)):
            if accelerator.name not in known:
                yield Problem(
                    f"unknown Execution Accelerator '{accelerator.name}' is requested",
                    ("optimization", "execution_accelerators", part, index, "name"),
                    possible=known,
                    suggestion=likely_meant(accelerator.name, known),
                )
