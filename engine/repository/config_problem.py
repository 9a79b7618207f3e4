"""What is wrong with a model configuration, said so that a person can mend it at once.

Triton stops at the first problem and prints one sentence. We keep its sentence word for word as :attr:`Problem.text`
and add where it was written, what would be possible there, and what was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import msgspec

from forebay.engine.repository.model_config_schema import ConfigSource, FieldPath
from forebay.ipc.errors import Code, InvalidArgument

#: Choices listed in a message at most; the rest is counted.
MAX_LISTED = 12


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with one model."""

    text: str
    """Triton's sentence where it has one."""
    path: FieldPath = ()
    """The field it is about: ``("input", 0, "dims")``."""
    source: str = ""
    """File name, empty for a configuration that came through the API."""
    line: int = 0
    """Line in ``source`` from 1; 0: not known."""
    column: int = 0
    """Column from 1; 0: not known."""
    written: str = ""
    """What stands there."""
    possible: tuple[str, ...] = ()
    """What could stand there."""
    suggestion: str = ""
    """What was probably meant."""
    hint: str = ""
    """What to do about it, as a sentence."""
    code: Code = Code.INVALID_ARG

    @property
    def place(self) -> str:
        """``config.pbtxt:3:5``, as much of it as is known; without a line the field is named."""
        if self.line:
            return ":".join([self.source or "config", *(str(n) for n in (self.line, self.column) if n)])
        return ": ".join([self.source or "config", *([self.field] if self.path else [])])

    @property
    def field(self) -> str:
        """The path as people write it: ``input[0].dims``."""
        return path_text(self.path)

    def describe(self) -> str:
        """Return the problem in up to four lines, for a terminal or a log."""
        lines = [f"{self.place}: {self.text}"]
        if self.written and self.written not in self.text:
            lines.append(f"  written: {self.written}")
        if self.suggestion:
            lines.append(f"  did you mean `{self.suggestion}`?")
        if self.possible:
            listed = ", ".join(self.possible[:MAX_LISTED])
            rest = len(self.possible) - MAX_LISTED
            lines.append(f"  possible: {listed}" + (f" and {rest} more" if rest > 0 else ""))
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)

    def located(self, source: ConfigSource | None) -> Problem:
        """Return the problem with its place in ``source`` filled in, where it has none yet."""
        if source is None or self.line:
            return self
        position = source.locate(self.path)
        if position is None:
            return msgspec.structs.replace(self, source=source.name)
        return msgspec.structs.replace(
            self,
            source=source.name,
            line=position.line,
            column=position.column,
            written=self.written or position.written,
        )


class ConfigError(InvalidArgument):
    """A configuration that cannot be used; caused by who wrote it.

    ``text`` is the first problem's sentence, as Triton would give it; ``problems`` holds every one that was found.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems[0].text)
        self.problems = tuple(problems)

    @property
    def text_with_hint(self) -> str:
        """The first problem in one line with its place and what to do, for a log line or a reason in the index."""
        first = self.problems[0]
        more = f" ({len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
        meant = f"; did you mean '{first.suggestion}'?" if first.suggestion else ""
        hint = f". {first.hint}" if first.hint else ""
        place = f"{first.place}: " if first.line else ""
        return f"{place}{first.text}{meant}{hint}{more}"

    def describe(self) -> str:
        """Return all problems, each with its place, one under the other."""
        return "\n".join(problem.describe() for problem in self.problems)


def path_text(path: FieldPath) -> str:
    """Return ``input[0].dims[1]`` for ``("input", 0, "dims", 1)``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def likely_meant(written: str, possible: Iterable[str]) -> str:
    """Return the closest of ``possible`` to ``written`` regardless of case, or an empty string if none is close."""
    by_folded = {_folded(name): name for name in possible}
    folded = _folded(written)
    if folded in by_folded:
        return by_folded[folded]
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else ""


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
