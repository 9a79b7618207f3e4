"""Plain Python functions as models (``forebay serve module:function``); how they are declared: ``model_functions.py``.

The configuration's parameters ``function`` (``module:function`` or ``path/to/file.py:function``) and ``directory``,
which is put on ``sys.path``, say what to import. The worker imports it after the fork: the code is the user's own, and
runs with nobody but itself in its process.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np

from forebay.engine.backends.base import Array, Arrays, Backend, DescribedModel, TensorInstance
from forebay.engine.model_functions import DeclarationError, ModelFunction, declaration_of
from forebay.ipc.errors import BackendFailed, InvalidArgument, ServingError
from forebay.ipc.tensor import DATATYPES, TensorSpec
from forebay.ipc.worker_messages import InstanceSpec


def import_function(spec: InstanceSpec) -> ModelFunction:
    """Import the user's module and return the declared model.

    Raises:
        InvalidArgument: it cannot be imported, has no such function, or that is no model; the text says which.
    """
    location = spec.parameters.get("function", "")
    module_name, _, function_name = location.rpartition(":")
    if not module_name or not function_name:
        raise InvalidArgument(
            f"model '{spec.model}': the parameter 'function' must be 'module:function', got '{location}'"
        )
    directory = spec.parameters.get("directory", "")
    if directory and directory not in sys.path:
        sys.path.insert(0, directory)
    if module_name.endswith(".py") and not os.path.isfile(os.path.join(directory, module_name)):
        raise InvalidArgument(f"model '{spec.model}': there is no file '{module_name}'")
    try:
        target: Any = _import_module(module_name, directory)
    except Exception as error:  # the user's code may raise anything
        traceback.print_exc(file=sys.stderr)
        raise InvalidArgument(
            f"model '{spec.model}': cannot import '{module_name}': {type(error).__name__}: {error}"
        ) from None
    try:
        for part in function_name.split("."):
            target = getattr(target, part)
        return declaration_of(target)
    except AttributeError:
        raise InvalidArgument(f"model '{spec.model}': '{module_name}' has no '{function_name}'") from None
    except DeclarationError as error:
        raise InvalidArgument(f"model '{spec.model}': {error}") from None


def _import_module(name: str, directory: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = os.path.join(directory, name)
    title = os.path.basename(name).removesuffix(".py")
    made = importlib.util.spec_from_file_location(title, path)
    if made is None or made.loader is None:
        raise ImportError(f"'{name}' is no Python file")
    module = importlib.util.module_from_spec(made)
    sys.modules[title] = module
    made.loader.exec_module(module)
    return module


class FunctionInstance(TensorInstance):
    """One function, or one object of a class."""

    def __init__(self, spec: InstanceSpec, declared: ModelFunction) -> None:
        self._model = spec.model
        self._outputs = {tensor.name: tensor for tensor in spec.outputs}
        self._call: Callable[..., Any] = declared.target
        if inspect.isclass(declared.target):
            try:
                made: Any = declared.target()
            except Exception as error:  # the user's code may raise anything
                traceback.print_exc(file=sys.stderr)
                raise InvalidArgument(
                    f"model '{spec.model}': {declared.target.__name__}() raised {type(error).__name__}: {error}"
                ) from None
            self._call = made

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        try:
            returned: Any = self._call(**inputs)
        except ServingError:
            raise
        except Exception as error:  # the user's code may raise anything
            traceback.print_exc(file=sys.stderr)
            raise BackendFailed(f"model '{self._model}': the function raised {type(error).__name__}: {error}") from None
        named = self._by_name(returned)
        return {name: self._array(name, named[name]) for name in outputs if name in named}

    def _by_name(self, returned: object) -> Mapping[str, Any]:
        """Give names to what the function returned: a mapping, a (named) tuple or one array."""
        if _is_mapping(returned):
            return returned
        if _is_tuple(returned):
            if len(returned) != len(self._outputs):
                raise BackendFailed(
                    f"model '{self._model}': the function returned {len(returned)} values for {len(self._outputs)} "
                    "outputs"
                )
            return dict(zip(self._outputs, returned, strict=True))
        if len(self._outputs) == 1:
            return {next(iter(self._outputs)): returned}
        raise BackendFailed(
            f"model '{self._model}': the function returned {type(returned).__name__} for {len(self._outputs)} outputs; "
            "return a tuple or a dictionary"
        )

    def _array(self, name: str, value: object) -> Array:
        if _is_array(value):
            # ascontiguousarray makes a scalar an array of one element.
            return value if value.flags.c_contiguous else np.ascontiguousarray(value)
        return _from_python(self._outputs[name], value)


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple)


def _is_array(value: object) -> TypeGuard[Array]:
    return isinstance(value, np.ndarray)


def _from_python(spec: TensorSpec, value: Any) -> Array:
    """Return a list or a number as an array of the configured type.

    Raises:
        BackendFailed: it does not fit.
    """
    try:
        array: Array = np.array(value, dtype=DATATYPES[spec.datatype].numpy_dtype, order="C")
    except (TypeError, ValueError, OverflowError) as error:
        raise BackendFailed(f"output '{spec.name}' is no array of {spec.datatype}: {error}") from None
    return array


class FunctionBackend(Backend):
    """``backend: "forebay_function"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        declared = import_function(spec)
        return DescribedModel((), (), config=declared.config(spec.model))

    def load(self, spec: InstanceSpec) -> TensorInstance:
        return FunctionInstance(spec, import_function(spec))


BACKEND = FunctionBackend
