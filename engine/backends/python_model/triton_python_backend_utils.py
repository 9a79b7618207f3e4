"""What a ``model.py`` gets for ``import triton_python_backend_utils as pb_utils`` (spec section 7).

:func:`install` puts this module under that name; one worker holds one model, so module state is the model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forebay.engine.backends.base import Array
from forebay.engine.backends.python_model.engine_access import engine
from forebay.engine.backends.python_model.errors import TritonError, TritonModelException
from forebay.engine.backends.python_model.logger import Logger
from forebay.engine.backends.python_model.metric_family import Metric, MetricFamily
from forebay.engine.backends.python_model.model_config import ModelConfig
from forebay.engine.backends.python_model.nested_responses import ResponseIterator
from forebay.engine.backends.python_model.numpy_types import (
    TRITON_STRING_TO_NUMPY,
    numpy_to_triton_type,
    triton_string_to_numpy,
    triton_to_numpy_type,
)
from forebay.engine.backends.python_model.request import (
    MEMORY_CPU,
    MEMORY_GPU,
    RELEASE_ALL,
    RELEASE_RESCHEDULE,
    SEQUENCE_END,
    SEQUENCE_START,
    InferenceRequest,
    InferenceTrace,
    PreferredMemory,
)
from forebay.engine.backends.python_model.response import COMPLETE_FINAL, InferenceResponse, InferenceResponseSender
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.errors import InvalidArgument, ServingError
from forebay.ipc.tensor import datatype_of, decode_bytes, encode_bytes, iter_bytes_elements

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = SEQUENCE_START
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = SEQUENCE_END
TRITONSERVER_RESPONSE_COMPLETE_FINAL = COMPLETE_FINAL
TRITONSERVER_REQUEST_RELEASE_ALL = RELEASE_ALL
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = RELEASE_RESCHEDULE
TRITONSERVER_MEMORY_CPU = MEMORY_CPU
TRITONSERVER_MEMORY_GPU = MEMORY_GPU

#: The name that models import.
MODULE_NAME = "triton_python_backend_utils"
#: The name of what in Triton is compiled.
_COMPILED_NAME = "c_python_backend_utils"

_model_dir = ""


def install(model_dir: str) -> None:
    """Make this module importable under Triton's name.

    Args:
        model_dir: directory of the model's version.
    """
    global _model_dir
    _model_dir = model_dir
    sys.modules[MODULE_NAME] = sys.modules[__name__]
    # Triton's module re-exports a C++ one, which some models import by its own name; errors show types as its.
    sys.modules[_COMPILED_NAME] = sys.modules[__name__]
    for kind in (
        InferenceRequest,
        InferenceResponse,
        InferenceResponseSender,
        Logger,
        MetricFamily,
        Tensor,
        TritonError,
    ):
        kind.__module__ = _COMPILED_NAME


# --- tensors ---


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    """Return the request's input called ``name``, or None."""
    for tensor in inference_request.inputs():
        if tensor.name() == name:
            return tensor
    return None


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    """Return the response's output called ``name``, or None.

    Raises:
        TritonModelException: the response is an error.
    """
    error = inference_response.error()
    if error is not None:
        raise TritonModelException(error.message())
    for tensor in inference_response.output_tensors():
        if tensor.name() == name:
            return tensor
    return None


def empty(inference_request: InferenceRequest, shape: Sequence[int], dtype: Any) -> Array:
    """Return an uninitialised array for an output of this request, in the client's reply block where it has room.

    An extension of ours: ``Tensor("OUT", array)`` of it is answered without a copy.

    Args:
        dtype: any numpy dtype of fixed size.
    """
    kind: np.dtype[np.generic] = np.dtype(dtype)
    datatype = datatype_of(np.empty(0, kind))
    if datatype == "BYTES":
        raise TritonModelException("pb_utils.empty is for datatypes of fixed size, not for strings")
    return inference_request.source.lend_array(datatype, tuple(int(dim) for dim in shape))


def serialize_byte_tensor(input_tensor: Array) -> bytes | tuple[()] | None:
    """Return the bytes of a BYTES tensor (spec D-004); as in Triton, nothing of an empty one, and None of others."""
    if input_tensor.size == 0:
        return ()
    return encode_bytes(input_tensor) if input_tensor.dtype.kind in "OS" else None


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Array:
    """Return the elements of a serialised BYTES tensor as a flat object array of ``bytes``."""
    buffer = memoryview(encoded_tensor)
    try:
        count = sum(1 for _element in iter_bytes_elements(buffer))
        return decode_bytes(buffer, (count,))
    except InvalidArgument as error:
        raise TritonModelException(str(error)) from None


# --- configuration ---


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the configuration of an input, or None; ``model_config`` is the parsed JSON of ``initialize``."""
    return next((tensor for tensor in model_config.get("input", ()) if tensor["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the configuration of an output, or None."""
    return next((tensor for tensor in model_config.get("output", ()) if tensor["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Return whether the model is decoupled."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def get_model_dir() -> str:
    """Return the directory of the model's version."""
    return _model_dir


# --- model control ---


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
    """Load or reload a model; only in explicit mode.

    Args:
        config: JSON that replaces the model's configuration; empty: the one on disk.
        files: ``file:<version>/<name>`` to content.

    Raises:
        TritonModelException: why it failed.
    """
    contents = {key.removeprefix("file:"): value for key, value in (files or {}).items()}
    try:
        engine().load_model(model_name, config, contents)
    except ServingError as error:
        raise TritonModelException(f"Failed to load model: {error.text}") from None


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Unload a model; only in explicit mode.

    Raises:
        TritonModelException: why it failed.
    """
    try:
        engine().unload_model(model_name, unload_dependents=unload_dependents)
    except ServingError as error:
        raise TritonModelException(f"Failed to unload model: {error.text}") from None


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    """Return whether a model (version) takes requests.

    Raises:
        TritonModelException: it cannot be told.
    """
    try:
        return engine().is_model_ready(model_name, model_version)
    except ServingError as error:
        raise TritonModelException(f"Failed to ask for model '{model_name}': {error.text}") from None


__all__ = [
    "TRITONSERVER_MEMORY_CPU",
    "TRITONSERVER_MEMORY_GPU",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START",
    "TRITONSERVER_REQUEST_RELEASE_ALL",
    "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE",
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL",
    "TRITON_STRING_TO_NUMPY",
    "InferenceRequest",
    "InferenceResponse",
    "InferenceResponseSender",
    "InferenceTrace",
    "Logger",
    "Metric",
    "MetricFamily",
    "ModelConfig",
    "PreferredMemory",
    "ResponseIterator",
    "Tensor",
    "TritonError",
    "TritonModelException",
    "deserialize_bytes_tensor",
    "empty",
    "get_input_config_by_name",
    "get_input_tensor_by_name",
    "get_model_dir",
    "get_output_config_by_name",
    "get_output_tensor_by_name",
    "install",
    "is_model_ready",
    "load_model",
    "numpy_to_triton_type",
    "serialize_byte_tensor",
    "triton_string_to_numpy",
    "triton_to_numpy_type",
    "unload_model",
    "using_decoupled_model_transaction_policy",
]
