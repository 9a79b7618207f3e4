"""From a model file to an engine: which TensorRT library takes it, and what must live as long as the engine.

Three libraries run plans: ``tensorrt``, ``tensorrt_rtx`` and ``tensorrt_lean``. The first that is installed and takes
the plan is used, or the one that ``--backend-config=tensorrt,library=<name>`` names. Each is imported in workers only,
and after a look for a GPU: without a driver they crash rather than raise (FACTS 5).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from forebay.engine.backends.base import MissingLibrary, parse_bool
from forebay.engine.backends.tensorrt_plans import cached_plan, make_logger
from forebay.engine.backends.tensorrt_runtime_cache import RuntimeCache
from forebay.engine.devices.base import Device
from forebay.ipc.errors import InvalidArgument, ServingError, Unavailable
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

_Made = TypeVar("_Made")

#: In the order in which they are tried.
LIBRARIES = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")


def installed_libraries(spec: InstanceSpec) -> list[Any]:
    """Import the TensorRT libraries that may be used.

    Raises:
        MissingLibrary: none is installed.
    """
    wanted = spec.backend_config.get("library", "")
    names = [wanted] if wanted else list(LIBRARIES)
    libraries: list[Any] = []
    reasons: list[str] = []
    for name in names:
        if name not in LIBRARIES:
            raise InvalidArgument(f"backend setting 'library' must be one of {', '.join(LIBRARIES)}, got '{name}'")
        if importlib.util.find_spec(name) is None:
            continue
        try:
            libraries.append(importlib.import_module(name))
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    if not libraries:
        raise MissingLibrary(
            "backend 'tensorrt' needs one of the Python packages "
            f"{', '.join(names)}{' (' + '; '.join(reasons) + ')' if reasons else ''}; install for example "
            "tensorrt-rtx-cu12, or TensorRT itself from NVIDIA's index"
        )
    return libraries


def find_model_file(spec: InstanceSpec, compute_capability: str) -> str:
    """Return the plan for this GPU, or the ONNX file that takes its place.

    Raises:
        Unavailable: there is neither.
    """
    by_capability: dict[str, str] = spec.extra.get("cc_model_filenames", {})
    name = by_capability.get(compute_capability) or spec.model_file or "model.plan"
    candidates = [name, "model.onnx"] if name == "model.plan" else [name]
    for candidate in candidates:
        path = os.path.join(spec.version_path, candidate)
        if os.path.isfile(path):
            return path
    path = os.path.join(spec.version_path, name)
    raise Unavailable(f"unable to find '{path}' for model instance '{spec.instance_name}'")


class LoadedEngine:
    """An engine together with what must live as long. Several instances of a process may make contexts of it."""

    def __init__(self, trt: Any, spec: InstanceSpec, plan: bytes, device_name: str) -> None:
        """Load a plan.

        Raises:
            InvalidArgument: the library does not take it; its own words.
        """
        self.trt = trt
        self.logger = make_logger(trt)
        self._lock = threading.Lock()
        for library in filter(None, spec.backend_config.get("plugins", "").split(";")):
            # An operator's setting, as in Triton; no model can name one.
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self.logger, "")
        # TensorRT wants both to outlive the engine.
        self._runtime = trt.Runtime(self.logger)
        if parse_bool(spec.backend_config, "version-compatible", False):
            # Such plans bring code of their own.
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise InvalidArgument(self.logger.take())
        self._config: Any = None
        #: Of TensorRT-RTX; None: the library compiles nothing at run time.
        self.kernels: RuntimeCache | None = None
        #: The library itself makes CUDA graphs of what it runs.
        self.makes_graphs = False
        if hasattr(trt, "IRuntimeCache"):
            self._configure(trt, spec, plan, device_name)

    def _configure(self, trt: Any, spec: InstanceSpec, plan: bytes, device_name: str) -> None:
        self._config = self.engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.kernels = RuntimeCache(trt, spec, self._config, plan, device_name)
        if spec.optimization.get("cuda_graphs"):
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.makes_graphs = True

    def make_context(self) -> Any:
        """Return an execution context whose scratch memory the caller brings.

        Raises:
            InvalidArgument: the library's own words.
        """
        with self._lock:
            if self._config is not None:
                context = self.engine.create_execution_context(self._config)
            else:
                strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
                context = self.engine.create_execution_context(strategy)
            if context is None:
                raise InvalidArgument(self.logger.take())
            return context


def load_engine(spec: InstanceSpec, device: Device) -> LoadedEngine:
    """Load a model's plan, or build it from its ONNX file.

    Raises:
        ServingError: no library takes the model; the text has each one's reason.
    """
    path = find_model_file(spec, device.compute_capability)

    def load(trt: Any) -> LoadedEngine:
        if is_onnx(path):
            return _load_onnx(trt, spec, path, device)
        return LoadedEngine(trt, spec, _read(path), device.name)

    return with_a_library(spec, path, load)


def is_onnx(path: str) -> bool:
    """Return whether a model file has to be built into a plan."""
    return path.endswith(".onnx")


def with_a_library(spec: InstanceSpec, path: str, use: Callable[[Any], _Made]) -> _Made:
    """Return what the first library makes of a model file that takes it.

    Raises:
        ServingError: none does; the text has each one's reason.
    """
    reasons: list[str] = []
    for trt in installed_libraries(spec):
        if is_onnx(path) and not hasattr(trt, "OnnxParser"):
            reasons.append(f"{trt.__name__} cannot build plans")
            continue
        try:
            return use(trt)
        except (ServingError, OSError) as error:
            reasons.append(f"{trt.__name__} {trt.__version__}: {error}")
    raise InvalidArgument(f"unable to load model '{spec.model}' from '{os.path.basename(path)}': {'; '.join(reasons)}")


def _load_onnx(trt: Any, spec: InstanceSpec, path: str, device: Device) -> LoadedEngine:
    plan_for_device = functools.partial(
        cached_plan, trt, spec, path, device=device.name, compute_capability=device.compute_capability
    )
    plan = plan_for_device()
    try:
        return LoadedEngine(trt, spec, plan.data, device.name)
    except InvalidArgument as error:
        if plan.is_new:
            raise
        # Damaged, or of a driver that was here before.
        log.warning(f"model '{spec.model}': its plan in the cache is of no use and is built anew: {error}")
    return LoadedEngine(trt, spec, plan_for_device(unusable=plan.data).data, device.name)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
