"""Opens a device by name; imports its library only then."""

from __future__ import annotations

import importlib

from forebay.engine.devices.base import Device
from forebay.ipc.errors import Unsupported


def open_device(kind: str, index: int = 0) -> Device:
    """Open a device for this process.

    Args:
        kind: ``host`` or ``cuda``.

    Raises:
        Unsupported: there is no such kind, no such device, or its library is not installed.
    """
    if kind == "host":
        from forebay.engine.devices.host_device import HostDevice

        return HostDevice()
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
