"""The shared-memory extensions: regions that clients register (spec H-190..H-203).

Commands that go to the supervisor, which opens and keeps the regions; ``kind`` is ``system`` or ``cuda``::

    region_status      {"kind", "name"}                                       -> [{...}] ("" for all)
    region_register    {"kind", "name", "key", "offset", "byte_size"}         -> None (system)
    region_register    {"kind", "name", "raw_handle", "device_id", "byte_size"} -> None (cuda; raw_handle: 64 bytes)
    region_unregister  {"kind", "name"}                                       -> None ("" for all)
"""

from __future__ import annotations

from typing import Any

from forebay.frontend.codec.lenient_base64 import decode_base64
from forebay.frontend.codec.rapid_json import Json, as_string, as_text, as_uint, dump_json, find, has, member
from forebay.frontend.handlers.context import Call, ControlContext, Reply
from forebay.ipc.errors import InvalidArgument, Unsupported

#: sizeof(cudaIpcMemHandle_t)
_CUDA_HANDLE_BYTES = 64

_DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."

#: Keys of a status entry, in Triton's order (appendix A).
_STATUS_KEYS = {"system": ("name", "key", "offset", "byte_size"), "cuda": ("name", "device_id", "byte_size")}


async def status(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET .../status``; works even where registering is disabled (spec H-190)."""
    kind = call.groups["kind"]
    entries: list[dict[str, Any]] = await context.control.command(
        "region_status", {"kind": kind, "name": call.groups["region"]}
    )
    return Reply(dump_json([{key: entry[key] for key in _STATUS_KEYS[kind]} for entry in entries]))


async def register(context: ControlContext, call: Call) -> Reply:
    """Answer ``POST .../region/R/register``."""
    _check_enabled(context)
    kind, name = call.groups["kind"], call.groups["region"]
    if not name:
        raise InvalidArgument(f"'region name' is necessary to register {kind} shared memory region")
    document = call.json()
    fields = _system_fields(document) if kind == "system" else _cuda_fields(document)
    await context.control.command("region_register", {"kind": kind, "name": name, **fields})
    return Reply()


async def unregister(context: ControlContext, call: Call) -> Reply:
    """Answer ``POST .../unregister``: one region, or all of the kind; unknown ones are no error (spec H-194)."""
    _check_enabled(context)
    await context.control.command("region_unregister", {"kind": call.groups["kind"], "name": call.groups["region"]})
    return Reply()


def _check_enabled(context: ControlContext) -> None:
    if not context.settings.allow_client_shm:
        raise Unsupported(_DISABLED)


def _system_fields(document: Json) -> dict[str, object]:
    if not has(document, "key"):
        raise InvalidArgument("Shared memory register request has no 'key' field")
    key = as_text(member(document, "key"))
    offset = as_uint(member(document, "offset")) if has(document, "offset") else 0
    if not has(document, "byte_size"):
        raise InvalidArgument("Shared memory register request has no 'byte_size' field")
    return {"key": key, "offset": offset, "byte_size": as_uint(member(document, "byte_size"))}


def _cuda_fields(document: Json) -> dict[str, object]:
    if not has(document, "raw_handle"):
        raise InvalidArgument("Shared memory register request has no 'raw_handle' field")
    encoded = as_string(member(find(document, "raw_handle"), "b64"))
    byte_size = as_uint(member(document, "byte_size"))
    device_id = as_uint(member(document, "device_id"))
    raw_handle = decode_base64(encoded)
    if raw_handle is None or len(raw_handle) != _CUDA_HANDLE_BYTES:
        raise InvalidArgument("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t")
    return {"raw_handle": raw_handle, "device_id": device_id, "byte_size": byte_size}
