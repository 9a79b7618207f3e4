"""Does a model answer later than its execution returns? Asked once it is initialised, before it gets requests."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

#: What a model that answers by itself calls.
_SENDER = b"get_response_sender"


def may_answer_late(model: Any, model_path: str) -> bool:
    """Tell whether a model awaits in ``execute``, or code of its own mentions the response sender.

    A model may hide it. Then it is waited for at the end of each execution, which is right and less than it could be.
    """
    if inspect.iscoroutinefunction(getattr(model, "execute", None)):
        return True
    return any(_mentions_sender(path) for path in _own_files(model_path))


def _own_files(model_path: str) -> Iterator[str]:
    """Yield the files of the modules that were imported from the model's directory, but for installed packages."""
    folder = os.path.join(os.path.realpath(model_path), "")
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if path and os.path.realpath(path).startswith(folder) and f"{os.sep}site-packages{os.sep}" not in path:
            yield path


def _mentions_sender(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return _SENDER in file.read()
    except OSError:
        return True
