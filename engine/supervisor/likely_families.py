"""A guess, from file names alone, which zygotes will be needed: they are started before any configuration is read."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Collection, Iterable

from forebay.engine.backend_families import FAMILIES, FILE_HINTS


def likely_families(repositories: Iterable[str], models: Collection[str] | None = None) -> list[str]:
    """Return the families that the model files in ``repositories`` hint at, of those whose library is installed.

    Args:
        models: names of those that count; None: all do.
    """
    families: dict[str, None] = {}
    for path in repositories:
        with contextlib.suppress(OSError):
            for model in os.scandir(path):
                if models is not None and model.name not in models:
                    continue
                for name in _files_two_below(model):
                    if (family := FILE_HINTS.get(name)) is not None:
                        families[family] = None
    return [family for family in families if _is_installed(family)]


def _is_installed(family: str) -> bool:
    library = FAMILIES[family].library
    return not library or importlib.util.find_spec(library) is not None


def _files_two_below(model: os.DirEntry[str]) -> list[str]:
    """Return the names in a model's version directories."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        for version in os.scandir(model.path):
            if version.name.isdigit() and version.is_dir():
                names += os.listdir(version.path)
    return names
