"""SageMaker's multi-model endpoint: models that are loaded from where SageMaker has put them (spec H-300).

Commands that go to the supervisor::

    mount    {"name": str, "url": str} -> None: the model in directory ``url`` may be loaded by that name
    unmount  {"name": str}             -> None
    mounts   {}                        -> {name: url}
"""

from __future__ import annotations

import posixpath

from forebay.frontend.codec.rapid_json import as_text, dump_json, has, member
from forebay.frontend.errors import error_body
from forebay.frontend.handlers.context import JSON_TYPE, Call, ControlContext, Reply
from forebay.ipc.errors import AlreadyExists, ServingError

_EMPTY = Reply()
_BAD_REQUEST = Reply(status=400)
_NOT_FOUND = Reply(status=404)
#: Where no model can be.
_NO_MODELS = ("/dev/", "/proc/", "/sys/")
#: What a reply with status 507 is for: SageMaker then unloads other models and tries again.
_OUT_OF_MEMORY = (
    *("CUDA out of memory", "CUDA_OUT_OF_MEMORY", "Out of memory", "Out Of Memory", "out of memory", "MemoryError"),
    *("OutOfMemory", "OOM", "Dst tensor is not initialized", "Src tensor is not initialized"),
    *("CNMEM_STATUS_OUT_OF_MEMORY", "CUDNN_STATUS_NOT_INITIALIZED", "CUBLAS_STATUS_ALLOC_FAILED"),
    *("CUBLAS_STATUS_NOT_INITIALIZED", "Failed to allocate memory", "failed to allocate memory"),
    "No space left on device",
)


async def list_models(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET /models``: those that are ready."""
    hosted = await _hosted(context)
    ready = [name for name in sorted(hosted) if context.control.catalog.is_ready(name)]
    return Reply(dump_json({"models": [{"modelName": name, "modelUrl": hosted[name]} for name in ready]}))


async def get_model(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET /models/M``."""
    name = call.groups["model"]
    hosted = await _hosted(context)
    if name not in hosted:
        return _NOT_FOUND
    return Reply(dump_json({"modelName": name, "modelUrl": hosted[name]}))


async def load_model(context: ControlContext, call: Call) -> Reply:
    """Answer ``POST /models`` when the model is ready or has failed."""
    document = call.json()
    name = as_text(member(document, "model_name")) if has(document, "model_name") else ""
    url = as_text(member(document, "url")) if has(document, "url") else ""
    # Two slashes at the beginning would stay two, by POSIX.
    if not name or not url or posixpath.normpath("/" + url.lstrip("/")).startswith(_NO_MODELS):
        return _BAD_REQUEST
    try:
        await context.control.command("mount", {"name": name, "url": url})
    except AlreadyExists as error:
        return Reply(error_body(error.text), 409, JSON_TYPE)
    except ServingError as error:
        return _failure(error)
    try:
        await context.control.command("load", {"name": name, "config": None, "files": {}})
    except ServingError as error:
        await context.control.command("unmount", {"name": name})
        return _failure(error)
    return _EMPTY


async def unload_model(context: ControlContext, call: Call) -> Reply:
    """Answer ``DELETE /models/M``: the model goes with the models that only it needs."""
    name = call.groups["model"]
    if name not in await _hosted(context):
        return _NOT_FOUND
    await context.control.command("unload", {"name": name, "unload_dependents": True})
    await context.control.command("unmount", {"name": name})
    return _EMPTY


async def _hosted(context: ControlContext) -> dict[str, str]:
    hosted: dict[str, str] = await context.control.command("mounts", {})
    return hosted


def _failure(error: ServingError) -> Reply:
    is_full = any(text in error.text for text in _OUT_OF_MEMORY)
    return Reply(error_body(error.text), 507 if is_full else 400, JSON_TYPE)
