"""Plain Python functions as models: declare one with :func:`model`, serve it with ``forebay serve module:function``.

    import forebay

    @forebay.model(inputs={"features": "FP32[50]"}, outputs={"score": "FP32[1]"}, max_batch_size=64)
    def score(features):
        return features.mean(axis=1, keepdims=True)

Inputs arrive by keyword as numpy arrays, ``[rows, *dims]`` where the model batches, else ``dims``; BYTES elements are
``bytes``. The function returns one array, a tuple in the order of ``outputs``, or a mapping. A class may be declared
instead: each instance of the model makes one object and calls that, so that weights are read once, in ``__init__``.
The decorated object stays what it is and can be called and tested like any other.

This module needs numpy and the standard library only.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np

from forebay.ipc.tensor import DATATYPES

#: Where :func:`model` leaves a :class:`ModelFunction`.
ATTRIBUTE = "__forebay_model__"

#: The output's name if the return annotation is an array.
SINGLE_OUTPUT = "output"

_SPEC_TEXT = re.compile(r"^\s*([A-Z]+[0-9]*)\s*(?:\[([-0-9,\s]*)\])?\s*$")
_FROM_NUMPY = {data.numpy_dtype: name for name, data in DATATYPES.items() if name not in ("BF16", "BYTES")}

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Tensor:
    """Datatype and shape of one input or output."""

    datatype: str
    """Protocol name, for example ``FP32``."""
    dims: tuple[int, ...]
    """Without the batch dimension; -1 for a size that varies."""
    optional: bool = False
    """The function has a default for this input."""


#: How a tensor may be declared: ``"FP32[3,-1]"``, a :class:`Tensor`, or a numpy type for dims ``[1]``.
TensorLike = Tensor | str | type | np.dtype[Any]


@dataclass(frozen=True, slots=True)
class ModelFunction:
    """A declared model."""

    target: Callable[..., Any]
    """A function, or a class whose objects are called."""
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    max_batch_size: int = 0
    instances: int = 1
    max_queue_delay_us: int = 0

    def config(self, name: str) -> dict[str, Any]:
        """Return the model configuration, fields as in config.pbtxt."""
        config: dict[str, Any] = {
            "name": name,
            "max_batch_size": self.max_batch_size,
            "input": [_config_of(key, tensor) for key, tensor in self.inputs.items()],
            "output": [_config_of(key, tensor) for key, tensor in self.outputs.items()],
            "instance_group": [{"kind": "KIND_CPU", "count": self.instances}],
        }
        if self.max_batch_size > 1:
            config["dynamic_batching"] = {"max_queue_delay_microseconds": self.max_queue_delay_us}
        return config


class DeclarationError(TypeError):
    """A function cannot be served as it is declared; caused by who wrote it."""


def model(
    *,
    inputs: Mapping[str, TensorLike] | None = None,
    outputs: Mapping[str, TensorLike] | None = None,
    max_batch_size: int = 0,
    instances: int = 1,
    max_queue_delay_us: int = 0,
) -> Callable[[Decorated], Decorated]:
    """Declare a function or a class as a model.

    Args:
        inputs: name to ``"FP32[50]"``, in Triton's datatypes and without the batch dimension; default: what the
            annotations say, ``Annotated[np.ndarray, "FP32[50]"]`` or ``NDArray[np.float32]`` (for dims ``[-1]``).
        outputs: likewise; default: the return annotation, an array (called ``output``), a TypedDict or a NamedTuple.
        max_batch_size: 0: the function gets one request at a time, without a batch dimension.
        instances: worker processes.
        max_queue_delay_us: how long a request may wait for others to share a batch with.

    Raises:
        DeclarationError: on decoration, if something is missing or impossible.
    """

    def declare(target: Decorated) -> Decorated:
        declared = ModelFunction(
            target=target,
            inputs=_inputs_of(target, inputs),
            outputs=_outputs_of(target, outputs),
            max_batch_size=_at_least(target, "max_batch_size", max_batch_size, 0),
            instances=_at_least(target, "instances", instances, 1),
            max_queue_delay_us=_at_least(target, "max_queue_delay_us", max_queue_delay_us, 0),
        )
        setattr(target, ATTRIBUTE, declared)
        return target

    return declare


def declaration_of(target: object) -> ModelFunction:
    """Return what :func:`model` left on an object; a function with full annotations needs no decorator.

    Raises:
        DeclarationError: it is no model.
    """
    declared = getattr(target, ATTRIBUTE, None)
    if isinstance(declared, ModelFunction):
        return declared
    if not callable(target):
        raise DeclarationError(f"'{target!r}' is not a function")
    return typing.cast("ModelFunction", getattr(model()(target), ATTRIBUTE))


def parse_tensor(declared: object, what: str) -> Tensor:
    """Read one declaration.

    Args:
        what: who it belongs to, for the error.

    Raises:
        DeclarationError: it is none of :data:`TensorLike`.
    """
    if isinstance(declared, Tensor):
        tensor = declared
    elif isinstance(declared, str):
        found = _SPEC_TEXT.match(declared)
        if found is None:
            raise DeclarationError(f"{what}: '{declared}' is no tensor; write for example 'FP32[3,-1]'")
        dims = found.group(2)
        tensor = Tensor(found.group(1), (1,) if dims is None else _dims(dims, declared, what))
    else:
        tensor = Tensor(_datatype(declared, what), (1,))
    if tensor.datatype not in DATATYPES:
        raise DeclarationError(f"{what}: unknown datatype '{tensor.datatype}', there are {', '.join(DATATYPES)}")
    if not tensor.dims or any(dim < -1 or dim == 0 for dim in tensor.dims):
        raise DeclarationError(f"{what}: dims must be positive, or -1 for a size that varies, got {list(tensor.dims)}")
    return tensor


def _dims(text: str, declared: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise DeclarationError(f"{what}: '{declared}' is no tensor; write for example 'FP32[3,-1]'") from None


def _datatype(declared: Any, what: str) -> str:
    if declared in (str, bytes, object):
        return "BYTES"
    try:
        return _FROM_NUMPY[np.dtype(declared)]
    except (KeyError, TypeError):
        raise DeclarationError(f"{what}: {declared!r} is no datatype; write for example 'FP32[3,-1]'") from None


def _config_of(name: str, tensor: Tensor) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": name,
        "data_type": DATATYPES[tensor.datatype].config_name,
        "dims": list(tensor.dims),
    }
    if tensor.optional:
        config["optional"] = True
    return config


def _at_least(target: object, name: str, value: int, least: int) -> int:
    if value < least:
        raise DeclarationError(f"{_title(target)}: {name} must be at least {least}, got {value}")
    return value


def _title(target: object) -> str:
    return f"'{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', repr(target))}'"


def _called(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called for each batch."""
    if inspect.isclass(target):
        called: Callable[..., Any] | None = target.__dict__.get("__call__")
        if called is None:
            raise DeclarationError(f"{_title(target)}: a class needs a __call__ method to be a model")
        return called
    return target


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(_called(target)).parameters.values())
    return parameters[1:] if inspect.isclass(target) else parameters


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(_called(target), include_extras=True)
    except (NameError, TypeError):
        # Names that exist for type checkers only.
        return {}


def _inputs_of(target: Callable[..., Any], given: Mapping[str, TensorLike] | None) -> dict[str, Tensor]:
    parameters = _parameters(target)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    if given is None:
        hints = _hints(target)
        tensors = {name: _annotated(hints.get(name), f"{_title(target)}, input '{name}'") for name in named}
    else:
        tensors = {name: parse_tensor(like, f"{_title(target)}, input '{name}'") for name, like in given.items()}
    if not tensors:
        raise DeclarationError(f"{_title(target)}: a model needs at least one input")
    unknown = [name for name in tensors if name not in named]
    if unknown and not takes_any:
        raise DeclarationError(f"{_title(target)} has no parameter '{unknown[0]}', it has: {', '.join(named)}")
    missing = [
        name for name, parameter in named.items() if name not in tensors and parameter.default is parameter.empty
    ]
    if missing:
        raise DeclarationError(f"{_title(target)} needs an input '{missing[0]}', which is not declared")
    return {
        name: Tensor(
            tensor.datatype,
            tensor.dims,
            tensor.optional or (name in named and named[name].default is not inspect.Parameter.empty),
        )
        for name, tensor in tensors.items()
    }


def _outputs_of(target: Callable[..., Any], given: Mapping[str, TensorLike] | None) -> dict[str, Tensor]:
    if given is not None:
        if not given:
            raise DeclarationError(f"{_title(target)}: a model needs at least one output")
        return {name: parse_tensor(like, f"{_title(target)}, output '{name}'") for name, like in given.items()}
    returned = _hints(target).get("return")
    if inspect.isclass(returned) and (typing.is_typeddict(returned) or hasattr(returned, "_fields")):
        fields = typing.get_type_hints(returned, include_extras=True)
        return {name: _annotated(hint, f"{_title(target)}, output '{name}'") for name, hint in fields.items()}
    return {SINGLE_OUTPUT: _annotated(returned, f"{_title(target)}, what it returns")}


def _annotated(hint: Any, what: str) -> Tensor:
    """Read ``Annotated[..., "FP32[50]"]`` or ``NDArray[np.float32]``."""
    if typing.get_origin(hint) is Annotated:
        for extra in typing.get_args(hint)[1:]:
            if isinstance(extra, Tensor | str):
                return parse_tensor(extra, what)
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is np.ndarray:
        scalar = typing.get_args(typing.get_args(hint)[1])
        if scalar and inspect.isclass(scalar[0]) and not inspect.isabstract(scalar[0]):
            return Tensor(_datatype(scalar[0], what), (-1,))
    raise DeclarationError(f"{what} is not declared; write for example Annotated[np.ndarray, 'FP32[3,-1]']")
