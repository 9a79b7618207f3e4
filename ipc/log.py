"""Log lines in Triton's two formats (spec O-040, O-041), for every process.

``I1122 11:00:58.652818 22282 lifecycle.py:472] "loading: f32:1"`` to standard error or to a file. One line is one
``write`` to a descriptor opened for appending, so lines of several processes never mix. The supervisor hands its
settings down in the environment; a child that logs before anybody configured it picks them up from there. Nothing on
a request's path logs unless verbose logging was asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress

import msgspec

#: Where a parent leaves its log settings for its children, as JSON.
ENVIRONMENT_VARIABLE = "FOREBAY_LOG_SETTINGS"


class LogOptions(msgspec.Struct, frozen=True):
    """What is logged, how and where; the fields of the engine's log settings (spec F-004..F-009, O-045)."""

    verbose: int = 0
    info: bool = True
    warning: bool = True
    error: bool = True
    format: str = "default"
    """``default`` or ``ISO8601``."""
    file: str = ""
    """Path to append to; empty: standard error."""
    escape: bool = True
    """Quote each message as a JSON string, so that no client's text can forge a line."""


class Log:
    """One process's log. Not for hot paths."""

    def __init__(self) -> None:
        """Start with the defaults, on standard error."""
        self.options = LogOptions()
        #: Entered around every write; the supervisor's display gets out of the way here.
        self.interrupting: Callable[[], AbstractContextManager[object]] = nullcontext
        self._fd = 2

    def configure(self, options: LogOptions) -> None:
        """Use ``options`` from now on.

        Raises:
            OSError: the log file cannot be opened; the former options stay in force.
        """
        fd = 2
        if options.file:
            fd = os.open(options.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self._fd != 2:
            os.close(self._fd)
        self._fd = fd
        self.options = options

    def follow(self, options: Mapping[str, object]) -> None:
        """Use the options that the supervisor has sent, if this process can; else the former ones stay in force."""
        with suppress(OSError, msgspec.ValidationError):
            self.configure(msgspec.convert(options, LogOptions))

    def info(self, text: str) -> None:
        if self.options.info:
            self._line("I", text)

    def warning(self, text: str) -> None:
        if self.options.warning:
            self._line("W", text)

    def error(self, text: str) -> None:
        if self.options.error:
            self._line("E", text)

    def verbose(self, level: int, text: str) -> None:
        """Log if ``--log-verbose`` is at least ``level``; shown with the letter I, as Triton does (spec O-042)."""
        if self.options.verbose >= level:
            self._line("I", text)

    def table(self, text: str) -> None:
        """Log a multi-line table raw, below a line of its own (spec O-043)."""
        if self.options.info:
            self._write(f"{self._prefix('I', 2)} \n{text.rstrip()}\n\n")

    def _line(self, letter: str, text: str) -> None:
        message = json.dumps(text, ensure_ascii=False) if self.options.escape else text
        self._write(f"{self._prefix(letter, 3)} {message}\n")

    def _prefix(self, letter: str, depth: int) -> str:
        # Depth counts the frames from here up to the caller of info() and its sisters.
        frame = sys._getframe(depth)  # pyright: ignore[reportPrivateUsage] - documented, for CPython
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        now_ns = time.time_ns()
        moment = time.gmtime(now_ns // 1_000_000_000)
        pid = os.getpid()
        if self.options.format == "ISO8601":
            return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', moment)} {letter} {pid} {place}]"
        micros = now_ns // 1_000 % 1_000_000
        return f"{letter}{time.strftime('%m%d %H:%M:%S', moment)}.{micros:06d} {pid} {place}]"

    def _write(self, text: str) -> None:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        # A closed terminal or a full disk must not end the server.
        with self.interrupting(), suppress(OSError):
            while data:
                data = data[os.write(self._fd, data) :]


def options_from_environment() -> LogOptions:
    """Return the options that the supervisor left in the environment; the defaults if there are none."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    try:
        return msgspec.json.decode(text, type=LogOptions) if text else LogOptions()
    except msgspec.MsgspecError:
        return LogOptions()


def _create() -> Log:
    created = Log()
    with suppress(OSError):
        created.configure(options_from_environment())
    return created


#: This process's log.
log = _create()
