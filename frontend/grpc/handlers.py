"""What the unary calls of Triton's service answer, besides inference (spec 2.1).

Commands to the supervisor and the checks in front of them are those of HTTP's handlers (``frontend/handlers/``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from forebay.frontend.catalog_view import parse_version
from forebay.frontend.codec.rapid_json import Json
from forebay.frontend.grpc import descriptors
from forebay.frontend.handlers.log_settings import parse_log_settings
from forebay.frontend.handlers.metadata import EXTENSIONS, TRITON_VERSION, describe_model
from forebay.frontend.handlers.repository import check_model_name
from forebay.frontend.handlers.trace_settings import LOW_COUNT_TEXT, parse_trace_settings
from forebay.frontend.model_readiness import why_not_ready
from forebay.frontend.statistics import model_statistics
from forebay.ipc.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from forebay.frontend.grpc.control_call import Handler
    from forebay.frontend.grpc.server import GrpcFrontend

_SHM_DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
_REPOSITORY_NAMED = "'repository_name' specification is not supported"
_FILE_PREFIX = "file:"
_CUDA_HANDLE_BYTES = 64


def _encode(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


# --- health and metadata ---


async def server_live(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ServerLive`` (spec G-001)."""
    descriptors.parse("ServerLiveRequest", message)
    return _encode(descriptors.build("ServerLiveResponse", live=frontend.catalog.catalog.live))


async def server_ready(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ServerReady`` (spec G-002)."""
    descriptors.parse("ServerReadyRequest", message)
    return _encode(descriptors.build("ServerReadyResponse", ready=frontend.catalog.catalog.ready))


async def model_ready(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ModelReady``; an unknown model is not ready, as in Triton 2.51 (spec G-003, F2-15)."""
    request = descriptors.parse("ModelReadyRequest", message)
    reason = await why_not_ready(frontend.control, request.name, parse_version(request.version))
    return _encode(descriptors.build("ModelReadyResponse", ready=not reason))


async def server_metadata(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ServerMetadata`` (spec G-004)."""
    descriptors.parse("ServerMetadataRequest", message)
    return _encode(
        descriptors.build(
            "ServerMetadataResponse", name=frontend.server_id, version=TRITON_VERSION, extensions=EXTENSIONS
        )
    )


async def model_metadata(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ModelMetadata`` (spec G-005)."""
    request = descriptors.parse("ModelMetadataRequest", message)
    version = parse_version(request.version)
    view = frontend.catalog
    entry = view.find(request.name, version)
    versions = view.ready_versions(request.name) if version is None else (entry,)
    described = describe_model(entry, [other.version for other in versions])
    return _encode(descriptors.from_plain("ModelMetadataResponse", described))


async def model_config(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ModelConfig`` (spec G-008)."""
    request = descriptors.parse("ModelConfigRequest", message)
    entry = frontend.catalog.find(request.name, parse_version(request.version))
    config = descriptors.from_json("ModelConfig", entry.config_json)
    return _encode(descriptors.build("ModelConfigResponse", config=config))


async def statistics(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``ModelStatistics`` (spec G-009)."""
    request = descriptors.parse("ModelStatisticsRequest", message)
    version = parse_version(request.version)
    view = frontend.catalog
    entries = view.ready_versions(request.name) if request.name else view.ready_models
    if request.name and not entries:
        raise InvalidArgument(f"requested model '{request.name}' is not available")
    if version is not None and request.name:
        entries = tuple(entry for entry in entries if entry.version == version)
        if not entries:
            raise InvalidArgument(f"requested model version is not available for model '{request.name}'")
    found = {"model_stats": [model_statistics(frontend.words, entry) for entry in entries]}
    return _encode(descriptors.from_plain("ModelStatisticsResponse", found))


# --- repository ---


async def index(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``RepositoryIndex`` (spec G-010)."""
    request = descriptors.parse("RepositoryIndexRequest", message)
    if request.repository_name:
        raise Unsupported(_REPOSITORY_NAMED)
    entries: list[dict[str, Any]] = await frontend.control.command("index", {"ready": bool(request.ready)})
    reply = descriptors.build("RepositoryIndexResponse")
    for entry in entries:
        fields = ("name", "version", "state", "reason")
        reply.models.add(**{name: str(entry[name]) for name in fields if entry.get(name) not in ("", None)})
    return _encode(reply)


async def load(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``RepositoryModelLoad`` (spec G-011)."""
    request = descriptors.parse("RepositoryModelLoadRequest", message)
    if request.repository_name:
        raise Unsupported(_REPOSITORY_NAMED)
    name = check_model_name(request.model_name)
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if key == "config":
            if kind != "string_param":
                raise InvalidArgument("invalid value type for load parameter 'config', expected string_param.")
            config = parameter.string_param
        elif key.startswith(_FILE_PREFIX):
            if kind != "bytes_param":
                raise InvalidArgument(f"invalid value type for load parameter '{key}', expected bytes_param.")
            files[key.removeprefix(_FILE_PREFIX)] = parameter.bytes_param
        else:
            raise InvalidArgument(f"unrecognized load parameter '{key}'.")
    await frontend.control.command("load", {"name": name, "config": config, "files": files})
    return b""


async def unload(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``RepositoryModelUnload`` (spec G-012)."""
    request = descriptors.parse("RepositoryModelUnloadRequest", message)
    if request.repository_name:
        raise Unsupported(_REPOSITORY_NAMED)
    unload_dependents = False
    for key, parameter in request.parameters.items():
        if key != "unload_dependents":
            continue
        if parameter.WhichOneof("parameter_choice") != "bool_param":
            raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
        unload_dependents = parameter.bool_param
    arguments = {"name": check_model_name(request.model_name), "unload_dependents": unload_dependents}
    await frontend.control.command("unload", arguments)
    return b""


# --- regions ---


async def _region_status(frontend: GrpcFrontend, message: memoryview, kind: str) -> bytes:
    """``SystemSharedMemoryStatus`` and its sister; they work where registering is disabled too (spec H-190)."""
    label = kind.capitalize()
    request = descriptors.parse(f"{label}SharedMemoryStatusRequest", message)
    entries: list[dict[str, Any]] = await frontend.control.command(
        "region_status", {"kind": kind, "name": request.name}
    )
    reply = descriptors.build(f"{label}SharedMemoryStatusResponse")
    fields = ("name", "key", "offset", "byte_size") if kind == "system" else ("name", "device_id", "byte_size")
    for entry in entries:
        region = reply.regions[entry["name"]]
        for name in fields:
            setattr(region, name, entry[name])
    return _encode(reply)


async def _region_unregister(frontend: GrpcFrontend, message: memoryview, kind: str) -> bytes:
    _check_regions(frontend)
    request = descriptors.parse(f"{kind.capitalize()}SharedMemoryUnregisterRequest", message)
    await frontend.control.command("region_unregister", {"kind": kind, "name": request.name})
    return b""


def _check_regions(frontend: GrpcFrontend) -> None:
    if not frontend.allow_client_shm:
        raise Unsupported(_SHM_DISABLED)


async def system_status(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``SystemSharedMemoryStatus`` (spec G-013)."""
    return await _region_status(frontend, message, "system")


async def system_register(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``SystemSharedMemoryRegister`` (spec G-014)."""
    _check_regions(frontend)
    request = descriptors.parse("SystemSharedMemoryRegisterRequest", message)
    arguments = {"kind": "system", "name": request.name, "key": request.key}
    await frontend.control.command(
        "region_register", {**arguments, "offset": request.offset, "byte_size": request.byte_size}
    )
    return b""


async def system_unregister(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``SystemSharedMemoryUnregister`` (spec G-014)."""
    return await _region_unregister(frontend, message, "system")


async def cuda_status(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``CudaSharedMemoryStatus`` (spec G-015)."""
    return await _region_status(frontend, message, "cuda")


async def cuda_register(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``CudaSharedMemoryRegister`` (spec G-015)."""
    _check_regions(frontend)
    request = descriptors.parse("CudaSharedMemoryRegisterRequest", message)
    if len(request.raw_handle) != _CUDA_HANDLE_BYTES:
        raise InvalidArgument("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t")
    arguments = {"kind": "cuda", "name": request.name, "raw_handle": request.raw_handle}
    await frontend.control.command(
        "region_register", {**arguments, "device_id": request.device_id, "byte_size": request.byte_size}
    )
    return b""


async def cuda_unregister(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``CudaSharedMemoryUnregister`` (spec G-015)."""
    return await _region_unregister(frontend, message, "cuda")


# --- settings ---


def _trace_document(settings: Mapping[str, Any]) -> dict[str, Json]:
    """Return settings as the JSON that HTTP would carry: single texts where it has no lists, null for nothing.

    Raises:
        InvalidArgument: several values for a setting that has one.
    """
    document: dict[str, Json] = {}
    for name, setting in settings.items():
        given = list(setting.value)
        if name not in ("trace_rate", "trace_count", "log_frequency"):
            document[name] = given or None
        elif len(given) > 1:
            raise InvalidArgument(f"expect only 1 value for '{name}'")
        else:
            document[name] = given[0] if given else None
    return document


async def trace_setting(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``TraceSetting``: read with no settings; an empty list of values takes an override back (spec G-016)."""
    request = descriptors.parse("TraceSettingRequest", message)
    model = request.model_name
    if model and not frontend.catalog.is_ready(model):
        raise InvalidArgument(f"Request for unknown model : {model}")
    if request.settings:
        settings = parse_trace_settings(_trace_document(request.settings), f"{LOW_COUNT_TEXT} ")
        found = await frontend.control.command("trace_set", {"model": model, "settings": settings})
    else:
        found = await frontend.control.command("trace_get", {"model": model})
    reply = descriptors.build("TraceSettingResponse")
    for name, value in found.items():
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        reply.settings[name].value.extend(str(item) for item in values)
    return _encode(reply)


#: The kind of value that each setting takes, and what Triton calls it (`LogSettings` of its grpc_server.cc).
_LOG_KINDS = {
    "log_info": ("bool_param", "boolean"),
    "log_warning": ("bool_param", "boolean"),
    "log_error": ("bool_param", "boolean"),
    "log_verbose_level": ("uint32_param", "int32"),
    "log_format": ("string_param", "string"),
}
_LOG_FORMATS = ("default", "ISO8601")


def _log_setting(name: str, setting: Any) -> Json:
    """Return a setting's value as the JSON that HTTP would carry.

    Raises:
        InvalidArgument: it is of another kind, or no log format; over HTTP, texts and codes differ.
    """
    kind = setting.WhichOneof("parameter_choice")
    expected, called = _LOG_KINDS.get(name, (kind, ""))
    if kind != expected:
        raise InvalidArgument(f"expect {called} for '{name}'")
    value: Json = getattr(setting, kind) if kind else ""
    if name == "log_format" and value not in _LOG_FORMATS:
        raise InvalidArgument(f"invalid argument for log_format, got: {value}")
    return value


async def log_settings(frontend: GrpcFrontend, message: memoryview) -> bytes:
    """``LogSettings``: read with no settings (spec G-017)."""
    request = descriptors.parse("LogSettingsRequest", message)
    if request.settings:
        document: Json = {name: _log_setting(name, setting) for name, setting in request.settings.items()}
        found = await frontend.control.command("log_set", {"settings": parse_log_settings(document)})
    else:
        found = await frontend.control.command("log_get", {})
    reply = descriptors.build("LogSettingsResponse")
    for name, value in found.items():
        setting = reply.settings[name]
        if isinstance(value, bool):
            setting.bool_param = value
        elif isinstance(value, int):
            setting.uint32_param = value
        else:
            setting.string_param = str(value)
    return _encode(reply)


#: Method name of ``inference.GRPCInferenceService`` to its handler.
HANDLERS: dict[str, Handler] = {
    "ServerLive": server_live,
    "ServerReady": server_ready,
    "ModelReady": model_ready,
    "ServerMetadata": server_metadata,
    "ModelMetadata": model_metadata,
    "ModelConfig": model_config,
    "ModelStatistics": statistics,
    "RepositoryIndex": index,
    "RepositoryModelLoad": load,
    "RepositoryModelUnload": unload,
    "SystemSharedMemoryStatus": system_status,
    "SystemSharedMemoryRegister": system_register,
    "SystemSharedMemoryUnregister": system_unregister,
    "CudaSharedMemoryStatus": cuda_status,
    "CudaSharedMemoryRegister": cuda_register,
    "CudaSharedMemoryUnregister": cuda_unregister,
    "TraceSetting": trace_setting,
    "LogSettings": log_settings,
}
