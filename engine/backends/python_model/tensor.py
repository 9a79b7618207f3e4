"""``pb_utils.Tensor``: a named array, over shared memory where it is an input, or in the memory of a GPU (spec 7.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forebay.engine.backends.base import Array
from forebay.engine.backends.python_model import dlpack
from forebay.engine.backends.python_model.errors import TritonModelException
from forebay.engine.backends.python_model.gpus import Gpu, gpus
from forebay.engine.devices.device_array import DeviceArray
from forebay.ipc.errors import InvalidArgument, ServingError
from forebay.ipc.tensor import DATATYPES, datatype_of

#: See :attr:`Tensor.facts`.
Facts = tuple[str, str, tuple[int, ...], int, bool]


class Tensor:
    """A tensor as a model sees it. Inputs are views of the request's memory: treat them as read-only."""

    __slots__ = ("_array", "_datatype", "_device", "_gpu", "_load", "_name", "_raw", "_shape")

    def __init__(self, name: str, array: Any) -> None:
        """Make an output (or an input of a nested call).

        Args:
            array: numpy array of any supported dtype; ``object`` (of ``str`` or ``bytes``), ``S`` and ``U`` are BYTES.

        Raises:
            TritonModelException: the name is empty or the dtype has no datatype.
        """
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        if not isinstance(array, np.ndarray):
            raise TritonModelException(f"Tensor '{name}' needs a numpy array, got {type(array).__name__}")
        # ascontiguousarray would make a scalar one-dimensional.
        typed: Array = np.asarray(array, order="C")  # pyright: ignore[reportUnknownArgumentType]  # any dtype
        try:
            datatype = datatype_of(typed)
        except InvalidArgument:
            raise TritonModelException("NumPy dtype is not supported.") from None
        self._set(name, datatype, typed)

    def _set(self, name: str, datatype: str, array: Array | None) -> None:
        self._name = name
        self._datatype = datatype
        self._array = array
        self._shape: tuple[int, ...] = () if array is None else array.shape
        self._raw: memoryview | None = None
        self._load: Callable[[], Array] | None = None
        self._gpu: Gpu | None = None
        self._device: DeviceArray | None = None

    @classmethod
    def view(
        cls,
        name: str,
        datatype: str,
        shape: tuple[int, ...],
        load: Callable[[], Array],
        raw: memoryview | None = None,
    ) -> Tensor:
        """Return a tensor whose array is made when it is first asked for.

        Args:
            load: returns the array; BF16 as uint16.
            raw: the same bytes as they lie in shared memory, for passing on without decoding.
        """
        tensor = cls.__new__(cls)
        tensor._set(name, datatype, None)
        tensor._shape = shape
        tensor._load = load
        tensor._raw = raw
        return tensor

    @classmethod
    def of_datatype(cls, name: str, datatype: str, array: Array) -> Tensor:
        """Return a tensor over an array whose dtype does not tell its datatype (BF16 as uint16)."""
        tensor = cls.__new__(cls)
        tensor._set(name, datatype, array)
        return tensor

    @classmethod
    def on_gpu(cls, name: str, datatype: str, array: DeviceArray, gpu: Gpu) -> Tensor:
        """Return a tensor in the memory of a GPU; all work on it is done."""
        tensor = cls.__new__(cls)
        tensor._set(name, datatype, None)
        tensor._shape = array.shape
        tensor._gpu = gpu
        tensor._device = array
        return tensor

    # --- Triton's methods ---

    def name(self) -> str:
        """Return the name."""
        return self._name

    def shape(self) -> list[int]:
        """Return the full shape, batch dimension included."""
        return list(self._shape)

    def triton_dtype(self) -> int:
        """Return the number of the datatype (spec D-002)."""
        return DATATYPES[self._datatype].number

    def is_cpu(self) -> bool:
        """Return whether the tensor is in host memory."""
        return self._device is None

    def as_numpy(self) -> Array:
        """Return the array, without a copy; BYTES as an object array of ``bytes``.

        Raises:
            TritonModelException: it is in the memory of a GPU, or BF16, for which numpy has no type (spec P-052).
        """
        if self._device is not None:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        if self._datatype == "BF16":
            raise TritonModelException(
                "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
            )
        return self.data

    def to_dlpack(self) -> Any:
        """Return a DLPack capsule over the tensor's memory.

        Raises:
            TritonModelException: the tensor holds strings.
        """
        return self.__dlpack__()

    def __dlpack__(self, **_options: Any) -> Any:
        if self._datatype == "BYTES":
            raise TritonModelException("DLPack does not have support for string tensors.")
        is_bfloat = self._datatype == "BF16"
        if self._device is None or self._gpu is None:
            return dlpack.give(self.data, is_bfloat=is_bfloat)
        # Nothing is under way on the device, so no stream has to wait.
        device = self._device
        array = dlpack.array_at(device.address, device.shape, device.dtype, device)
        return dlpack.give(array, is_bfloat=is_bfloat, device_id=self._gpu.index)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CPU, 0) if self._gpu is None else (dlpack.CUDA, self._gpu.index)

    @staticmethod
    def from_dlpack(name: str, obj: Any) -> Tensor:
        """Return a tensor over another library's memory.

        Args:
            obj: a DLPack capsule, or anything with ``__dlpack__``. What is in GPU memory stays there, if this process
                can use the GPU; else it is copied to the host.

        Raises:
            TritonModelException: the memory is not contiguous, or its type has no datatype.
        """
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        try:
            capsule, gpu = _capsule_of(obj) if hasattr(obj, "__dlpack_device__") else (obj, _gpu_of(obj))
            array, is_bfloat = dlpack.take(capsule)
        except (BufferError, RuntimeError, TypeError, ValueError, ServingError) as error:
            raise TritonModelException(f"DLPack tensor cannot be used: {error}") from None
        if not array.flags.c_contiguous:
            raise TritonModelException(
                "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are "
                "supported."
            )
        datatype = "BF16" if is_bfloat else datatype_of(array)
        if gpu is None:
            return Tensor.of_datatype(name, datatype, array)
        return Tensor.on_gpu(name, datatype, DeviceArray(array.ctypes.data, array.shape, array.dtype, array), gpu)

    # --- for the backend ---

    @property
    def facts(self) -> Facts:
        """Name, datatype, shape, bytes, of which BYTES have 0, and whether it is in the memory of a GPU."""
        datatype, device = self._datatype, self._device
        array = device or self.data
        return self._name, datatype, array.shape, 0 if datatype == "BYTES" else array.nbytes, device is not None

    @property
    def datatype(self) -> str:
        """Protocol name of the datatype."""
        return self._datatype

    @property
    def data(self) -> Array:
        """The array on the host; BF16 as uint16. What is on a GPU is copied."""
        if self._device is not None:
            array = np.empty(self._device.shape, self._device.dtype)
            self.copy_to(array)
            return array
        if self._array is None:
            assert self._load is not None
            self._array = self._load()
        return self._array

    @property
    def raw(self) -> memoryview | None:
        """The serialised bytes, if they exist already and nobody has had the chance to change the decoded array."""
        return self._raw if self._array is None else None

    @property
    def device(self) -> DeviceArray | None:
        """Where it is on its GPU; None: it is on the host."""
        return self._device

    @property
    def gpu(self) -> Gpu | None:
        """The GPU in whose memory it is; None: it is on the host."""
        return self._gpu

    def copy_to(self, target: Array) -> None:
        """Copy it to an array on the host of the same shape and type, C-contiguous."""
        if self._device is None or self._gpu is None:
            np.copyto(target, self.data)
        else:
            self._gpu.fetch(self._device, target)

    def __repr__(self) -> str:
        return f"Tensor({self._name!r}, {self._datatype}, {list(self._shape)})"


def _capsule_of(obj: Any) -> tuple[Any, Gpu | None]:
    """Return a capsule over another library's tensor, and the GPU that it is on, where all work on it is done."""
    kind, index = (int(part) for part in obj.__dlpack_device__())
    if kind in (dlpack.CPU, dlpack.CUDA_HOST):
        return obj.__dlpack__(), None
    gpu = gpus.find(index) if kind == dlpack.CUDA else None
    if gpu is None:
        return _to_host(obj).__dlpack__(), None
    capsule = obj.__dlpack__(stream=gpu.stream_handle or None)
    gpu.wait()
    return capsule, gpu


def _gpu_of(capsule: Any) -> Gpu | None:
    """Return the GPU that a bare capsule's tensor is on, once what its library does there by default is done.

    Raises:
        ValueError: this process cannot use it, and nobody can copy from there but the library.
    """
    kind, index = dlpack.device_of(capsule)
    if kind in (dlpack.CPU, dlpack.CUDA_HOST):
        return None
    gpu = gpus.find(index) if kind == dlpack.CUDA else None
    if gpu is None:
        raise ValueError(f"it is on a device (type {kind}, number {index}) that cannot be used here")
    gpu.device.wait_default_stream()
    return gpu


def _to_host(obj: Any) -> Any:
    # PyTorch and TensorFlow say cpu(), CuPy says get(); whoever owns device memory knows how to copy it.
    for method in ("cpu", "get"):
        if hasattr(obj, method):
            return getattr(obj, method)()
    raise TritonModelException("Tensor is stored in GPU and its library offers neither cpu() nor get().")
