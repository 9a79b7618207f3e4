"""Trace settings, global and per model (spec H-250..H-260).

Texts are checked here; the settings themselves live in the supervisor::

    trace_get  {"model": str}                    -> {"trace_level": [str], "trace_rate": str, ...} ("" for global)
    trace_set  {"model": str, "settings": {...}} -> the same, after the change

``settings`` holds what the client named: ``trace_level`` [str], ``trace_rate``, ``trace_count``, ``log_frequency`` int;
None takes an override back.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from forebay.frontend.codec.rapid_json import Json, as_array, as_string, dump_json, find, has
from forebay.frontend.handlers.context import Call, ControlContext, Reply
from forebay.ipc.errors import InvalidArgument, Unsupported

_UINT32_MAX = 2**32 - 1
#: What std::stoi can return; negative numbers become large ones where Triton then takes them for unsigned.
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
#: `TraceManager::MIN_TRACE_COUNT_VALUE`: unlimited.
_COUNT_MIN = -1
LOW_COUNT_TEXT = f"Unable to parse 'trace_count'. Expecting value >= {_COUNT_MIN}, got:"

#: What std::stoi reads: the longest numeric prefix.
_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,20})")

_LEVELS = ("TIMESTAMPS", "TENSORS")


async def trace_settings(context: ControlContext, call: Call) -> Reply:
    """Answer GET and POST of ``/v2/trace/setting`` and ``/v2/models/M/trace/setting``."""
    model = call.groups.get("model", "")
    if model and not context.control.catalog.is_ready(model):
        raise InvalidArgument(f"Request for unknown model : {model}")
    if call.method == "GET":
        return Reply(dump_json(await context.control.command("trace_get", {"model": model})))
    settings = parse_trace_settings(call.json())
    return Reply(dump_json(await context.control.command("trace_set", {"model": model, "settings": settings})))


def parse_trace_settings(document: Json, low_count_text: str = LOW_COUNT_TEXT) -> dict[str, object]:
    """Return the settings that a client wants changed; unknown keys and levels are ignored (spec H-251).

    Args:
        low_count_text: how a count below -1 is refused, up to the count; gRPC has a space more there than HTTP.

    Raises:
        Internal: a field of the wrong JSON type (spec H-252).
        InvalidArgument: a value out of range (spec H-253, H-254).
        Unsupported: ``trace_file`` (spec H-255).
    """
    if has(document, "trace_file"):
        raise Unsupported("trace file location can not be updated through network protocol")
    settings: dict[str, object] = {}
    for name, parse in _PARSERS.items():
        if has(document, name):
            value = find(document, name)
            settings[name] = None if value is None else parse(value)
    count = settings.get("trace_count")
    if isinstance(count, int) and count < _COUNT_MIN:
        raise InvalidArgument(f"{low_count_text}{count}")
    if settings.get("trace_level") == []:
        del settings["trace_level"]
    return settings


def _parse_level(value: Json) -> list[str]:
    levels = [as_string(level) for level in as_array(value)]
    if "OFF" in levels:
        if len(levels) > 1:
            raise InvalidArgument("Expect only one trace level 'OFF' is specified")
        return levels
    return [level for level in _LEVELS if level in levels]


def _parse_number(name: str, value: Json, minimum: int, maximum: int) -> int:
    text = as_string(value)
    match = _NUMBER.match(text)
    if match is None:
        raise InvalidArgument(f"Unable to parse '{name}', got: {text}")
    number = int(match.group(1))
    if not _INT32_MIN <= number <= _INT32_MAX:
        raise InvalidArgument(f"Unable to parse '{name}', value is out of range [ {minimum}, {maximum} ], got: {text}")
    return number


def _parse_unsigned(name: str, value: Json) -> int:
    return _parse_number(name, value, 0, _UINT32_MAX) & _UINT32_MAX


_PARSERS: dict[str, Callable[[Json], object]] = {
    "trace_level": _parse_level,
    "trace_rate": lambda value: _parse_unsigned("trace_rate", value),
    "trace_count": lambda value: _parse_number("trace_count", value, _COUNT_MIN, _INT32_MAX),
    "log_frequency": lambda value: _parse_unsigned("log_frequency", value),
}
