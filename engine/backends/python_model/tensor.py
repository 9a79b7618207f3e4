"""``pb_utils.Tensor``: a named array, over shared memory where it is an input (spec 7.3)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from forebay.engine.backends.base import Array
from forebay.engine.backends.python_model.errors import TritonModelException
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import BY_CONFIG_NAME, DATATYPES, datatype_of

#: DLPack's device type of host memory, and its codes of unsigned integers and of bfloat16.
_DLPACK_CPU = 1
_DLPACK_UNSIGNED = 1
_DLPACK_BFLOAT = 4
#: Where the type code of an unversioned DLTensor lies: data 8, device 8, ndim 4 bytes before it.
_DLPACK_TYPE_CODE_OFFSET = 20

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class Tensor:
    """A tensor as a model sees it. Inputs are views of the request's memory: treat them as read-only."""

    __slots__ = ("_array", "_datatype", "_load", "_name", "_raw", "_shape")

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
        typed = cast("Array", array)
        try:
            datatype = datatype_of(typed)
        except InvalidArgument as error:
            raise TritonModelException(f"Tensor '{name}': {error}") from None
        # ascontiguousarray would make a scalar one-dimensional.
        self._set(name, datatype, np.asarray(typed, order="C"))

    def _set(self, name: str, datatype: str, array: Array | None) -> None:
        self._name = name
        self._datatype = datatype
        self._array = array
        self._shape: tuple[int, ...] = () if array is None else tuple(array.shape)
        self._raw: memoryview | None = None
        self._load: Callable[[], Array] | None = None

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
        """Return whether the tensor is in host memory; here it always is."""
        return True

    def as_numpy(self) -> Array:
        """Return the array, without a copy; BYTES as an object array of ``bytes``.

        Raises:
            TritonModelException: BF16, for which numpy has no type (spec P-052).
        """
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
        array: Any = self.data
        # DLPack's first version cannot say "read-only", so numpy would refuse.
        capsule: Any = (array if array.flags.writeable else np.asarray(_Writable(array))).__dlpack__()
        if self._datatype == "BF16":
            # numpy exported 16-bit unsigned integers; only the type code differs.
            _set_type_code(capsule, _DLPACK_BFLOAT)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CPU, 0

    @staticmethod
    def from_dlpack(name: str, obj: Any) -> Tensor:
        """Return a tensor over another library's memory.

        Args:
            obj: a DLPack capsule, or anything with ``__dlpack__``. What is in GPU memory is copied to the host.

        Raises:
            TritonModelException: the memory is not contiguous, or its type has no datatype.
        """
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        if hasattr(obj, "__dlpack_device__"):
            device = int(obj.__dlpack_device__()[0])
            if device != _DLPACK_CPU:
                obj = _to_host(obj)
            capsule = obj.__dlpack__()
        else:
            capsule = obj
        try:
            is_bfloat = _type_code(capsule) == _DLPACK_BFLOAT
            if is_bfloat:
                _set_type_code(capsule, _DLPACK_UNSIGNED)
            array: Array = np.from_dlpack(_Capsule(capsule))
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TritonModelException(f"DLPack tensor cannot be used: {error}") from None
        if not array.flags.c_contiguous:
            raise TritonModelException(
                "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are "
                "supported."
            )
        return Tensor.of_datatype(name, "BF16" if is_bfloat else datatype_of(array), array)

    # --- for the backend ---

    @property
    def datatype(self) -> str:
        """Protocol name of the datatype."""
        return self._datatype

    @property
    def data(self) -> Array:
        """The array; BF16 as uint16."""
        if self._array is None:
            assert self._load is not None
            self._array = self._load()
        return self._array

    @property
    def raw(self) -> memoryview | None:
        """The serialised bytes, if they exist already and nobody has had the chance to change the decoded array."""
        return self._raw if self._array is None else None

    def __repr__(self) -> str:
        return f"Tensor({self._name!r}, {self._datatype}, {list(self._shape)})"


class _Capsule:
    """Hands a bare capsule to ``np.from_dlpack``."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CPU, 0


class _Writable:
    """Another array's memory without its read-only flag; keeps the array alive."""

    def __init__(self, array: Any) -> None:
        self._array = array
        interface: dict[str, Any] = dict(array.__array_interface__)
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _type_code_cell(capsule: Any) -> ctypes.c_uint8:
    address: int = _capsule_pointer(capsule, b"dltensor")
    return ctypes.c_uint8.from_address(address + _DLPACK_TYPE_CODE_OFFSET)


def _type_code(capsule: Any) -> int:
    return int(_type_code_cell(capsule).value)


def _set_type_code(capsule: Any, code: int) -> None:
    _type_code_cell(capsule).value = code


def _to_host(obj: Any) -> Any:
    # PyTorch and TensorFlow say cpu(), CuPy says get(); whoever owns device memory knows how to copy it.
    for method in ("cpu", "get"):
        if hasattr(obj, method):
            return getattr(obj, method)()
    raise TritonModelException("Tensor is stored in GPU and its library offers neither cpu() nor get().")


# --- datatypes (spec P-113, P-114) ---


def triton_to_numpy_type(data_type: int) -> Any:
    """Return the numpy type of a datatype number (spec D-002)."""
    for row in DATATYPES.values():
        if row.number == data_type and row.name != "BF16":
            return np.object_ if row.name == "BYTES" else row.numpy_dtype.type
    raise TritonModelException(f"datatype {data_type} has no numpy type")


def numpy_to_triton_type(data_type: Any) -> int:
    """Return the datatype number of a numpy type."""
    try:
        return DATATYPES[datatype_of(np.empty(0, np.dtype(data_type)))].number
    except (InvalidArgument, TypeError) as error:
        raise TritonModelException(f"numpy type {data_type} has no datatype: {error}") from None


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """Return the numpy type of ``TYPE_*``."""
    row = BY_CONFIG_NAME.get(triton_type_string)
    if row is None or row.name == "BF16":
        raise TritonModelException(f"datatype {triton_type_string} has no numpy type")
    return np.object_ if row.name == "BYTES" else row.numpy_dtype.type
