"""From a model's configuration to ONNX Runtime's session options and execution providers (spec 8.2, C-050..C-053)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import onnxruntime as ort

from forebay.engine.backends.base import parse_bool, parse_int
from forebay.ipc.errors import InvalidArgument, Unavailable, Unsupported
from forebay.ipc.worker_messages import InstanceSpec

#: Config's ``optimization.graph.level`` to ONNX Runtime's level; anything else means ALL (spec C-050).
_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
OPENVINO_PROVIDER = "OpenVINOExecutionProvider"

#: Run option that gives memory back to the system after each run; value like ``cpu:0;gpu:0``.
SHRINK_KEY = "memory.enable_memory_arena_shrinkage"

#: The only ``session.*`` key that Triton passes on (spec B-013).
_INITIALIZER_KEY = "session.use_device_allocator_for_initializers"

#: The CPU build's files replace those of a GPU build that is installed beside it.
_GPU_BUILD_ADVICE = (
    " (what puts the GPU build on top: "
    "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu)"
)

_PRECISIONS = {"FP16": "trt_fp16_enable", "BF16": "trt_bf16_enable", "INT8": "trt_int8_enable"}

#: The only words for yes and no that ONNX Runtime's Python takes for the TensorRT provider.
_BOOLEAN_WORDS = ("False", "True")

#: Parameters of the ``tensorrt`` accelerator that have another name in ONNX Runtime.
_TENSORRT_RENAMED = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
    "trt_extra_plugin_lib_paths": "trt_extra_plugin_lib_paths",
}

_TENSORRT_INTEGERS = frozenset(
    {
        "max_workspace_size_bytes",
        "trt_auxiliary_streams",
        "trt_builder_optimization_level",
        "trt_dla_core",
        "trt_ep_context_embed_mode",
        "trt_max_partition_iterations",
        "trt_min_subgraph_size",
    }
)

_TENSORRT_BOOLEANS = frozenset(
    {
        "int8_use_native_calibration_table",
        "trt_build_heuristics_enable",
        "trt_context_memory_sharing_enable",
        "trt_cuda_graph_enable",
        "trt_detailed_build_log",
        "trt_dla_enable",
        "trt_dump_ep_context_model",
        "trt_dump_subgraphs",
        "trt_engine_cache_enable",
        "trt_force_sequential_engine_build",
        "trt_force_timing_cache",
        "trt_layer_norm_fp32_fallback",
        "trt_sparsity_enable",
        "trt_timing_cache_enable",
    }
)

_TENSORRT_TEXTS = frozenset(
    {
        "int8_calibration_table_name",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_ep_context_file_path",
        "trt_extra_plugin_lib_paths",
        "trt_profile_max_shapes",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_tactic_sources",
        "trt_timing_cache_path",
    }
)

_CUDA_BOOLEANS = frozenset({"do_copy_in_default_stream", "use_ep_level_unified_stream"})

#: Model parameter: its integer values to ONNX Runtime's words (spec B-014).
_CUDA_CHOICES = {
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
}


class Provider(NamedTuple):
    """One execution provider with its options, in ONNX Runtime's words."""

    name: str
    options: dict[str, str]


def find_model_file(spec: InstanceSpec) -> str:
    """Return the model file; ``model.onnx`` may be a directory that holds one with its external data (spec B-010).

    Raises:
        Unavailable: with Triton's text.
    """
    path = os.path.join(spec.version_path, spec.model_file or "model.onnx")
    if os.path.isdir(path):
        path = os.path.join(path, "model.onnx")
    if not os.path.isfile(path):
        raise Unavailable(f"unable to find '{path}' for model instance '{spec.instance_name}'")
    return path


def session_options(spec: InstanceSpec) -> ort.SessionOptions:
    """Return options for one session; every parameter and optimization block is read and checked here.

    Raises:
        InvalidArgument: a parameter has a value that it cannot have.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    _set_threads(options, spec)
    parameters = spec.parameters
    execution_mode = parse_int(parameters, "execution_mode", 0)
    if execution_mode not in (0, 1):
        raise InvalidArgument(
            f"Invalid configuration value provided. Expected values for  execution_mode are 0 or 1 but got "
            f"{execution_mode} ."
        )
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if execution_mode else ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = parse_bool(parameters, "enable_mem_arena", True)
    options.enable_mem_pattern = parse_bool(parameters, "enable_mem_pattern", True)
    if _INITIALIZER_KEY in parameters:
        options.add_session_config_entry(_INITIALIZER_KEY, parameters[_INITIALIZER_KEY])
    level = spec.optimization.get("graph_level")
    options.graph_optimization_level = _GRAPH_LEVELS.get(
        0 if level is None else int(level), ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    for library in op_libraries(spec):
        options.register_custom_ops_library(library)
    return options


def _set_threads(options: ort.SessionOptions, spec: InstanceSpec) -> None:
    # Spinning threads take the cores of the frontends and the scheduler (FACTS 3).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    default_threads = max(len(spec.cores), 1)
    if uses_global_threads(spec):
        # A worker holds one model, so that its global pool is its session's pool. What the setting still decides is
        # whose numbers count: the backend's, not the model's (spec B-018).
        parameters: Mapping[str, str] = spec.backend_config
    else:
        parameters = spec.parameters
    intra = parse_int(parameters, "intra_op_thread_count", 0)
    inter = parse_int(parameters, "inter_op_thread_count", 0)
    options.intra_op_num_threads = intra if intra > 0 else default_threads
    options.inter_op_num_threads = inter if inter > 0 else 1


def uses_global_threads(spec: InstanceSpec) -> bool:
    """Tell whether ``--backend-config=onnxruntime,enable-global-threadpool=1`` was given."""
    return parse_bool(spec.backend_config, "enable-global-threadpool", False)


def op_libraries(spec: InstanceSpec) -> list[str]:
    """Return the custom operator libraries as paths (spec B-017).

    Raises:
        InvalidArgument: one lies outside the model's directory, or is no file.
    """
    names: list[str] = list(spec.extra.get("op_libraries", ()))
    if not names:
        config: dict[str, Any] = json.loads(spec.config_json or b"{}")
        names = list(config.get("model_operations", {}).get("op_library_filename", ()))
    root = os.path.realpath(spec.model_path)
    paths: list[str] = []
    for name in names:
        path = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath((root, path)) != root:
            raise InvalidArgument(
                f"model '{spec.model}': the custom operator library '{name}' lies outside the model directory"
            )
        if not os.path.isfile(path):
            raise InvalidArgument(
                f"model '{spec.model}': the custom operator library '{name}' is not in the model directory"
            )
        paths.append(path)
    return paths


def providers(spec: InstanceSpec) -> list[Provider]:
    """Return the execution providers in the order of preference; the CPU's comes last.

    Raises:
        InvalidArgument: an accelerator or one of its parameters is unknown (Triton's texts).
        Unsupported: this build of ONNX Runtime lacks the provider.
    """
    chosen: list[Provider] = []
    if spec.kind == "GPU":
        chosen += _gpu_providers(spec)
    for accelerator in spec.optimization.get("cpu_accelerators", ()):
        name: str = accelerator["name"]
        if name != "openvino":
            raise InvalidArgument(f"unknown Execution Accelerator '{name}' is requested")
        _require(OPENVINO_PROVIDER, name)
        chosen.append(Provider(OPENVINO_PROVIDER, {"device_type": "CPU", **accelerator.get("parameters", {})}))
    chosen.append(Provider(CPU_PROVIDER, {}))
    return chosen


def _gpu_providers(spec: InstanceSpec) -> list[Provider]:
    chosen: list[Provider] = []
    cuda: dict[str, str] = {}
    for accelerator in spec.optimization.get("gpu_accelerators", ()):
        name: str = accelerator["name"]
        parameters: dict[str, str] = accelerator.get("parameters", {})
        if name == "tensorrt":
            options = tensorrt_options(parameters)
            _require(TENSORRT_PROVIDER, name)
            chosen.append(Provider(TENSORRT_PROVIDER, {**options, "device_id": str(spec.device_id)}))
        elif name == "cuda":
            for key in parameters.keys() & _CUDA_BOOLEANS:
                parse_bool(parameters, key, False)
            cuda.update({key: value for key, value in parameters.items() if value})
        else:
            raise InvalidArgument(f"unknown Execution Accelerator '{name}' is requested")
    cuda.update(cuda_parameters(spec.parameters))
    _require(CUDA_PROVIDER, "cuda")
    if spec.optimization.get("cuda_graphs") and not chosen:
        cuda["enable_cuda_graph"] = "1"
    chosen.append(Provider(CUDA_PROVIDER, {**cuda, "device_id": str(spec.device_id)}))
    return chosen


def tensorrt_options(parameters: Mapping[str, str]) -> dict[str, str]:
    """Translate the parameters of the ``tensorrt`` accelerator (spec B-015).

    Raises:
        InvalidArgument: with Triton's texts.
    """
    options: dict[str, str] = {}
    for key, given in parameters.items():
        value = given
        if key == "precision_mode":
            if value in _PRECISIONS:
                options[_PRECISIONS[value]] = _BOOLEAN_WORDS[True]
            elif value != "FP32":
                raise InvalidArgument(f"unsupported precision mode '{value}' is requested")
            continue
        if key in _TENSORRT_INTEGERS:
            parse_int(parameters, key, 0)
        elif key in _TENSORRT_BOOLEANS:
            value = _BOOLEAN_WORDS[parse_bool(parameters, key, False)]
        elif key not in _TENSORRT_TEXTS:
            raise InvalidArgument(f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator")
        if value:
            options[_TENSORRT_RENAMED.get(key, key)] = value
    return options


def cuda_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
    """Translate the model parameters that concern the CUDA provider; the older way to say it (spec B-014).

    Raises:
        InvalidArgument: with Triton's texts.
    """
    options: dict[str, str] = {}
    for key, words in _CUDA_CHOICES.items():
        if key in parameters:
            number = parse_int(parameters, key, 0)
            if not 0 <= number < len(words):
                raise InvalidArgument(f"unsupported {key} value '{number}' is requested")
            options[key] = words[number]
    if "gpu_mem_limit" in parameters:
        parse_int(parameters, "gpu_mem_limit", 0)
        options["gpu_mem_limit"] = parameters["gpu_mem_limit"]
    if "do_copy_in_default_stream" in parameters:
        enabled = parse_bool(parameters, "do_copy_in_default_stream", True)
        options["do_copy_in_default_stream"] = "1" if enabled else "0"
    return options


def _require(provider: str, accelerator: str) -> None:
    if provider not in ort.get_available_providers():
        advice = _GPU_BUILD_ADVICE if provider == CUDA_PROVIDER else ""
        raise Unsupported(
            f"execution accelerator '{accelerator}' needs ONNX Runtime's {provider}, which is not installed; "
            f"this build has: {', '.join(ort.get_available_providers())}{advice}"
        )
