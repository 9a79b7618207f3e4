"""What a backend is: the interface between a worker and a framework. Runs in worker processes.

A newcomer writes two classes: a :class:`Backend` that opens a model file, and an instance, either

- :class:`TensorInstance`: arrays in, arrays out. The worker joins requests to batches, places tensors and checks
  answers; ``run`` is all there is to write. ``bind`` may be overridden by frameworks that can be told once and for all
  where their tensors are (ONNX Runtime's IOBinding, CUDA graphs), or
- :class:`RequestInstance`: gets the requests of a batch as they are, with ids and parameters, and answers each when it
  likes (Python models, decoupled models).
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from forebay.ipc.errors import InvalidArgument, ServingError, Unsupported
from forebay.ipc.messages import ParameterValue
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.devices.base import Device
    from forebay.engine.worker.parcel_request import ParcelRequest
    from forebay.engine.worker.request_rows import RowRequest

Array = npt.NDArray[np.generic]
Arrays = dict[str, Array]


class DescribedTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor as the model file declares it."""

    name: str
    data_type: str
    """``TYPE_*``"""
    shape: tuple[int, ...]
    """Full shape, batch dimension included; -1 for a size that varies."""
    is_shape_tensor: bool = False
    """Its values are shapes (TensorRT); with batching, the first of them is the batch size."""


class DescribedModel(msgspec.Struct, frozen=True):
    """What a backend found in a model file, for auto-complete (spec 4.3)."""

    inputs: tuple[DescribedTensor, ...]
    outputs: tuple[DescribedTensor, ...]
    config: dict[str, object] = {}
    """Config fields that the model itself sets (Python's ``auto_complete_config``)."""
    max_batch_size: int | None = None
    """Largest batch that the file allows, 0 for none (TensorRT's profiles); None: it does not say."""


class MissingLibrary(Unsupported):
    """The framework is not installed; the text names the command that installs it."""


class LoadedModel:
    """What both kinds of instances have."""

    @property
    def device(self) -> Device | None:
        """Where requests' tensors may lie besides host memory; None: nowhere."""
        return None

    #: Tensors of requests may lie on the device, not only what the model copies there itself.
    takes_device_tensors = False

    def count_copies(self, counters: memoryview) -> None:
        """Count what crosses between host and device from now on.

        Args:
            counters: uint64, the instance's block.
        """
        if self.device is not None:
            self.device.traffic.show_in(counters)

    #: Asks the model itself whether it is ready, from any thread; None: it is, once it is loaded.
    ready_check: Callable[[], bool] | None = None

    def attach_memory(self, address: int, byte_size: int) -> None:
        """An arena has been mapped at ``address``; a device may want to page-lock it."""

    def detach_memory(self, address: int) -> None:
        """The arena at ``address`` is about to be unmapped."""

    def close(self) -> None:
        """Release what the model holds; the process ends soon after."""


class TensorInstance(LoadedModel, abc.ABC):
    """A loaded model that maps arrays to arrays. Used by one thread."""

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        """Run the model once.

        Args:
            inputs: by name, ``[rows, *dims]`` (or ``dims`` if the model does not batch), C-contiguous; BYTES as object
                arrays of ``bytes``, BF16 as uint16; shape tensors of a model that batches ``[1 + n]``, the batch size
                first. Valid during the call only.
            outputs: names that somebody wants; others may be left out.

        Returns:
            At least the wanted outputs. Shapes are checked by the caller.

        Raises:
            ServingError: with the text for the client.
        """

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Return a function that runs the model from exactly these input arrays into exactly these output arrays.

        The worker keeps it as long as the arrays live and calls it for every batch in the same rows. The default runs
        and copies the answers, after checking their shapes.
        """
        wanted = tuple(outputs)

        def run_and_copy() -> None:
            results = self.run(inputs, wanted)
            for name, target in outputs.items():
                result = results.get(name)
                if result is None:
                    raise InvalidArgument(f"the model did not produce output '{name}'")
                if result.shape != target.shape or result.dtype != target.dtype:
                    raise InvalidArgument(
                        f"the model produced output '{name}' as {result.dtype}{list(result.shape)}, "
                        f"but the model configuration promises {target.dtype}{list(target.shape)}"
                    )
                np.copyto(target, result)

        return run_and_copy


class SegmentsInstance(TensorInstance):
    """A model whose tensors are copied to a device anyway, so that a batch need not be gathered on the host first."""

    @abc.abstractmethod
    def run_segments(self, segments: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> None:
        """Run one batch made of several runs of rows.

        Args:
            segments: (inputs, outputs) by name, each ``[rows, *dims]`` and of fixed shapes; in the order of the batch.

        Raises:
            ServingError: with the text for the client.
        """


class RequestInstance(LoadedModel, abc.ABC):
    """A loaded model that handles requests one by one, or several at a time."""

    @abc.abstractmethod
    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        """Handle one batch. Each request must be answered with ``reply`` or ``fail``, now or later (decoupled).

        An exception fails every request of the batch that has no answer yet.
        """


class RowsInstance(RequestInstance):
    """A model that also takes requests in slab rows: those that carry nothing but tensors, at far less cost."""

    #: The model may answer after its execution, or in other shapes than configured: it is to get parcels only.
    wants_parcels = False

    @abc.abstractmethod
    def execute_rows(self, requests: Sequence[RowRequest]) -> None:
        """Handle one batch as ``execute`` does. The worker waits until each request has its answer."""


Instance = TensorInstance | RequestInstance


class Backend(abc.ABC):
    """One framework."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        """Look into the model file for auto-complete; the default knows nothing.

        Raises:
            ServingError: the file cannot be read; the text names file and cause.
        """
        raise Unsupported(f"backend '{spec.backend}' does not support auto-complete")

    @abc.abstractmethod
    def load(self, spec: InstanceSpec) -> Instance:
        """Load the model for serving.

        Raises:
            ServingError: the text becomes the model's UNAVAILABLE reason.
        """


#: Backend name in config.pbtxt to the module that implements it; the module has a class ``BACKEND``.
BACKEND_MODULES: dict[str, str] = {
    "onnxruntime": "forebay.engine.backends.onnx_backend",
    "pytorch": "forebay.engine.backends.torch_backend",
    "python": "forebay.engine.backends.python_backend",
    "identity": "forebay.engine.backends.identity_backend",
    "repeat": "forebay.engine.backends.repeat_backend",
    "square": "forebay.engine.backends.square_backend",
    "forebay_function": "forebay.engine.backends.function_backend",
    "forebay_fault": "forebay.engine.backends.fault_backend",
    "forebay_courier": "forebay.engine.backends.courier_backend",
    "forebay_ensemble_warmup": "forebay.engine.backends.ensemble_warmup_backend",
    "tensorflow": "forebay.engine.backends.tensorflow_backend",
    "tensorrt": "forebay.engine.backends.tensorrt_backend",
    "openvino": "forebay.engine.backends.openvino_backend",
}

#: What to install when a backend's framework is missing.
INSTALL_HINTS: dict[str, str] = {
    "pytorch": "pip install 'forebay[torch]'",
    "tensorflow": "pip install 'forebay[tensorflow]'",
    "tensorrt": "pip install 'forebay[tensorrt]'",
    "openvino": "pip install 'forebay[openvino]'",
}


def unknown_backend(name: str) -> InvalidArgument:
    """Return the error of a model whose backend does not exist, with Triton's text (spec R-044)."""
    return InvalidArgument(
        f"unable to find backend library for backend '{name}', try specifying runtime on the model configuration."
    )


def open_backend(name: str) -> Backend:
    """Import the backend called ``name``.

    Raises:
        InvalidArgument: there is no such backend (Triton's text, spec R-044).
        MissingLibrary: its framework is not installed.
    """
    module_name = BACKEND_MODULES.get(name)
    if module_name is None:
        raise unknown_backend(name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = INSTALL_HINTS.get(name)
        advice = f"; install it with: {hint}" if hint else ""
        raise MissingLibrary(
            f"backend '{name}' needs the Python package '{error.name}', which is not installed{advice}"
        ) from None
    backend: Backend = module.BACKEND()
    return backend


def parse_bool(parameters: Mapping[str, str], key: str, default: bool) -> bool:
    """Read a boolean model parameter.

    Raises:
        InvalidArgument: the text is not a boolean.
    """
    text = parameters.get(key)
    if text is None:
        return default
    lowered = text.strip().lower()
    if lowered in ("true", "1", "on", "yes"):
        return True
    if lowered in ("false", "0", "off", "no"):
        return False
    raise InvalidArgument(f"model parameter '{key}' must be a boolean, got '{text}'")


def parse_int(parameters: Mapping[str, str], key: str, default: int) -> int:
    """Read an integer model parameter.

    Raises:
        InvalidArgument: the text is not an integer.
    """
    text = parameters.get(key)
    if text is None:
        return default
    try:
        return int(text.strip())
    except ValueError:
        raise InvalidArgument(f"model parameter '{key}' must be an integer, got '{text}'") from None


__all__ = [
    "BACKEND_MODULES",
    "Array",
    "Arrays",
    "Backend",
    "DescribedModel",
    "DescribedTensor",
    "Instance",
    "MissingLibrary",
    "ParameterValue",
    "RequestInstance",
    "RowsInstance",
    "ServingError",
    "TensorInstance",
    "open_backend",
    "parse_bool",
    "parse_int",
]
