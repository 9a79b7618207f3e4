"""DLPack capsules over memory that numpy may not touch: taken and given by way of numpy arrays that nobody reads.

A capsule holds a ``DLManagedTensor``: data pointer, device, rank, type, and where shape and strides are. Numpy takes
and makes such capsules for host memory, and looks only at these fields. So device and type are changed to what numpy
knows before it takes a capsule, and back in a capsule that it has made.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from forebay.engine.backends.base import Array

#: DLPack's device types: host memory, a GPU's, and page-locked host memory.
CPU, CUDA, CUDA_HOST = 1, 2, 3

#: DLPack's type codes of unsigned integers and of bfloat16, which numpy does not have.
_UNSIGNED, _BFLOAT = 1, 4

#: Where an unversioned tensor's device type, device number and type code are, in bytes.
_DEVICE_TYPE, _DEVICE_ID, _TYPE_CODE = 8, 12, 20

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def device_of(capsule: Any) -> tuple[int, int]:
    """Return device type and number of a capsule's memory.

    Raises:
        ValueError: it is no capsule, or was taken before.
    """
    address = _address(capsule)
    return _int32(address + _DEVICE_TYPE).value, _int32(address + _DEVICE_ID).value


def take(capsule: Any) -> tuple[Array, bool]:
    """Take a capsule's memory over, wherever it is.

    Returns:
        An array that owns it and that only the host's memory may be read through; bfloat16 as uint16. And whether it is
        bfloat16.

    Raises:
        BufferError, RuntimeError, TypeError, ValueError: numpy's reasons not to.
    """
    address = _address(capsule)
    device, code = _int32(address + _DEVICE_TYPE), ctypes.c_uint8.from_address(address + _TYPE_CODE)
    former_device, former_code = device.value, code.value
    is_bfloat = former_code == _BFLOAT
    device.value = CPU
    if is_bfloat:
        code.value = _UNSIGNED
    try:
        array: Array = np.from_dlpack(_Capsule(capsule))
    finally:
        # Whoever made it finds it as it was.
        device.value, code.value = former_device, former_code
    return array, is_bfloat


def give(array: Array, *, is_bfloat: bool = False, device_id: int = -1) -> Any:
    """Return a capsule over an array's memory, which it keeps alive.

    Args:
        is_bfloat: the array's uint16 are bfloat16.
        device_id: of the GPU that the array's addresses are of; -1: it is in host memory.
    """
    exported: Any = array
    # DLPack's first version cannot say "read-only", so numpy would refuse.
    capsule: Any = (exported if array.flags.writeable else np.asarray(_Writable(exported))).__dlpack__()
    address = _address(capsule)
    if is_bfloat:
        ctypes.c_uint8.from_address(address + _TYPE_CODE).value = _BFLOAT
    if device_id >= 0:
        _int32(address + _DEVICE_TYPE).value = CUDA
        _int32(address + _DEVICE_ID).value = device_id
    return capsule


def array_at(address: int, shape: tuple[int, ...], dtype: np.dtype[np.generic], owner: object) -> Array:
    """Return an array over memory at an address, which ``owner`` keeps. Nothing is read here."""
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    raw = (ctypes.c_char * size).from_address(address)
    # numpy keeps the exporter of its bytes alive, and that keeps what hangs on it.
    raw.owner = owner  # type: ignore[attr-defined]
    return np.frombuffer(memoryview(raw), dtype).reshape(shape)


def _address(capsule: Any) -> int:
    return int(_capsule_pointer(capsule, b"dltensor"))


def _int32(address: int) -> ctypes.c_int32:
    return ctypes.c_int32.from_address(address)


class _Capsule:
    """Hands a bare capsule to ``np.from_dlpack``."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


class _Writable:
    """Another array's memory without its read-only flag; keeps the array alive."""

    def __init__(self, array: Any) -> None:
        self._array = array
        interface: dict[str, Any] = dict(array.__array_interface__)
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
