"""Does a model answer later than its execution returns? Asked once it is initialised, before it gets requests."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

#: What a model that answers by itself calls.
_SENDER = b"get_response_sender"


def may_answer_late(model: Any, *folders: str) -> bool:
    """Tell whether a model awaits in ``execute``, or code in one of its folders mentions the response sender.

    A model may hide it. Then it is waited for at the end of each execution, which is right and less than it could be.
    """
    if inspect.iscoroutinefunction(getattr(model, "execute", None)):
        return True
    roots = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    return any(_mentions_sender(path) for path in _imported_files() if path.startswith(roots))


def _imported_files() -> Iterator[str]:
    """Yield the files of all modules, but for those of installed packages."""
    for module in list(sys.modules.values()):
        # Not by attribute: a lazy module would be imported by the question.
        path: Any = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str) and f"{os.sep}site-packages{os.sep}" not in path:
            yield os.path.realpath(path)


def _mentions_sender(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return _SENDER in file.read()
    except OSError:
        return True
