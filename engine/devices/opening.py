"""Opens a device by name; imports its library only then."""

from __future__ import annotations

import importlib
import os
import re

from forebay.engine.devices.base import Device
from forebay.ipc.errors import Unsupported

#: Tests set it to a number: the host then plays so many GPUs, from their inventory to their memory handles.
PLAYED_GPUS_VARIABLE = "FOREBAY_TEST_GPUS"


def played_gpu_count() -> int:
    """Return how many GPUs the host plays for a test; 0: GPUs are GPUs."""
    return int(os.environ.get(PLAYED_GPUS_VARIABLE, "0"))


def has_gpu_files() -> bool:
    """Whether the driver shows this machine any GPU (or, on Windows' Linux, its only device file); asks no library."""
    if played_gpu_count():
        return True
    try:
        return any(re.fullmatch(r"nvidia\d+|dxg", name) for name in os.listdir("/dev"))
    except OSError:
        return False


def open_device(kind: str, index: int = 0) -> Device:
    """Open a device for the calling thread of this process.

    Args:
        kind: ``host`` or ``cuda``.

    Raises:
        Unsupported: there is no such kind, no such device, or its library is not installed.
    """
    if kind == "cuda" and played_gpu_count():
        if not 0 <= index < played_gpu_count():
            raise Unsupported(f"there is no CUDA device {index}; this process sees {played_gpu_count()}")
        kind = "host"
    if kind == "host":
        from forebay.engine.devices.host_device import HostDevice

        return HostDevice(index)
    if kind == "cuda":
        try:
            importlib.import_module("cupy")
        except ImportError as error:
            raise Unsupported(
                f"CUDA needs the Python package 'cupy', which cannot be imported ({error}); install it with: "
                "pip install 'forebay[gpu]'"
            ) from None
        from forebay.engine.devices.cuda_device import CudaDevice

        return CudaDevice(index)
    raise Unsupported(f"there is no kind of device called '{kind}'")
