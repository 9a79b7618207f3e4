"""What runs a model: a backend of ours, or a ``model.py`` that is a backend for any number of models (spec P-134).

Pure file code; calls may come from any thread.
"""

from __future__ import annotations

import os

import msgspec

from forebay.engine.backends.base import BACKEND_MODULES, unknown_backend
from forebay.engine.repository.beneath import Beneath, Refused, check_name
from forebay.ipc.errors import NotFound

#: The file that makes a directory a Python based backend.
BACKEND_FILE = "model.py"

#: What runs such a file.
_PYTHON = "python"


class ModelRuntime(msgspec.Struct, frozen=True):
    """A backend's name among ours, and what it is to run beside the model's own files."""

    backend: str
    backend_file: str = ""
    """Path of a Python based backend's ``model.py``; empty for all others."""


def find_runtime(backend: str, backend_directory: str) -> ModelRuntime:
    """Return what runs a model whose configuration names ``backend``.

    What is not ours is looked for as Triton does (spec R-044), in ``<backend_directory>/<backend>``: a ``model.py``
    among a model's own files is no backend. Libraries are not looked for: C backends cannot be loaded (spec B-086).

    Raises:
        InvalidArgument: there is no such backend; the text is Triton's.
    """
    if backend in BACKEND_MODULES:
        return ModelRuntime(backend)
    if (path := _installed(backend, backend_directory)) is not None:
        return ModelRuntime(_PYTHON, path)
    raise unknown_backend(backend)


def _installed(backend: str, directory: str) -> str | None:
    """Return the file of a backend in the backend directory; None: there is none."""
    try:
        check_name(backend, "backend name")
        with Beneath(os.path.join(directory, backend)) as root:
            return root.real_path((BACKEND_FILE,)) if root.is_file((BACKEND_FILE,)) else None
    except (NotFound, Refused):
        return None
