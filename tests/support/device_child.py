"""What a second process does with exported device memory; a spawn target, so it lies where children can import it."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebay.engine.devices.base import HANDLE_BYTES, DeviceError
from forebay.engine.devices.opening import open_device


def double_and_refuse(kind: str, handle: bytes, byte_size: int, wrong_size: int, answers: Any) -> None:
    """Double each float32 of the memory; then try handles and sizes that lead nowhere, and send what came of each."""
    device = open_device(kind)
    numbers = np.empty(byte_size // 4, np.float32)
    with device.make_stream() as stream, device.open_memory(handle, byte_size) as memory:
        stream.copy_out(numbers.ctypes.data, memory.address, byte_size)
        stream.synchronize()
        numbers *= 2
        stream.copy_in(memory.address, numbers.ctypes.data, byte_size)
        stream.synchronize()
    for bad, size in ((handle, wrong_size), (bytes(HANDLE_BYTES), 4), (b"short", 4)):
        try:
            device.open_memory(bad, size)
        except DeviceError as error:
            answers.put(str(error))
        else:
            answers.put("opened")
