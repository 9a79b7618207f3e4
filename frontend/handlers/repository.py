"""The model repository extension: index, load, unload (spec H-210..H-224).

Commands that go to the supervisor::

    index   {"ready": bool}                                   -> [{"name", "version"?, "state"?, "reason"?}]
    load    {"name": str, "config": str?, "files": {str: bytes}} -> None, when the model is ready
    unload  {"name": str, "unload_dependents": bool}          -> None
"""

from __future__ import annotations

from typing import Any

from forebay.frontend.codec.lenient_base64 import decode_base64
from forebay.frontend.codec.rapid_json import Json, as_bool, as_string, as_text, dump_json, find, has, member
from forebay.frontend.handlers.context import Call, ControlContext, Reply
from forebay.ipc.errors import Internal, InvalidArgument, ServingError, Unsupported

_FILE_PREFIX = "file:"


async def index(context: ControlContext, call: Call) -> Reply:
    """Answer ``POST /v2/repository[/R]/index``; the repository's name is ignored, as in Triton (spec H-210)."""
    document = call.optional_json()
    only_ready = as_bool(find(document, "ready")) if has(document, "ready") else False
    entries: list[dict[str, Any]] = await context.control.command("index", {"ready": only_ready})
    return Reply(dump_json([_index_entry(entry) for entry in entries]))


def _index_entry(entry: dict[str, Any]) -> dict[str, str]:
    """Return the entry in Triton's key order; the name alone for a model that was never loaded (spec H-211)."""
    return {
        key: str(entry[key])
        for key in ("name", "version", "state", "reason")
        if key in entry and entry[key] not in ("", None)
    }


async def load(context: ControlContext, call: Call) -> Reply:
    """Answer ``POST /v2/repository/models/M/load`` when the model is ready or has failed (spec H-214)."""
    name = _model_name(call)
    config: str | None = None
    files: dict[str, bytes] = {}
    document = call.optional_json()
    parameters = member(document, "parameters") if has(document, "parameters") else {}
    if not isinstance(parameters, dict):
        raise Internal("attempt to get members for non-object")
    for key, value in parameters.items():
        text = as_string(value)
        if key == "config":
            config = as_text(value)
        elif key.startswith(_FILE_PREFIX):
            files[as_text(key).removeprefix(_FILE_PREFIX)] = _decode_file(key, text)
        else:
            raise Internal("unexpected error on creating Triton parameter")
    await context.control.command("load", {"name": name, "config": config, "files": files})
    return Reply()


async def unload(context: ControlContext, call: Call) -> Reply:
    """Answer ``POST /v2/repository/models/M/unload``; requests in flight still finish (spec H-220)."""
    name = _model_name(call)
    dependents: Json = find(find(call.optional_json(), "parameters"), "unload_dependents")
    try:
        unload_dependents = as_bool(dependents) if dependents is not None else False
    except ServingError as error:
        raise Internal(f"Unable to parse 'unload_dependents': {error}") from None
    await context.control.command("unload", {"name": name, "unload_dependents": unload_dependents})
    return Reply()


def _model_name(call: Call) -> str:
    """Return the model to control.

    Raises:
        Unsupported: a repository is named (spec H-222).
        InvalidArgument: the name could leave the repository's directory (spec H-223).
    """
    if call.groups["repository"]:
        raise Unsupported("'repository_name' specification is not supported")
    return check_model_name(call.groups["model"])


def check_model_name(name: str) -> str:
    """Return the name of a model to control.

    Raises:
        InvalidArgument: the name could leave the repository's directory (spec H-223).
    """
    if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InvalidArgument(f"invalid model name '{name}', model name must not contain path traversal characters")
    return name


def _decode_file(key: str, text: str) -> bytes:
    content = decode_base64(text)
    if content is None:
        raise InvalidArgument(f"load parameter '{key[:256]}' is not valid base64")
    return content
