"""Read a model configuration from text or JSON, and print it as Triton's ``/config`` does.

Reading never fills in defaults: see ``normalise.py``; nor does it judge sense: see ``validate.py``.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, cast

from forebay.engine.repository import model_config_schema as schema
from forebay.engine.repository.config_problem import ConfigError, Problem, likely_meant
from forebay.engine.repository.model_config_schema import (
    FieldPath,
    FieldType,
    MessageType,
    ModelConfig,
    map_entry,
    message_class,
    message_type,
)
from forebay.engine.repository.text_source import TextSource

#: Bytes of one configuration, from a file or the load API; far above any real one, and a bound on parsing time.
MAX_CONFIG_BYTES = 4 * 1024 * 1024

#: 64-bit fields that ``/config`` prints as numbers. protobuf prints all of them as strings and Triton turns back
#: exactly these (spec H-043); ``initial_state.dims``, ``graph_spec`` and ``device_id`` stay strings there and here.
_NUMBER_PATHS = frozenset(
    {
        "input.dims",
        "input.reshape.shape",
        "output.dims",
        "output.reshape.shape",
        "version_policy.specific.versions",
        "dynamic_batching.max_queue_delay_microseconds",
        "dynamic_batching.priority_levels",
        "dynamic_batching.default_priority_level",
        "dynamic_batching.default_queue_policy.default_timeout_microseconds",
        "dynamic_batching.priority_queue_policy.default_timeout_microseconds",
        "sequence_batching.max_sequence_idle_microseconds",
        "sequence_batching.oldest.max_queue_delay_microseconds",
        "sequence_batching.direct.max_queue_delay_microseconds",
        "sequence_batching.state.dims",
        "ensemble_scheduling.step.model_version",
        "model_warmup.inputs.dims",
    }
)


def parse_config_text(text: str, source_name: str = "config.pbtxt") -> ModelConfig:
    """Read protobuf text format (spec R-017).

    Args:
        text: the file's content.
        source_name: what errors call the file.

    Raises:
        ConfigError: the text is not a ModelConfig; with every problem of the text, each with line and column.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError([_too_large(source_name)])
    text_format = schema.text_format()
    source = TextSource(source_name, text)
    message = message_class("ModelConfig")()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigError(source.problems or [_protobuf_problem(error, source_name)]) from None
    except (ValueError, UnicodeError, RecursionError) as error:
        raise ConfigError(source.problems or [Problem(str(error), source=source_name)]) from None
    return ModelConfig(message, source)


def parse_config_bytes(data: bytes, source_name: str = "config.pbtxt") -> ModelConfig:
    """Read a configuration file's bytes: UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: not UTF-8, or as :func:`parse_config_text`.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError([_too_large(source_name)])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(
            [
                Problem(
                    "model configuration is not UTF-8 text",
                    source=source_name,
                    line=line,
                    column=column,
                    written=f"byte 0x{data[error.start]:02x}",
                )
            ]
        ) from None
    return parse_config_text(text, source_name)


def parse_config_json(text: str) -> ModelConfig:
    """Read the JSON of a load request's ``config`` parameter (spec H-215).

    Unknown fields and duplicate keys are errors; enum names are accepted in any case, integers as numbers or strings.

    Raises:
        ConfigError: with every unknown field and enum value, or the place of the syntax error.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError([_too_large("")])
    try:
        document: object = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError([Problem(f"JSON: {error.msg}", line=error.lineno, column=error.colno)]) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError([Problem(f"JSON: {reason}")]) from None
    if not isinstance(document, dict):
        raise ConfigError([Problem("model configuration must be a JSON object")])
    problems: list[Problem] = []
    checked = _check_json(cast("dict[str, object]", document), message_type(), (), problems)
    if problems:
        raise ConfigError(problems)
    json_format = schema.json_format()
    message = message_class("ModelConfig")()
    try:
        json_format.ParseDict(checked, message)
    except (json_format.ParseError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError([Problem(str(error))]) from None
    return ModelConfig(message)


def config_json(config: ModelConfig) -> str:
    """Return a configuration exactly as ``GET /v2/models/M/config`` prints it (spec H-043..H-045).

    One line without blanks, fields in the order of their declaration, defaults printed, unset messages absent.
    """
    return json.dumps(
        _json_object(config.message, message_type(), ""), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )


# ---- printing --------------------------------------------------------------------------------------------------------


#: Fields that Triton 2.51 does not have: not shown where they are not set.
_NEWER_FIELDS = frozenset({"ensemble_scheduling.max_inflight_requests"})


def _json_object(message: Any, descriptor: MessageType, path: str) -> dict[str, object]:
    document: dict[str, object] = {}
    # As protobuf's own printer does it: a number or text of a one-of comes behind all other fields.
    for field in sorted(descriptor.fields, key=_is_scalar_choice):
        here = f"{path}.{field.name}" if path else field.name
        value: Any = getattr(message, field.name)
        entry = map_entry(field)
        if entry is not None:
            # protobuf's own order of map entries is that of a hash table; sorted, equal configs print equal.
            document[field.name] = {_map_key(key): _json_value(value[key], entry[1], here) for key in sorted(value)}
        elif schema.is_repeated(field):
            document[field.name] = [_json_value(item, field, here) for item in value]
        elif here in _NEWER_FIELDS and not value:
            continue
        elif not field.has_presence or message.HasField(field.name):
            document[field.name] = _json_value(value, field, here)
    return document


def _is_scalar_choice(field: FieldType) -> bool:
    return field.containing_oneof is not None and field.message_type is None


def _map_key(key: str | int) -> str:
    return str(key)


def _json_value(value: Any, field: FieldType, path: str) -> object:
    if field.message_type is not None:
        return _json_object(value, field.message_type, path)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return int(value) if known is None else known.name
    if field.type in (schema.TYPE_INT64, schema.TYPE_UINT64):
        return int(value) if path in _NUMBER_PATHS else str(value)
    if field.type in (schema.TYPE_FLOAT, schema.TYPE_DOUBLE):
        return _json_float(float(value), single=field.type == schema.TYPE_FLOAT)
    return value  # str, bool, int32 and uint32 are what JSON has


def _json_float(value: float, *, single: bool) -> object:
    """Return the shortest number that reads back the same; whole numbers without a point, as protobuf prints them."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value.is_integer() and abs(value) < 1e15:
        return int(value)
    if single:
        for digits in range(6, 10):
            short = float(f"{value:.{digits}g}")
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
    return value


# ---- reading ---------------------------------------------------------------------------------------------------------


def _too_large(source_name: str) -> Problem:
    return Problem(f"model configuration is larger than {MAX_CONFIG_BYTES} bytes", source=source_name)


def _protobuf_problem(error: Any, source_name: str) -> Problem:
    """Turn protobuf's ParseError into a problem; its text begins with ``line:column :``."""
    text = str(error)
    line, column = error.GetLine() or 0, error.GetColumn() or 0
    prefix = f"{line}:{column} : "
    return Problem(text.removeprefix(prefix), source=source_name, line=line, column=column)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{repeated}' is given more than once")
    return document


def _check_json(
    document: dict[str, object], message: MessageType, path: FieldPath, problems: list[Problem]
) -> dict[str, object]:
    """Return the document with enum names in their spelling; append a problem for each name the schema lacks."""
    by_name = {alias: field for field in message.fields for alias in (field.name, field.json_name)}
    checked: dict[str, object] = {}
    for key, value in document.items():
        field = by_name.get(key)
        here = (*path, key)
        if field is None:
            possible = tuple(known.name for known in message.fields)
            problems.append(
                Problem(
                    f"{key}: Cannot find field.",
                    path=here,
                    written=key,
                    possible=possible,
                    suggestion=likely_meant(key, possible),
                )
            )
            continue
        entry = map_entry(field)
        if entry is not None and isinstance(value, dict):
            items = cast("dict[str, object]", value).items()
            checked[key] = {name: _check_json_value(item, entry[1], (*here, name), problems) for name, item in items}
        elif schema.is_repeated(field) and isinstance(value, list):
            elements = enumerate(cast("list[object]", value))
            checked[key] = [_check_json_value(item, field, (*here, index), problems) for index, item in elements]
        else:
            checked[key] = _check_json_value(value, field, here, problems)
    return checked


def _check_json_value(value: object, field: FieldType, path: FieldPath, problems: list[Problem]) -> object:
    if field.message_type is not None and isinstance(value, dict):
        return _check_json(cast("dict[str, object]", value), field.message_type, path, problems)
    if field.enum_type is not None and isinstance(value, str):
        name = value.upper()
        if name not in field.enum_type.values_by_name:
            possible = tuple(known.name for known in field.enum_type.values)
            problems.append(
                Problem(
                    f'{field.name}: invalid value "{value}" for type {field.enum_type.name}',
                    path=path,
                    written=value,
                    possible=possible,
                    suggestion=likely_meant(value, possible),
                )
            )
        return name
    return value


def changed_fields(older: ModelConfig, newer: ModelConfig) -> frozenset[str]:
    """Return the top-level fields in which two normalised configurations differ."""
    changed: set[str] = set()
    for field in older.message.DESCRIPTOR.fields:
        before, after = getattr(older.message, field.name), getattr(newer.message, field.name)
        present = field.has_presence and (older.message.HasField(field.name) != newer.message.HasField(field.name))
        if present or before != after:
            changed.add(str(field.name))
    return frozenset(changed)
