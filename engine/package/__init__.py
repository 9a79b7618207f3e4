"""What ``import forebay`` gives besides its subpackages: ``@forebay.model``, which makes a function a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.engine.model_functions import model

__all__ = ["model"]


def __getattr__(name: str) -> object:
    """Import only what is asked for: every process of the server comes past here."""
    if name != "model":
        raise AttributeError(f"module 'forebay' has no attribute {name!r}")
    from forebay.engine.model_functions import model

    return model
