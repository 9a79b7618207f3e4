"""Reads a settings file: TOML, one section per group of `Settings`, one key per setting.

A value is written as TOML has it (true, 8000, "text"); what has a grammar of its own on the command line is a string in
that grammar, and a repeatable setting is an array of them.
"""

import difflib
import tomllib
from collections.abc import Iterable
from typing import Any, cast

from forebay.engine.flags import FLAGS_BY_PATH, Flag, field_type, is_repeatable
from forebay.engine.settings import Settings

#: A settings file is written by hand; one that is larger than this is something else. Bytes.
MAX_FILE_BYTES = 1 << 20


def load_settings_file(path: str) -> dict[Flag, list[str]]:
    """Return the texts that a settings file gives, by flag, as if they stood on the command line.

    Raises:
        ValueError: the file cannot be read, is no TOML, or names a setting that does not exist; the message is
            for the user and names the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the settings file {path}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"the settings file {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the settings file {path} is not valid TOML: {error}") from None
    return _read_sections(document, path)


def _read_sections(document: dict[str, Any], path: str) -> dict[Flag, list[str]]:
    given: dict[Flag, list[str]] = {}
    for section, keys in document.items():
        if section not in Settings.__struct_fields__:
            raise ValueError(f"{path}: unknown section [{section}]{_suggest(section, Settings.__struct_fields__)}")
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: {section} is a section: write [{section}] and its settings below")
        for key, value in cast("dict[str, object]", keys).items():
            flag = FLAGS_BY_PATH.get(f"{section}.{key}")
            if flag is None:
                known = [flag.field for flag in FLAGS_BY_PATH.values() if flag.section == section]
                elsewhere = [known_path for known_path in FLAGS_BY_PATH if known_path.endswith(f".{key}")]
                hint = f"; did you mean {elsewhere[0]}?" if elsewhere else _suggest(key, known)
                raise ValueError(f"{path}: unknown setting {section}.{key}{hint}")
            try:
                given[flag] = _texts(flag, value)
            except ValueError as error:
                raise ValueError(f"{path}: {section}.{key}: {error}") from None
    return given


def _texts(flag: Flag, value: object) -> list[str]:
    """Return a TOML value as the texts of the flag, after checking its TOML type."""
    if is_repeatable(flag):
        items = cast("list[object]", value) if isinstance(value, list) else [None]
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) != len(items):
            raise ValueError(f"expected an array of strings, got {value!r}")
        return texts
    kind = field_type(flag.path)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return ["true" if value else "false"]
    if kind in (int, float):
        # In Python true is an int; in TOML it is no number.
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}, got {value!r}")
        return [str(value)]
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {value!r}")
    return [value]


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
