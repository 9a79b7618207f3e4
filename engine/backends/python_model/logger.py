"""``pb_utils.Logger``: a model's lines in the server's log, with the model's file and line (spec P-118)."""

from __future__ import annotations

import contextlib
from typing import ClassVar

from forebay.ipc.log import Log, log


class _ModelLog(Log):
    """The process's log, as seen from three frames further up: the model that called ``log_info``."""

    def _prefix(self, letter: str, depth: int) -> str:
        return super()._prefix(letter, depth + 3)


class Logger:
    """Static functions, as in Triton."""

    INFO: ClassVar[int] = 0
    WARNING: ClassVar[int] = 1
    ERROR: ClassVar[int] = 2
    VERBOSE: ClassVar[int] = 3

    _log: ClassVar[_ModelLog | None] = None

    @classmethod
    def log(cls, message: str, level: int = INFO) -> None:
        """Log ``message`` at ``level``."""
        cls._write(message, level)

    @classmethod
    def log_info(cls, message: str) -> None:
        """Log an information."""
        cls._write(message, cls.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        """Log a warning."""
        cls._write(message, cls.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        """Log an error."""
        cls._write(message, cls.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        """Log only with ``--log-verbose`` above 0."""
        cls._write(message, cls.VERBOSE)

    @classmethod
    def _write(cls, message: str, level: int) -> None:
        own = cls._log
        if own is None:
            own = cls._log = _ModelLog()
        if own.options is not log.options:
            with contextlib.suppress(OSError):
                own.configure(log.options)
        text = str(message)
        if level == cls.ERROR:
            own.error(text)
        elif level == cls.WARNING:
            own.warning(text)
        elif level == cls.VERBOSE:
            own.verbose(1, text)
        else:
            own.info(text)
