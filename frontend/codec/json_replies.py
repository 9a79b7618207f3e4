"""The small JSON replies: metadata, statistics, index, settings, regions. Key order: spec appendix A. Pure.

Structs here are the replies' schemas: the order of the fields is the order of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from forebay.frontend.codec.rapid_json import dump_json
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec

#: What ``GET /v2`` lists, in Triton's order (spec H-035).
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


def server_metadata(name: str, version: str, extensions: Sequence[str] = EXTENSIONS) -> bytes:
    """Return the reply of ``GET /v2``."""
    return dump_json({"name": name, "version": version, "extensions": extensions})


def model_metadata(entry: ModelEntry, versions: Sequence[int]) -> bytes:
    """Return the reply of ``GET /v2/models/M[/versions/V]`` (spec H-036..H-038).

    Args:
        versions: all READY ones, or the only one asked for.
    """
    is_batched = entry.max_batch_size > 0
    return dump_json(
        {
            "name": entry.name,
            "versions": [str(version) for version in versions],
            "platform": entry.platform,
            "inputs": [_tensor_metadata(spec, is_batched) for spec in entry.inputs],
            "outputs": [_tensor_metadata(spec, is_batched) for spec in entry.outputs],
        }
    )


def _tensor_metadata(spec: TensorSpec, is_batched: bool) -> dict[str, object]:
    shape = (-1, *spec.dims) if is_batched and not spec.is_shape_tensor else spec.dims
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}


class Duration(msgspec.Struct, frozen=True):
    count: int = 0
    ns: int = 0


class InferenceStatistics(msgspec.Struct, frozen=True):
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class ResponseStatistics(msgspec.Struct, frozen=True):
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    success: Duration = Duration()
    fail: Duration = Duration()
    empty_response: Duration = Duration()
    cancel: Duration = Duration()


class BatchStatistics(msgspec.Struct, frozen=True):
    batch_size: int
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()


class MemoryUsage(msgspec.Struct, frozen=True):
    type: str
    id: int
    byte_size: int


class ModelStatistics(msgspec.Struct, frozen=True):
    """One READY version (spec H-231..H-237)."""

    name: str
    version: str
    last_inference: int = 0
    """Milliseconds since the epoch."""
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: InferenceStatistics = InferenceStatistics()
    response_stats: dict[str, ResponseStatistics] = {}
    """By response index, ``"0"`` first; decoupled models only."""
    batch_stats: tuple[BatchStatistics, ...] = ()
    memory_usage: tuple[MemoryUsage, ...] = ()


class _StatisticsReply(msgspec.Struct, frozen=True):
    model_stats: tuple[ModelStatistics, ...]


def model_statistics(statistics: Iterable[ModelStatistics]) -> bytes:
    """Return the reply of ``GET /v2/models[/M[/versions/V]]/stats``."""
    return msgspec.json.encode(_StatisticsReply(tuple(statistics)))


class IndexEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the repository index; a model that was never loaded has only its name (spec H-211)."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


def repository_index(entries: Iterable[IndexEntry], *, ready_only: bool = False) -> bytes:
    """Return the reply of ``POST /v2/repository/index``; ``ready_only`` keeps entries in state READY (spec H-212)."""
    return dump_json([msgspec.to_builtins(entry) for entry in entries if not ready_only or entry.state == "READY"])


class TraceSettings(msgspec.Struct, frozen=True):
    """Trace settings in mode ``triton``; numbers are strings on the wire (spec H-250)."""

    trace_level: tuple[str, ...] = ("OFF",)
    trace_rate: str = "1000"
    trace_count: str = "-1"
    log_frequency: str = "0"
    trace_file: str = ""
    trace_mode: str = "triton"


def trace_settings(settings: TraceSettings | Mapping[str, object]) -> bytes:
    """Return the reply of trace settings; a mapping for other modes, whose keys differ (spec H-250)."""
    return dump_json(msgspec.to_builtins(settings))


class LogSettings(msgspec.Struct, frozen=True):
    """Log settings (spec H-261)."""

    log_file: str = ""
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_verbose_level: int = 0
    log_format: str = "default"


def log_settings(settings: LogSettings) -> bytes:
    """Return the reply of ``GET`` and ``POST /v2/logging``."""
    return dump_json(msgspec.to_builtins(settings))


class SystemRegion(msgspec.Struct, frozen=True):
    """Status of a registered system shared memory region (spec H-191)."""

    name: str
    key: str
    offset: int
    byte_size: int


class CudaRegion(msgspec.Struct, frozen=True):
    """Status of a registered CUDA region (spec H-195)."""

    name: str
    device_id: int
    byte_size: int


def region_status(regions: Iterable[SystemRegion | CudaRegion]) -> bytes:
    """Return the reply of ``GET /v2/{system,cuda}sharedmemory[/region/R]/status``."""
    return dump_json([msgspec.to_builtins(region) for region in regions])
