"""Errors between a model and the server: Triton's two classes, and what a client is told of an exception."""

from __future__ import annotations

import os
import sysconfig
from types import TracebackType
from typing import ClassVar

from forebay.ipc.errors import Code, ServingError, from_wire


class TritonModelException(Exception):  # Triton's name
    """Raised by the functions of ``pb_utils``."""


class TritonError:
    """A request's error: a text and one of eight codes (spec P-072)."""

    UNKNOWN: ClassVar[int] = int(Code.UNKNOWN)
    INTERNAL: ClassVar[int] = int(Code.INTERNAL)
    NOT_FOUND: ClassVar[int] = int(Code.NOT_FOUND)
    INVALID_ARG: ClassVar[int] = int(Code.INVALID_ARG)
    UNAVAILABLE: ClassVar[int] = int(Code.UNAVAILABLE)
    UNSUPPORTED: ClassVar[int] = int(Code.UNSUPPORTED)
    ALREADY_EXISTS: ClassVar[int] = int(Code.ALREADY_EXISTS)
    CANCELLED: ClassVar[int] = int(Code.CANCELLED)

    def __init__(self, message: str, code: int = int(Code.INTERNAL)) -> None:
        self._message = str(message)
        try:
            self._code = Code(code)
        except ValueError:
            raise TritonModelException(f"unknown error code {code}") from None

    def code(self) -> int:
        """Return the code."""
        return int(self._code)

    def message(self) -> str:
        """Return the text."""
        return self._message

    def to_serving_error(self) -> ServingError:
        """Return the same as an exception of ours."""
        return from_wire(int(self._code), self._message)

    def __repr__(self) -> str:
        return f"TritonError({self._message!r}, {self._code.name})"


#: Where our own code between a model and its caller is.
_OWN_ROOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")

#: Directories of libraries: what is below is shown from there.
_LIBRARY_ROOTS = tuple(
    sorted(
        {os.path.realpath(path) for key in ("purelib", "platlib", "stdlib") if (path := sysconfig.get_path(key))},
        key=len,
        reverse=True,
    )
)


def shown_path(path: str, model_path: str) -> str:
    """Return a source path as clients may see it: from the model's directory or the library's on, never absolute."""
    parent = os.path.dirname(os.path.abspath(model_path))
    absolute = os.path.abspath(path)
    for root in (parent, *_LIBRARY_ROOTS):
        if absolute.startswith(root + os.sep):
            return absolute[len(root) + 1 :]
    return path if path.startswith("<") else os.path.basename(path)


def exception_text(error: BaseException, model_path: str) -> str:
    r"""Return an exception as Triton shows it: ``ValueError: bad\n\nAt:\n  m/1/model.py(9): execute\n`` (spec P-008).

    The innermost frame comes first. Frames of the import machinery and of ours are left out, and paths start at the
    model's directory, unlike Triton's.
    """
    text = f"{type(error).__name__}: {str(error) or '<EMPTY MESSAGE>'}"
    places: list[str] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_OWN_ROOT) and "importlib" not in code.co_filename:
            places.append(f"  {shown_path(code.co_filename, model_path)}({trace.tb_lineno}): {code.co_name}\n")
        trace = trace.tb_next
    return f"{text}\n\nAt:\n{''.join(reversed(places))}" if places else text
