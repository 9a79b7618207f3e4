"""Which backends share a zygote, and which libraries each needs. Read by the supervisor and the zygotes."""

from __future__ import annotations

import importlib.util

import msgspec


class BackendFamily(msgspec.Struct, frozen=True):
    """Backends whose workers are forked from one zygote."""

    modules: tuple[str, ...]
    """What the zygote imports, besides the worker itself."""
    library: str = ""
    """Top-level package without which the family cannot run."""
    title: str = ""
    """How the library is called in texts."""
    extra: str = ""
    """The extra of our package that installs it."""
    alternatives: tuple[str, ...] = ()
    """Packages that do as well as ``library``."""


FAMILIES: dict[str, BackendFamily] = {
    "onnxruntime": BackendFamily(("forebay.engine.backends.onnx_backend",), "onnxruntime", "ONNX Runtime"),
    "pytorch": BackendFamily(("forebay.engine.backends.torch_backend",), "torch", "PyTorch", "torch"),
    "tensorrt": BackendFamily(
        ("forebay.engine.backends.tensorrt_backend",),
        library="tensorrt",
        alternatives=("tensorrt_rtx", "tensorrt_lean"),
        title="TensorRT",
        extra="tensorrt",
    ),
    "tensorflow": BackendFamily(
        ("forebay.engine.backends.tensorflow_backend",), "tensorflow", "TensorFlow", "tensorflow"
    ),
    "openvino": BackendFamily(("forebay.engine.backends.openvino_backend",), "openvino", "OpenVINO", "openvino"),
    # Everything that needs no framework: identity, Python models (which import what they like after the fork).
    "python": BackendFamily(("forebay.engine.backends.python_backend", "forebay.engine.backends.identity_backend")),
}

#: Model files that tell which zygotes will be needed before any configuration was read.
FILE_HINTS = {
    "model.onnx": "onnxruntime",
    "model.pt": "pytorch",
    "model.pt2": "pytorch",
    "model.plan": "tensorrt",
    "model.savedmodel": "tensorflow",
    "model.xml": "openvino",
    "model.graphdef": "tensorflow",
    "model.py": "python",
}


#: Backends whose instances may share a process: what they keep for the whole of it, they keep for all of them.
SHARING_BACKENDS = frozenset({"forebay_fault", "identity", "onnxruntime", "pytorch", "tensorrt"})


def family_of(backend: str) -> str:
    """Return the family that runs a backend."""
    return backend if backend in FAMILIES else "python"


def missing_library(backend: str) -> str | None:
    """Return why a backend cannot run here and the command that mends it, or None if it can."""
    family = FAMILIES[family_of(backend)]
    libraries = (family.library, *family.alternatives)
    if not family.library or any(importlib.util.find_spec(library) is not None for library in libraries):
        return None
    what = f"forebay[{family.extra}]" if family.extra else family.library
    return f"backend '{backend}' needs {family.title}, which is not installed; install it with: pip install '{what}'"
