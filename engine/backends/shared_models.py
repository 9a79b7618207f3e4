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


def _always(_model: object) -> bool:
    return True


def shared(key: Hashable, load: Callable[[], _Model], *, may_share: Callable[[_Model], bool] = _always) -> _Model:
    """Return what was loaded for this key, or load it; others that want it wait meanwhile.

    Args:
        key: of everything that the model depends on. Begins with the backend's name.
        load: returns a model that several threads may use at the same time; what it raises is raised here.
        may_share: says no of a model that only its caller may use.
    """
    with _lock:
        if key in _models:
            return _models[key]  # type: ignore[return-value]
        model = load()
        if may_share(model):
            _models[key] = model
        return model
