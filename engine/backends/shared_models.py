"""Loaded models that all instances of a process use (``--instances-per-process``). Worker processes.

A process serves one version of one model and ends with it, so nothing is ever taken out again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

_Model = TypeVar("_Model")

_models: dict[Hashable, object] = {}
_lock = threading.Lock()


def shared(key: Hashable, load: Callable[[], _Model]) -> _Model:
    """Return what was loaded for this key, or load it; others that want it wait meanwhile.

    Args:
        key: of everything that the model depends on. Begins with the backend's name.
        load: returns a model that several threads may use at the same time; what it raises is raised here.
    """
    with _lock:
        if key not in _models:
            _models[key] = load()
        return _models[key]  # type: ignore[return-value]
