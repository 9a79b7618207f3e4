"""Fill in what a configuration leaves out: backend and platform, defaults, instance groups.

Order (spec C-120): read -> (override) -> :func:`detect_backend` -> :func:`normalise_defaults` -> auto-complete ->
validate -> :func:`normalise_instance_groups`. Nothing here opens a file: what a version directory holds is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from forebay.engine.repository.config_problem import ConfigError, Problem
from forebay.engine.repository.model_config_schema import ModelConfig, enum_number

#: ``max_sequence_idle_microseconds`` where none is given (spec C-077).
DEFAULT_SEQUENCE_IDLE_US = 1_000_000

#: Backends that get two instances on the CPU unless told otherwise (spec C-090, B-019).
TWO_CPU_INSTANCES = frozenset({"onnxruntime", "tensorflow"})

#: Compute capability that a GPU needs at least (flag ``--min-supported-compute-capability``).
DEFAULT_MIN_COMPUTE_CAPABILITY = 6.0

ENSEMBLE = "ensemble"


class Gpu(msgspec.Struct, frozen=True):
    """One GPU that this server may use."""

    device_id: int
    compute_capability: float
    """For example 9.0."""
    uuid: str = ""
    """As the driver knows it, for metrics."""


def usable_gpus(gpus: Sequence[Gpu], min_compute_capability: float = DEFAULT_MIN_COMPUTE_CAPABILITY) -> list[int]:
    """Return the ids of the GPUs that are new enough, ascending."""
    return sorted(gpu.device_id for gpu in gpus if gpu.compute_capability >= min_compute_capability)


def detect_backend(config: ModelConfig, model_name: str, files: Mapping[str, bool] | None) -> None:
    """Fill in ``name``, ``backend``, ``platform`` and ``default_model_filename`` in place (spec R-030..R-041).

    Args:
        model_name: name of the model directory.
        files: what the lexicographically first version directory holds: name to "is a directory"; None if the model
            has no version directory.

    Raises:
        ConfigError: nothing tells the backend (spec R-040).
    """
    message = config.message
    if not message.name:
        message.name = model_name
    if message.platform == ENSEMBLE:
        return
    present = {} if files is None else dict(files)
    if _detect_tensorflow(message, present):
        return
    if _detect_one(message, present, "tensorrt", "tensorrt_plan", "model.plan", may_be_directory=False):
        return
    if _detect_one(message, present, "onnxruntime", "onnxruntime_onnx", "model.onnx"):
        return
    if _detect_one(message, present, "openvino", "", "model.xml"):
        return
    if _detect_pytorch(message, present):
        return
    if _detect_one(message, present, "python", "", "model.py"):
        return
    if not message.backend and not message.platform and not message.default_model_filename:
        _, dot, backend = model_name.partition(".")
        if not dot or not backend:
            raise ConfigError(
                [
                    Problem(
                        f"Invalid model name: Could not determine backend for model '{model_name}' with no backend in "
                        "model configuration. Expected model name of the form 'model.<backend_name>'.",
                        hint="Set 'backend' in config.pbtxt, or put a file of a known name (model.onnx, model.pt, "
                        "model.py, model.plan, model.xml) into the version directory.",
                    )
                ]
            )
        message.backend = backend
        message.default_model_filename = f"model.{backend}"


def _detect_tensorflow(message: Any, present: Mapping[str, bool]) -> bool:
    """TensorFlow keeps its platform, which says which kind of model it is (spec R-037)."""
    names = {"model.savedmodel": "tensorflow_savedmodel", "model.graphdef": "tensorflow_graphdef"}
    if not message.platform and message.backend in ("", "tensorflow"):
        if message.default_model_filename in names:
            message.platform = names[message.default_model_filename]
        elif not message.default_model_filename:
            if present.get("model.savedmodel") is True:
                message.platform = "tensorflow_savedmodel"
            if present.get("model.graphdef") is False:
                message.platform = "tensorflow_graphdef"
    if message.platform not in names.values():
        return False
    if not message.backend:
        message.backend = "tensorflow"
    if not message.default_model_filename:
        message.default_model_filename = next(name for name, known in names.items() if known == message.platform)
    return True


def _detect_one(
    message: Any,
    present: Mapping[str, bool],
    backend: str,
    platform: str,
    filename: str,
    *,
    may_be_directory: bool = True,
) -> bool:
    """Recognise a backend with one platform and one file name; returns whether the model is of it."""
    if not message.backend:
        if (platform and message.platform == platform) or message.default_model_filename == filename:
            message.backend = backend
        elif not message.platform and not message.default_model_filename:
            is_directory = present.get(filename)
            if is_directory is not None and (may_be_directory or not is_directory):
                message.backend = backend
    if message.backend != backend:
        return False
    if platform and not message.platform:
        message.platform = platform
    if not message.default_model_filename:
        message.default_model_filename = filename
    return True


def _detect_pytorch(message: Any, present: Mapping[str, bool]) -> bool:
    """Two platforms: TorchScript by default, AOTInductor if it is named or only its file is there (R-031, R-032)."""
    if not message.backend:
        if message.platform in ("pytorch_libtorch", "libtorch", "torch_aoti"):
            message.backend = "pytorch"
        elif message.default_model_filename in ("model.pt", "model.pt2"):
            message.backend = "pytorch"
            if message.default_model_filename == "model.pt2" and not message.platform:
                message.platform = "torch_aoti"
        elif not message.platform and not message.default_model_filename:
            if present.get("model.pt") is False:
                message.backend, message.platform = "pytorch", "pytorch_libtorch"
            elif present.get("model.pt2") is False:
                message.backend, message.platform = "pytorch", "torch_aoti"
    if message.backend != "pytorch":
        return False
    if not message.platform:
        message.platform = "pytorch_libtorch"
    if not message.default_model_filename:
        message.default_model_filename = "model.pt2" if message.platform == "torch_aoti" else "model.pt"
    return True


def normalise_defaults(config: ModelConfig) -> None:
    """Fill in the defaults that ``/config`` shows, in place (spec H-045, S-014, C-077). Idempotent."""
    message = config.message
    if message.version_policy.WhichOneof("policy_choice") is None:
        message.version_policy.latest.num_versions = 1
    scheduling = message.WhichOneof("scheduling_choice")
    if scheduling == "dynamic_batching":
        _default_preferred(message.dynamic_batching.preferred_batch_size, message.max_batch_size)
    elif scheduling == "sequence_batching":
        batching = message.sequence_batching
        if not batching.max_sequence_idle_microseconds:
            batching.max_sequence_idle_microseconds = DEFAULT_SEQUENCE_IDLE_US
        if batching.HasField("oldest"):
            _default_preferred(batching.oldest.preferred_batch_size, message.max_batch_size)
    if scheduling != "ensemble_scheduling":
        for name in ("input_pinned_memory", "output_pinned_memory"):
            if not message.optimization.HasField(name):
                getattr(message.optimization, name).enable = True
    else:
        message.model_transaction_policy.SetInParent()


def _default_preferred(sizes: Any, max_batch_size: int) -> None:
    if not sizes and max_batch_size > 0:
        sizes.append(max_batch_size)


def normalise_instance_groups(
    config: ModelConfig,
    gpus: Sequence[Gpu] = (),
    *,
    min_compute_capability: float = DEFAULT_MIN_COMPUTE_CAPABILITY,
    gpu_fallback: bool = False,
) -> list[str]:
    """Give every instance group a name, kind, count and GPUs, in place (spec C-090..C-094). Idempotent.

    Args:
        gpus: GPUs that the model's backend can use on this machine; none if the backend has no GPU support here.
        gpu_fallback: turn groups that ask for GPUs which are not there into CPU groups (flag ``--gpu-fallback cpu``).

    Returns:
        One sentence per group that fell back to the CPU, for the log.
    """
    message = config.message
    if message.WhichOneof("scheduling_choice") == "ensemble_scheduling":
        return []
    usable = usable_gpus(gpus, min_compute_capability)
    kind_auto, kind_gpu, kind_cpu = (
        enum_number("ModelInstanceGroup.Kind", name) for name in ("KIND_AUTO", "KIND_GPU", "KIND_CPU")
    )
    if not message.instance_group:
        message.instance_group.add(name=message.name)
    notes: list[str] = []
    for index, group in enumerate(message.instance_group):
        if not group.name:
            group.name = f"{message.name}_{index}"
        if group.kind == kind_auto:
            group.kind = kind_gpu if usable and set(group.gpus) <= set(usable) else kind_cpu
        if gpu_fallback and group.kind == kind_gpu and (not usable or not set(group.gpus) <= set(usable)):
            notes.append(
                f"instance group {group.name} of model {message.name} asks for GPUs that are not available; "
                "it runs on the CPU instead (--gpu-fallback cpu)"
            )
            group.kind = kind_cpu
            group.ClearField("gpus")
        if group.count < 1:
            group.count = 2 if group.kind == kind_cpu and message.backend in TWO_CPU_INSTANCES else 1
        if group.kind == kind_gpu and not group.gpus:
            group.gpus.extend(usable)
    return notes
