"""Between numpy arrays and PyTorch's tensors, and what clients are told when a model went wrong."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from forebay.engine.backends.base import Array
from forebay.engine.backends.torch_library import Tensor, torch
from forebay.ipc.errors import BackendFailed, InvalidArgument

#: Source locations in TorchScript's error texts; only the file's name is for clients.
_TRACEBACK_FILE = re.compile(r'File "[^"]*/([^"/]*)"')

OUTPUT_KIND_TEXT = (
    "output must be of type Tensor, List[str] or Tuple containing one of these two types. "
    "It should not be a List / Dictionary of Tensors or a Scalar"
)

_DATA_TYPES: dict[Any, str] = {
    torch.bool: "TYPE_BOOL",
    torch.uint8: "TYPE_UINT8",
    torch.int8: "TYPE_INT8",
    torch.int16: "TYPE_INT16",
    torch.int32: "TYPE_INT32",
    torch.int64: "TYPE_INT64",
    torch.float16: "TYPE_FP16",
    torch.float32: "TYPE_FP32",
    torch.float64: "TYPE_FP64",
    torch.bfloat16: "TYPE_BF16",
}


def to_tensor(array: Array, datatype: str) -> Tensor:
    """Return a CPU tensor over the array's memory; BF16 arrives as uint16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if datatype == "BF16" else tensor


def to_array(tensor: Tensor) -> Array:
    """Return a C-contiguous numpy array, over the tensor's memory where that is possible; BF16 as uint16."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        plain = plain.view(torch.uint16)
    array: Array = plain.numpy()
    return array


def to_strings(array: Array, name: str) -> list[str]:
    """Return the elements as ``str``, for a ``List[str]`` argument.

    Raises:
        InvalidArgument: an element is not UTF-8.
    """
    try:
        return [
            element.decode() if isinstance(element, bytes) else str(element) for element in array.reshape(-1).tolist()
        ]
    except UnicodeDecodeError:
        raise InvalidArgument(f"input '{name}' has an element that is not UTF-8, but PyTorch takes only text") from None


def execution_error(error: Exception) -> BackendFailed:
    """Return what a client is told when the model raised (spec B-049), without directories of any machine."""
    text = _TRACEBACK_FILE.sub(r'File "\1"', str(error))
    return BackendFailed(f"PyTorch execute failure: {text}")


def flatten_result(result: Any) -> list[Any]:
    """Return a model's results as a list (spec B-043).

    Raises:
        BackendFailed: the result is of a kind that has no positions.
    """
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple):
        items: list[Any] = [*result]
        if not all(isinstance(item, torch.Tensor) or is_strings(item) for item in items):
            raise BackendFailed(OUTPUT_KIND_TEXT)
        return items
    if is_strings(result):
        return [result]
    raise BackendFailed(OUTPUT_KIND_TEXT)


def is_strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)  # pyright: ignore[reportUnknownVariableType]


def unexpected_output(name: str, value: Any, target: Tensor) -> BackendFailed | InvalidArgument:
    expected = f"{data_type(target.dtype)} {list(target.shape)}"
    if not isinstance(value, torch.Tensor):
        return BackendFailed(
            f"the model produced strings for output '{name}', but its configuration promises {expected}"
        )
    if value.dim() == 0:
        return InvalidArgument(f"output '{name}' is a scalar which is not supported.")
    return BackendFailed(
        f"the model produced output '{name}' as {data_type(value.dtype)} {list(value.shape)}, "
        f"but its configuration promises {expected}"
    )


def data_type(dtype: Any) -> str:
    return _DATA_TYPES.get(dtype, str(dtype).replace("torch.", "TYPE_").upper())
