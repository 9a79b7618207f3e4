"""Logging settings, for the whole server at once (spec H-261..H-263).

Checked here, kept and applied by the supervisor::

    log_get  {}                 -> {"log_file": str, "log_info": bool, ..., "log_format": str}
    log_set  {"settings": {...}} -> the same, after the change
"""

from __future__ import annotations

from collections.abc import Callable

from forebay.frontend.codec.rapid_json import Json, as_bool, as_string, as_uint, dump_json, find
from forebay.frontend.handlers.context import Call, ControlContext, Reply
from forebay.ipc.errors import Unavailable, Unsupported

_INT32_RANGE = 2**32


async def log_settings(context: ControlContext, call: Call) -> Reply:
    """Answer GET and POST of ``/v2/logging``."""
    if call.method == "GET":
        return Reply(dump_json(await context.control.command("log_get", {})))
    settings = parse_log_settings(call.json())
    return Reply(dump_json(await context.control.command("log_set", {"settings": settings})))


def parse_log_settings(document: Json) -> dict[str, object]:
    """Return the settings that a client wants changed; unknown keys and nulls are ignored (spec H-261).

    Raises:
        Internal: a field of the wrong JSON type.
        Unavailable: an unknown ``log_format``; 503 is Triton's choice (spec H-262).
        Unsupported: ``log_file``.
    """
    if find(document, "log_file") is not None:
        raise Unsupported("log file location can not be updated through network protocol")
    return {name: parse(value) for name, parse in _PARSERS.items() if (value := find(document, name)) is not None}


def _parse_format(value: Json) -> str:
    text = as_string(value)
    if text not in ("default", "ISO8601"):
        raise Unavailable(f"invalid argument for --log_format, got: {text}")
    return text


def _parse_verbose_level(value: Json) -> int:
    """Return what is left of the number in 32 bits with a sign, at least 0."""
    half = _INT32_RANGE // 2
    return max(0, (as_uint(value) + half) % _INT32_RANGE - half)


_PARSERS: dict[str, Callable[[Json], object]] = {
    "log_info": as_bool,
    "log_warning": as_bool,
    "log_error": as_bool,
    "log_verbose_level": _parse_verbose_level,
    "log_format": _parse_format,
}
