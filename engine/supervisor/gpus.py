"""Which GPUs this machine has, found without loading any library of theirs into the supervisor."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from forebay.engine.devices.memory_limit import LIMIT_KEY, PINNED_KEY
from forebay.engine.devices.opening import has_gpu_files, played_gpu_count
from forebay.engine.repository.model_config_schema import ModelConfig, enum_number
from forebay.engine.repository.normalise import Gpu
from forebay.engine.settings import Settings

_QUERY_TIMEOUT_S = 10.0

_VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"

_LINE = re.compile(r"\s*(\d+)\s*,\s*(\S+)\s*,\s*(\d+\.\d+)\s*")


def find_gpus(*, cpu_only: bool = False, run_query: Callable[[], str] | None = None) -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that CUDA will show to our workers, by the ids that they have there.

    None if the server was told to use the CPU only (spec F-174).
    """
    if cpu_only:
        return ()
    if played := played_gpu_count():
        return tuple(Gpu(index, 9.0, f"GPU-played-{index}") for index in range(played))
    if not has_gpu_files():
        return ()
    return visible_gpus((run_query or _query)(), os.environ.get(_VISIBLE_VARIABLE))


def visible_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs of a listing, numbered as CUDA numbers them.

    Args:
        listing: lines of ``index, uuid, compute capability``.
        visible: ``CUDA_VISIBLE_DEVICES``: indices, or beginnings of UUIDs, of which the first that is no device ends
            the list; None: all.
    """
    found = [(match[1], match[2], float(match[3])) for match in map(_LINE.fullmatch, listing.splitlines()) if match]
    if visible is None:
        return tuple(Gpu(int(index), capability, uuid) for index, uuid, capability in found)
    gpus: list[Gpu] = []
    for wanted in map(str.strip, visible.split(",")):
        # A slice of a GPU (MIG) has a UUID of its own, and what nvidia-smi says of the whole.
        slice_of = found[:1] if wanted.startswith("MIG-") else []
        chosen = [gpu for gpu in found if wanted and (gpu[0] == wanted or gpu[1].startswith(wanted))] or slice_of
        if not chosen:
            break
        gpus.append(Gpu(len(gpus), chosen[0][2], wanted if slice_of else chosen[0][1]))
        if slice_of:
            # CUDA shows a process one slice at most, whatever else is listed.
            break
    return tuple(gpus)


def _query() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run(
            [program, "--query-gpu=index,uuid,compute_cap", "--format=csv,noheader"],
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
    kind_gpu = enum_number("ModelInstanceGroup.Kind", "KIND_GPU")
    wants = any(group.kind == kind_gpu for group in config.message.instance_group)
    if backend in _GPU_LIBRARIES and not played_gpu_count():
        package, library = _GPU_LIBRARIES[backend]
        found = importlib.util.find_spec(package)
        places = list(found.submodule_search_locations or ()) if found is not None else []
        return tuple(gpus) if any(os.path.exists(os.path.join(place, library)) for place in places) else ()
    return tuple(gpus) if wants or backend in _GPU_ONLY else ()


def device_extra(settings: Settings, kind: str, device_id: int) -> dict[str, float]:
    """Return what the worker of an instance on a GPU is told of its device, for ``InstanceSpec.extra``."""
    if kind != "GPU":
        return {}
    limits = {limit.device: limit.fraction for limit in settings.gpu.model_load_limits}
    extra: dict[str, float] = {PINNED_KEY: settings.memory.pinned_pool_byte_size}
    if device_id in limits:
        extra[LIMIT_KEY] = limits[device_id]
    return extra
