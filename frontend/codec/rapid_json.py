"""JSON as Triton reads and writes it: RapidJSON's dialect, its error texts, its escapes and its number layout.

Reading goes through orjson; only what orjson refuses meets the scanner below, which knows the dialect (``NaN``,
``Infinity``, raw bytes that are not UTF-8, anything after a NUL) and names the same fault at the same
byte as RapidJSON 1.1 does. Behaviour: spec H-002, H-014, H-015 and `triton_json.h` of triton-inference-server/common;
the texts and offsets were compared with a running Triton 2.51.

Bytes of a JSON string that are not UTF-8 survive as surrogate escapes (PEP 383), so that BYTES elements come out as
they went in (spec H-078): :func:`to_utf8` turns any string of this module back into its bytes and never fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from forebay.frontend.codec.grisu import decimal_digits
from forebay.ipc.errors import Internal, InvalidArgument

#: A parsed JSON value. Numbers keep their kind: ``1`` is an int, ``1.0`` a float, ``true`` a bool.
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

#: Nested arrays and objects at most (spec H-014).
MAX_DEPTH = 100

#: Above this size (bytes) a document that orjson refuses is read by the C decoder of `json`, whose faults are only
#: translated: the exact scanner is Python and must not be fed megabytes by a stranger.
SCANNER_LIMIT_BYTES = 64 * 1024

_INT64_MIN, _INT64_MAX, _UINT64_MAX = -(2**63), 2**63 - 1, 2**64 - 1
_EXPONENT_MAX = 308

#: A string literal, or what there is of one that never ends: so a search over any bytes is linear in their number.
_STRING_LITERAL = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BLANK = re.compile(r"[ \n\r\t]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_DIGITS = re.compile(r"[0-9]*")
_HEX4 = re.compile(r"[0-9A-Fa-f]{4}")
_ESCAPED = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: dict[str, tuple[str, Json]] = {"n": ("null", None), "t": ("true", True), "f": ("false", False)}


def parse_json(buffer: bytes | memoryview, *, max_depth: int = MAX_DEPTH) -> Json:
    """Return the JSON value of ``buffer``, which ends where its bytes or a NUL do (spec H-015, H-113).

    Of equal keys in one object the last counts.

    Raises:
        Internal: a syntax error, with RapidJSON's text and byte offset.
        InvalidArgument: nesting deeper than ``max_depth`` (spec H-014).
    """
    data = buffer if isinstance(buffer, bytes) else bytes(buffer)
    if data.count(b"[") + data.count(b"{") > max_depth and _depth(data) > max_depth:
        raise InvalidArgument(f"JSON nesting depth exceeds maximum allowed limit ({max_depth})")
    try:
        return orjson.loads(data)  # type: ignore[no-any-return]
    except orjson.JSONDecodeError:
        text = data.decode("utf-8", "surrogateescape")
        return _Scanner(text).document() if len(data) <= SCANNER_LIMIT_BYTES else _parse_large(text)


def _depth(data: bytes) -> int:
    """Return how deep brackets nest outside of strings; exact for valid JSON."""
    return int(np.cumsum(_bracket_steps(_STRING_LITERAL.sub(b"", data)), dtype=np.int64).max(initial=0))


def _bracket_steps(bare: bytes) -> npt.NDArray[np.int8]:
    """Return +1 for each opening bracket, -1 for each closing one, 0 for all other bytes."""
    codes = np.frombuffer(bare, dtype=np.uint8) | 0x20  # '[' and '{' differ in this bit
    steps: npt.NDArray[np.int8] = (codes == ord("{")).astype(np.int8) - (codes == ord("}")).astype(np.int8)
    return steps


def _fail(text: str, message: str, at: int) -> NoReturn:
    raise Internal(f"failed to parse the request JSON buffer: {message} at {len(to_utf8(text[:at]))}")


def _parse_large(text: str) -> Json:
    """Read a large document that orjson refused, at C speed; its faults get the nearest RapidJSON text."""
    start = _first(text)
    try:
        value: Json
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        message, at = _TRANSLATED.get(error.msg, "Invalid value."), error.pos
        if error.msg == "Expecting ',' delimiter":
            is_object = _innermost_is_object(text[:at])
            message = f"Missing a comma or {'}' if is_object else ']'!r} after an {_AFTER[is_object]}."
        _fail(text, message, len(text) if error.msg.startswith("Unterminated") else at)
    except (ValueError, RecursionError):  # an integer of more digits than Python converts
        _fail(text, "Number too big to be stored in double.", start)
    _check_end(text, end)
    return value


def _check_end(text: str, at: int) -> None:
    """Raise unless nothing but blanks follows, or a NUL, which RapidJSON takes for the end."""
    at = _blank_end(text, at)
    if text[at : at + 1] not in ("", "\0"):
        _fail(text, "The document root must not be followed by other values.", at)


_AFTER = {True: "object member", False: "array element"}
_TRANSLATED = {
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Invalid control character at": "Invalid escape character in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX escape": "Incorrect hex digit after \\u escape in string.",
}


def _innermost_is_object(text: str) -> bool:
    """Return whether the innermost bracket that is open at the end of ``text`` is a brace."""
    bare = _STRING_LITERAL.sub(b"", to_utf8(text))
    open_from_here = np.cumsum(_bracket_steps(bare)[::-1], dtype=np.int64)
    unclosed = np.flatnonzero(open_from_here == 1)
    return unclosed.size > 0 and bare[len(bare) - 1 - int(unclosed[0])] == ord("{")


def _first(text: str) -> int:
    """Return where the first value starts, after a byte order mark and blanks."""
    at = _blank_end(text, 1 if text.startswith("\ufeff") else 0)
    if text[at : at + 1] in ("", "\0"):
        _fail(text, "The document is empty.", at)
    return at


def _blank_end(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


class _Scanner:
    """RapidJSON 1.1's reader: the same values, and the same fault at the same place."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def document(self) -> Json:
        self._at = _first(self._text)
        value = self._value()
        _check_end(self._text, self._at)
        return value

    def _fail(self, message: str, at: int | None = None) -> NoReturn:
        _fail(self._text, message, self._at if at is None else at)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_blanks(self) -> None:
        self._at = _blank_end(self._text, self._at)

    def _take(self, expected: str) -> bool:
        """Step over each character of ``expected``; stop in front of the first that differs."""
        for character in expected:
            if self._peek() != character:
                return False
            self._at += 1
        return True

    def _value(self) -> Json:
        first = self._peek()
        if first == '"':
            return self._string()
        if first == "{":
            return self._object()
        if first == "[":
            return self._array()
        if first in _LITERALS:
            literal, value = _LITERALS[first]
            if not self._take(literal):
                self._fail("Invalid value.")
            return value
        return self._number()

    def _object(self) -> Json:
        self._at += 1
        members: dict[str, Json] = {}
        self._skip_blanks()
        if self._take("}"):
            return members
        while True:
            if self._peek() != '"':
                self._fail("Missing a name for object member.")
            name = self._string()
            self._skip_blanks()
            if not self._take(":"):
                self._fail("Missing a colon after a name of object member.")
            self._skip_blanks()
            members[name] = self._value()
            self._skip_blanks()
            if self._take("}"):
                return members
            if not self._take(","):
                self._fail("Missing a comma or '}' after an object member.")
            self._skip_blanks()

    def _array(self) -> Json:
        self._at += 1
        elements: list[Json] = []
        self._skip_blanks()
        if self._take("]"):
            return elements
        while True:
            elements.append(self._value())
            self._skip_blanks()
            if self._take("]"):
                return elements
            if not self._take(","):
                self._fail("Missing a comma or ']' after an array element.")
            self._skip_blanks()

    def _string(self) -> str:
        self._at += 1
        parts: list[str] = []
        while True:
            plain = _PLAIN.match(self._text, self._at)
            if plain:
                parts.append(plain.group())
                self._at = plain.end()
            stop = self._peek()
            if stop == '"':
                self._at += 1
                return "".join(parts)
            if stop in ("", "\0"):
                self._fail("Missing a closing quotation mark in string.")
            if stop != "\\":
                self._fail("Invalid escape character in string.")
            parts.append(self._escape())

    def _escape(self) -> str:
        start = self._at
        kind = self._text[start + 1 : start + 2]
        if kind == "u":
            return self._unicode_escape(start)
        if kind not in _ESCAPED:
            self._fail("Invalid escape character in string.", start)
        self._at = start + 2
        return _ESCAPED[kind]

    def _unicode_escape(self, start: int) -> str:
        code = self._hex4(start, start + 2)
        if 0xD800 <= code <= 0xDBFF:
            if not self._take("\\u"):
                self._fail("The surrogate pair in string is invalid.", start)
            low = self._hex4(start, self._at)
            if not 0xDC00 <= low <= 0xDFFF:
                self._fail("The surrogate pair in string is invalid.", start)
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
        # A lone low surrogate passes, as three bytes that are not UTF-8.
        return chr(code).encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")

    def _hex4(self, start: int, at: int) -> int:
        digits = _HEX4.match(self._text, at)
        if not digits:
            self._fail("Incorrect hex digit after \\u escape in string.", start)
        self._at = digits.end()
        return int(digits.group(), 16)

    def _number(self) -> int | float:
        start = self._at
        negative = self._take("-")
        first = self._peek()
        if first in ("N", "I"):
            return self._special(negative)
        if not self._take("0") and not self._digits():
            self._fail("Invalid value.")
        is_integer = True
        exponent_at = 0
        if self._take("."):
            is_integer = False
            if not self._digits():
                self._fail("Miss fraction part in number.")
        if self._take("e") or self._take("E"):
            is_integer = False
            exponent_at = self._at
            if not self._take("+"):
                self._take("-")
            if not self._digits():
                self._fail("Miss exponent in number.")
        token = self._text[start : self._at]
        if is_integer and len(token) <= 20 and _INT64_MIN <= (whole := int(token)) <= _UINT64_MAX:
            return whole
        value = float(token)
        # With an exponent that a double can have, RapidJSON multiplies and gets an infinity.
        if math.isinf(value) and not (exponent_at and int(self._text[exponent_at : self._at]) <= _EXPONENT_MAX):
            self._fail("Number too big to be stored in double.", start)
        return value

    def _digits(self) -> bool:
        digits = _DIGITS.match(self._text, self._at)
        before = self._at
        if digits:
            self._at = digits.end()
        return self._at > before

    def _special(self, negative: bool) -> float:
        if self._take("N"):
            if not self._take("aN"):
                self._fail("Invalid value.")
            return math.nan
        if not self._take("Inf") or (self._peek() == "i" and not self._take("inity")):
            self._fail("Invalid value.")
        return -math.inf if negative else math.inf


# Typed access: `triton_json.h`, As* and MemberAs*. All raise Internal, which HTTP shows as 500 (spec H-002).


def find(value: Json, name: str) -> Json:
    """Return the named member, or None where there is none or ``value`` is no object; null counts as absent here."""
    return value.get(name) if isinstance(value, dict) else None


def has(value: Json, name: str) -> bool:
    """Return whether ``value`` is an object with that member, be it null."""
    return isinstance(value, dict) and name in value


def member(value: Json, name: str) -> Json:
    """Return the named member."""
    if not isinstance(value, dict) or name not in value:
        raise Internal(f"attempt to access non-existing object member '{name}'")
    return value[name]


def as_string(value: Json) -> str:
    """Return a string, bytes that are not UTF-8 kept as surrogate escapes."""
    if not isinstance(value, str):
        raise Internal("attempt to access JSON non-string as string")
    return value


def as_text(value: Json) -> str:
    """Return a string that may travel anywhere: what was not UTF-8 is replaced by U+FFFD."""
    text = as_string(value)
    return text if text.isascii() else to_utf8(text).decode("utf-8", "replace")


def as_bool(value: Json) -> bool:
    if not isinstance(value, bool):
        raise Internal("attempt to access JSON non-boolean as boolean")
    return value


def is_int64(value: Json) -> bool:
    return type(value) is int and _INT64_MIN <= value <= _INT64_MAX


def as_int(value: Json) -> int:
    if not isinstance(value, int) or not is_int64(value):
        raise Internal("attempt to access JSON non-signed-integer as signed-integer")
    return value


def as_uint(value: Json) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _UINT64_MAX:
        raise Internal("attempt to access JSON non-unsigned-integer as unsigned-integer")
    return value


def as_double(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Internal("attempt to access JSON non-number as double")
    return to_double(value)


def as_array(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise Internal("attempt to access JSON non-array as array")
    return value


def as_object(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise Internal("attempt to access JSON non-object as object")
    return value


def to_double(value: int | float) -> float:
    """Return the double of a JSON number; an integer beyond all doubles is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# Writing: rapidjson::Writer with kWriteNanAndInfFlag.

_TO_ESCAPE = re.compile(rb'["\\\x00-\x1f]')
_ESCAPES = {code: b"\\u%04X" % code for code in range(0x20)} | {
    ord('"'): b'\\"',
    ord("\\"): b"\\\\",
    8: b"\\b",
    9: b"\\t",
    10: b"\\n",
    12: b"\\f",
    13: b"\\r",
}


def to_utf8(text: str) -> bytes:
    """Return the bytes of a string, undoing surrogate escapes; never raises."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return text.encode("utf-8", "surrogatepass")


def quote(text: str) -> bytes:
    """Return a JSON string literal; only quotes, backslashes and control characters are escaped."""
    return quote_bytes(to_utf8(text))


def quote_bytes(raw: bytes | memoryview) -> bytes:
    """Return a JSON string literal around raw bytes, which need not be UTF-8 (spec H-078)."""
    return b'"%s"' % _TO_ESCAPE.sub(lambda match: _ESCAPES[match.group()[0]], raw)


def format_double(value: float) -> str:
    """Return a double in RapidJSON's layout: ``1.0``, ``1e-7``, ``3.5e38``, ``NaN``, ``Infinity`` (spec H-076)."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    if value == 0:
        return f"{sign}0.0"
    digits, exponent = decimal_digits(abs(value))
    #: Digits in front of the decimal point; zero or less: zeros behind it.
    point = len(digits) + exponent
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return f"{sign}{digits}{'0' * (point - len(digits))}.0"
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    behind = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{behind}e{point - 1}"


def dump_json(value: Any) -> bytes:
    """Return compact JSON of mappings, sequences, strings, bytes (as strings), numbers, bools and None, in order.

    Raises:
        TypeError: any other type; a mistake of ours, never of a client.
    """
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, str):
        parts.append(quote(value))
    elif isinstance(value, bool):
        parts.append(b"true" if value else b"false")
    elif isinstance(value, int):
        parts.append(b"%d" % value)
    elif isinstance(value, float):
        parts.append(format_double(value).encode())
    elif value is None:
        parts.append(b"null")
    elif isinstance(value, (bytes, memoryview)):
        parts.append(quote_bytes(value))  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, Mapping):
        _write_all(b"{", b"}", value.items(), parts)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, Sequence):
        _write_all(b"[", b"]", value, parts)  # pyright: ignore[reportUnknownArgumentType]
    else:
        raise TypeError(f"no JSON for {type(value)}")


def _write_all(opening: bytes, closing: bytes, items: Any, parts: list[bytes]) -> None:
    parts.append(opening)
    for index, item in enumerate(items):
        if index:
            parts.append(b",")
        if opening == b"{":
            parts += (quote(item[0]), b":")
            item = item[1]
        _write(item, parts)
    parts.append(closing)
