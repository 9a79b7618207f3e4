"""Which GPUs this machine has, found without loading any library of theirs into the supervisor."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from forebay.engine.repository.model_config_schema import ModelConfig, enum_number
from forebay.engine.repository.normalise import Gpu

_QUERY_TIMEOUT_S = 10.0


def find_gpus(*, cpu_only: bool = False, run_query: Callable[[], str] | None = None) -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs, by device id; none if the server was told to use the CPU only (spec F-174)."""
    if cpu_only or not any(re.fullmatch(r"nvidia\d+", name) for name in _device_names()):
        return ()
    text = (run_query or _query)()
    gpus: list[Gpu] = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+\.\d+)\s*", line)
        if match is not None:
            gpus.append(Gpu(int(match[1]), float(match[2])))
    return tuple(gpus)


def _device_names() -> list[str]:
    try:
        return os.listdir("/dev")
    except OSError:
        return []


def _query() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run(
            [program, "--query-gpu=index,compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


#: Library that only a GPU build of a backend's framework has: package, path below it.
_GPU_LIBRARIES = {
    "onnxruntime": ("onnxruntime", "capi/libonnxruntime_providers_cuda.so"),
    "pytorch": ("torch", "lib/libtorch_cuda.so"),
}
_GPU_ONLY = frozenset({"tensorrt"})


def gpus_of_backend(gpus: Sequence[Gpu], config: ModelConfig) -> tuple[Gpu, ...]:
    """Return the GPUs that a model's backend can use: all if its framework was built for them, else none.

    A backend without a framework (Python models, identity) gets GPUs only where its configuration asks for them.
    """
    backend = config.backend
    if not gpus:
        return ()
    if backend in _GPU_LIBRARIES:
        package, library = _GPU_LIBRARIES[backend]
        found = importlib.util.find_spec(package)
        places = list(found.submodule_search_locations or ()) if found is not None else []
        return tuple(gpus) if any(os.path.exists(os.path.join(place, library)) for place in places) else ()
    kind_gpu = enum_number("ModelInstanceGroup.Kind", "KIND_GPU")
    wants = any(group.kind == kind_gpu for group in config.message.instance_group)
    return tuple(gpus) if wants or backend in _GPU_ONLY else ()
