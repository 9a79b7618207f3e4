"""Where each field of a ``config.pbtxt`` stands, and everything that is wrong with its text.

protobuf's own parser decides what is accepted; it stops at the first error and forgets positions. This reader goes
over the same text with the schema beside it and never stops before a broken structure: it gives *every* unknown field,
bad enum value and wrong type with line and column, and remembers positions so that a later check ("dims must be
>= 1") can name its line as well. It reads only texts of bounded size (``config.MAX_CONFIG_BYTES``).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from forebay.engine.repository import model_config_schema as schema
from forebay.engine.repository.config_problem import Problem, likely_meant
from forebay.engine.repository.model_config_schema import FieldPath, FieldType, MessageType

#: Problems of one text that are kept at most.
MAX_PROBLEMS = 50

#: Messages nest 7 deep in the schema; unknown fields may nest further, but not without end.
MAX_DEPTH = 32

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<number>[-+]?\s*(?:0[xX][0-9a-fA-F]+|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?[fF]?))
      | (?P<name>-?[A-Za-z_][A-Za-z0-9_./-]*)
      | (?P<mark>[{}\[\]<>:,;])
      | (?P<other>.)""",
    re.VERBOSE,
)
_CLOSING = {"{": "}", "<": ">", "[": "]"}
_TRUE_FALSE = ("true", "false")
_BOOL_WORDS = frozenset({"true", "false", "True", "False", "t", "f", "0", "1"})
_LIMITS = {
    schema.TYPE_INT32: (-(2**31), 2**31 - 1),
    schema.TYPE_UINT32: (0, 2**32 - 1),
    schema.TYPE_INT64: (-(2**63), 2**63 - 1),
    schema.TYPE_UINT64: (0, 2**64 - 1),
}


@dataclass(frozen=True, slots=True)
class Token:
    """One word of the text; line and column count from 1."""

    kind: str
    text: str
    line: int
    column: int


@dataclass(slots=True)
class Located:
    """One value of a field, with what is inside it if it is a message."""

    line: int
    column: int
    written: str
    inside: Inside | None = None


@dataclass(slots=True)
class Inside:
    """The fields written in one message."""

    fields: dict[str, list[Located]] = field(default_factory=dict[str, list[Located]])


class TextSource:
    """The text of one configuration file, read once when a position or the problems are first asked for."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text

    @property
    def name(self) -> str:
        return self._name

    @functools.cached_property
    def _reader(self) -> _Reader:
        reader = _Reader(self._name, self._text)
        reader.read()
        return reader

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong with the text itself, in the order of the text."""
        return tuple(self._reader.problems)

    def locate(self, path: FieldPath) -> Located | None:
        """Return where ``path`` stands, or its closest ancestor that was written; None if not even that was."""
        return _find(self._reader.root, path)


def _find(inside: Inside, path: FieldPath) -> Located | None:
    """Return the value that ``path`` leads to, or the last one on the way to it."""
    values = inside.fields.get(str(path[0])) if path else None
    if not values:
        return None
    value, rest = _choose(values, path[1:])
    deeper = _find(value.inside, rest) if value.inside is not None else None
    return deeper or value


def _choose(values: list[Located], rest: FieldPath) -> tuple[Located, FieldPath]:
    """Pick one of a field's values by the index or map key after its name; return it and the rest of the path."""
    if not rest:
        return values[0], rest
    selector = rest[0]
    if isinstance(selector, int):
        return values[min(selector, len(values) - 1)], rest[1:]
    if _is_map(values):
        return next((entry for entry in values if _entry_key(entry) == selector), values[0]), rest[1:]
    return values[0], rest


def _is_map(values: list[Located]) -> bool:
    return all(value.inside is not None and "key" in value.inside.fields for value in values)


def _entry_key(entry: Located) -> str:
    assert entry.inside is not None, "only map entries come here"
    return entry.inside.fields["key"][0].written.strip("\"'")


class _StructureError(Exception):
    """The text cannot be followed further; the problem has been recorded."""


class _Reader:
    """One pass over the text. ``root`` and ``problems`` are the result."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._tokens = _tokens(text)
        self._next = 0
        self.root: Inside = Inside()
        self.problems: list[Problem] = []

    def read(self) -> None:
        try:
            self._message(schema.message_type(), self.root, (), end="", depth=0)
        except _StructureError:
            return

    # ---- grammar ----------------------------------------------------------------------------------------------------

    def _message(self, message: MessageType, inside: Inside, path: FieldPath, end: str, depth: int) -> None:
        """Read fields up to ``end`` (empty: end of the text)."""
        if depth > MAX_DEPTH:
            self._stop(self._peek(), f"messages are nested deeper than {MAX_DEPTH}")
        oneofs: dict[str, str] = {}
        while True:
            token = self._peek()
            if token.text == end and token.kind in ("mark", "end"):
                self._take()
                return
            if token.kind != "name":
                expected = f'"{end}" or a field name' if end else "a field name"
                self._stop(token, f'Expected {expected}, found "{token.text or "end of file"}".')
            self._field(message, inside, path, oneofs, depth)
            if self._peek().text in (",", ";"):
                self._take()

    def _field(self, message: MessageType, inside: Inside, path: FieldPath, oneofs: dict[str, str], depth: int) -> None:
        name = self._take()
        known = message.fields_by_name.get(name.text)
        if known is None:
            possible = tuple(f.name for f in message.fields)
            self._add(
                name,
                f'Message type "{message.full_name}" has no field named "{name.text}".',
                (*path, name.text),
                possible=possible,
                suggestion=likely_meant(name.text, possible),
            )
            self._skip_value(depth)
            return
        values = inside.fields.setdefault(known.name, [])
        repeated = schema.is_repeated(known)
        if values and not repeated:
            self._add(name, f'Non-repeated field "{known.name}" is specified multiple times.', (*path, known.name))
        if known.containing_oneof is not None:
            first = oneofs.setdefault(known.containing_oneof.name, known.name)
            if first != known.name:
                self._add(
                    name,
                    f'Field "{known.name}" is specified along with field "{first}", another member of oneof '
                    f'"{known.containing_oneof.name}".',
                    (*path, known.name),
                )
        colon = self._peek().text == ":" and self._peek().kind == "mark"
        if colon:
            self._take()
        token = self._peek()
        if token.kind == "mark" and token.text == "[" and repeated:
            self._list(known, values, path, colon, depth)
        else:
            self._value(known, values, path, colon, depth)

    def _list(self, known: FieldType, values: list[Located], path: FieldPath, colon: bool, depth: int) -> None:
        self._take()
        if self._peek().text == "]":
            self._take()
            return
        while True:
            self._value(known, values, path, colon or known.message_type is not None, depth)
            token = self._take()
            if token.text == "]" and token.kind == "mark":
                return
            if token.text != "," or token.kind != "mark":
                self._stop(token, f'Expected "," or "]", found "{token.text or "end of file"}".')

    def _value(self, known: FieldType, values: list[Located], path: FieldPath, colon: bool, depth: int) -> None:
        here: FieldPath = (*path, known.name, len(values)) if schema.is_repeated(known) else (*path, known.name)
        token = self._peek()
        if known.message_type is not None:
            if token.kind != "mark" or token.text not in ("{", "<"):
                self._stop(token, f'Expected "{{", found "{token.text or "end of file"}".', here)
            self._take()
            located = Located(token.line, token.column, "", Inside())
            values.append(located)
            assert located.inside is not None, "just made"
            self._message(known.message_type, located.inside, here, _CLOSING[token.text], depth + 1)
            return
        if not colon:
            self._stop(token, f'Expected ":", found "{token.text or "end of file"}".', here)
        values.append(Located(token.line, token.column, self._scalar(known, here)))

    def _scalar(self, known: FieldType, path: FieldPath) -> str:
        """Read one scalar, record what is wrong with it, and return what was written."""
        token = self._take()
        if token.kind in ("mark", "end", "other"):
            self._stop(token, f'Expected {_kind_of(known)}, got: "{token.text or "end of file"}".', path)
        written = token.text
        if token.kind == "string":
            while self._peek().kind == "string":
                written += " " + self._take().text
        self._check_scalar(known, token, written, path)
        return written

    def _check_scalar(self, known: FieldType, token: Token, written: str, path: FieldPath) -> None:
        if known.enum_type is not None:
            self._check_enum(known, token, path)
        elif known.type == schema.TYPE_STRING:
            if token.kind != "string":
                self._add(token, f"Expected string, got: {written}", path, suggestion=f'"{written}"')
        elif known.type == schema.TYPE_BOOL:
            if written not in _BOOL_WORDS:
                self._add(
                    token,
                    f'Invalid value for boolean field "{known.name}". Value: "{written}".',
                    path,
                    possible=_TRUE_FALSE,
                    suggestion=likely_meant(written.strip("\"'"), _TRUE_FALSE),
                )
        elif known.type in schema.INTEGER_TYPES:
            self._check_integer(known, token, written, path)
        elif token.kind != "number" and written.lower().lstrip("-") not in ("inf", "infinity", "nan"):
            self._add(token, f"Expected double, got: {written}", path)

    def _check_integer(self, known: FieldType, token: Token, written: str, path: FieldPath) -> None:
        compact = "".join(written.split())
        try:
            value = int(compact, 0) if compact.strip("+-") == "0" or not _is_octal(compact) else int(compact, 8)
        except ValueError:
            unquoted = written.strip("\"'")
            digits = unquoted if unquoted.lstrip("-").isdigit() else ""
            self._add(token, f"Expected integer, got: {written}", path, suggestion=digits)
            return
        low, high = _LIMITS[known.type]
        if not low <= value <= high:
            self._add(token, f"Integer out of range ({written})", path, possible=(f"{low} to {high}",))

    def _check_enum(self, known: FieldType, token: Token, path: FieldPath) -> None:
        assert known.enum_type is not None, "only for enum fields"
        if token.kind == "number":
            return
        if token.kind == "name" and token.text in known.enum_type.values_by_name:
            return
        possible = tuple(value.name for value in known.enum_type.values)
        word = token.text.strip("\"'")
        prefix = possible[0].split("_", 1)[0] + "_"
        meant = likely_meant(word, possible) or likely_meant(prefix + word, possible)
        self._add(
            token,
            f'Unknown enumeration value of "{word}" for field "{known.name}".',
            path,
            possible=possible,
            suggestion=meant,
        )

    def _skip_value(self, depth: int) -> None:
        """Go over the value of a field that the schema does not have."""
        if self._peek().text == ":":
            self._take()
        closing: list[str] = []
        while True:
            token = self._peek()
            if token.kind == "end":
                if closing:
                    self._stop(token, f'Expected "{closing[-1]}", found "end of file".')
                return
            if token.kind == "mark" and token.text in _CLOSING:
                if len(closing) + depth > MAX_DEPTH:
                    self._stop(token, f"messages are nested deeper than {MAX_DEPTH}")
                closing.append(_CLOSING[token.text])
            elif token.kind == "mark" and token.text in ("}", ">", "]"):
                if not closing:
                    return
                if token.text != closing.pop():
                    self._stop(token, f'Expected a matching bracket, found "{token.text}".')
            self._take()
            if not closing and not (token.kind == "string" and self._peek().kind == "string"):
                return

    # ---- tokens and problems ----------------------------------------------------------------------------------------

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _take(self) -> Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token

    def _add(
        self, token: Token, text: str, path: FieldPath = (), *, possible: tuple[str, ...] = (), suggestion: str = ""
    ) -> None:
        self.problems.append(
            Problem(
                text,
                path=path,
                source=self._name,
                line=token.line,
                column=token.column,
                written=token.text,
                possible=possible,
                suggestion=suggestion,
            )
        )
        if len(self.problems) >= MAX_PROBLEMS:
            raise _StructureError

    def _stop(self, token: Token, text: str, path: FieldPath = ()) -> None:
        """Record a problem after which the structure is unknown, and give up. Always raises."""
        self._add(token, text, path)
        raise _StructureError


def _kind_of(known: FieldType) -> str:
    if known.type == schema.TYPE_STRING:
        return "string"
    if known.enum_type is not None:
        return "identifier"
    return "integer" if known.type in schema.INTEGER_TYPES else "a value"


def _is_octal(text: str) -> bool:
    digits = text.lstrip("+-")
    return len(digits) > 1 and digits[0] == "0" and digits.isdigit()


def _tokens(text: str) -> list[Token]:
    """Split a text into tokens; the last one has kind ``end``."""
    tokens: list[Token] = []
    line, line_start, position = 1, 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None, "the last alternative takes any character"
        word, kind = match.group(), str(match.lastgroup)
        if kind != "space":
            tokens.append(Token(kind, word, line, position - line_start + 1))
        newlines = word.count("\n")
        if newlines:
            line += newlines
            line_start = position + word.rindex("\n") + 1
        position = match.end()
    tokens.append(Token("end", "", line, position - line_start + 1))
    return tokens
