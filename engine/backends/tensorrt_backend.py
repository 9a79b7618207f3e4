"""TensorRT plans (``tensorrt_plan``, ``model.plan``) and ONNX files that are built into plans at load (spec B-070).

Three libraries run plans: ``tensorrt``, ``tensorrt_rtx`` and ``tensorrt_lean``. The first that is installed and takes
the plan is used, or the one that ``--backend-config=tensorrt,library=<name>`` names. Each is imported in workers only,
and after a look for a GPU: without a driver they crash rather than raise (FACTS 5).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from forebay.engine.backends.base import (
    Array,
    Arrays,
    Backend,
    DescribedModel,
    DescribedTensor,
    MissingLibrary,
    TensorInstance,
    parse_bool,
)
from forebay.engine.backends.tensorrt_plans import cached_plan, make_logger
from forebay.engine.devices.base import Device, DeviceError, Graph, Memory, Stream
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.poisoning import DeviceGuard
from forebay.engine.devices.staging import PinnedArenas, Staging
from forebay.ipc.errors import BackendFailed, InvalidArgument, ServingError, Unavailable, Unsupported
from forebay.ipc.log import log
from forebay.ipc.messages import InstanceSpec
from forebay.ipc.tensor import DATATYPES

#: In the order in which they are tried.
LIBRARIES = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")

#: TensorRT's names for types to the protocol's.
_DATATYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}

_STREAM_PRIORITIES = {"MAX": -1, "DEFAULT": 0, "MIN": 1}


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


def load_engine(spec: InstanceSpec, device: Device, *, compute_capability: str, device_name: str) -> tuple[Any, Any]:
    """Return (library, engine).

    Raises:
        ServingError: no library takes the model; the text has each one's reason.
    """
    path = find_model_file(spec, compute_capability)
    is_plan = not path.endswith(".onnx")
    reasons: list[str] = []
    for trt in installed_libraries(spec):
        if not is_plan and not hasattr(trt, "OnnxParser"):
            reasons.append(f"{trt.__name__} cannot build plans")
            continue
        try:
            plan = (
                _read(path)
                if is_plan
                else cached_plan(trt, spec, path, device=device_name, compute_capability=compute_capability)
            )
            return trt, _deserialize(trt, spec, plan)
        except (ServingError, OSError) as error:
            reasons.append(f"{trt.__name__} {trt.__version__}: {error}")
    raise InvalidArgument(f"unable to load model '{spec.model}' from '{os.path.basename(path)}': {'; '.join(reasons)}")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _deserialize(trt: Any, spec: InstanceSpec, plan: bytes) -> Any:
    logger = make_logger(trt)
    for library in filter(None, spec.backend_config.get("plugins", "").split(";")):
        # An operator's setting, as in Triton; no model can name one.
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    if parse_bool(spec.backend_config, "version-compatible", False):
        # Such plans bring code of their own.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise InvalidArgument(logger.take())
    # TensorRT wants both to outlive the engine.
    engine_with_owner: Any = _Engine(engine, runtime, logger)
    return engine_with_owner


class _Engine:
    """An engine together with what must live as long."""

    def __init__(self, engine: Any, runtime: Any, logger: Any) -> None:
        self.engine = engine
        self.runtime = runtime
        self.logger = logger


# --- what an engine says of its tensors


def tensor_names(trt: Any, engine: Any, mode: str) -> list[str]:
    """Return the names of inputs (``INPUT``) or outputs (``OUTPUT``)."""
    wanted = trt.TensorIOMode.__members__[mode]
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == wanted]


def datatype_of_tensor(engine: Any, name: str) -> str:
    """Return the protocol's name of a tensor's type.

    Raises:
        InvalidArgument: there is none.
    """
    kind: str = engine.get_tensor_dtype(name).name
    if kind not in _DATATYPES:
        raise InvalidArgument(f"tensor '{name}' has the TensorRT type {kind}, which the protocol has no name for")
    return _DATATYPES[kind]


def check_config(spec: InstanceSpec, trt: Any, engine: Any) -> None:
    """Compare a configuration with an engine.

    Raises:
        InvalidArgument: with texts like those of the other backends.
    """
    for kind, configured, mode in (("input", spec.inputs, "INPUT"), ("output", spec.outputs, "OUTPUT")):
        known = tensor_names(trt, engine, mode)
        if kind == "input" and len(configured) != len(known):
            raise InvalidArgument(
                f"unable to load model '{spec.model}', configuration expects {len(configured)} inputs, "
                f"model provides {len(known)}: {', '.join(known)}"
            )
        for tensor in configured:
            if tensor.name not in known:
                raise InvalidArgument(
                    f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(sorted(known))}"
                )
            found = datatype_of_tensor(engine, tensor.name)
            if found != tensor.datatype:
                raise InvalidArgument(
                    f"unable to load model '{spec.model}', configuration expects datatype "
                    f"{DATATYPES[tensor.datatype].config_name} for {kind} '{tensor.name}', model provides "
                    f"{DATATYPES[found].config_name}"
                )
            shape = tuple(engine.get_tensor_shape(tensor.name))
            is_batched = spec.max_batch_size > 0 and not tensor.is_shape_tensor
            dims = (-1, *tensor.backend_dims) if is_batched else tensor.backend_dims
            if len(shape) != len(dims) or any(
                have not in (-1, want) and not (index == 0 and is_batched)
                for index, (have, want) in enumerate(zip(shape, dims, strict=True))
            ):
                raise InvalidArgument(
                    f"model '{spec.model}', tensor '{tensor.name}': the model expects shape {list(shape)} but the "
                    f"model configuration specifies {list(dims)}"
                )


def parse_profiles(spec: InstanceSpec, count: int) -> list[int]:
    """Return the numbers of the optimisation profiles that the instance uses; by default the first.

    Raises:
        InvalidArgument: with Triton's text (spec C-097).
    """
    numbers: list[int] = []
    for text in spec.extra.get("profiles", ()):
        if not str(text).isdigit() or int(text) >= count:
            raise InvalidArgument(
                f"model '{spec.model}' instance '{spec.instance_name}' specifies invalid profile '{text}'; the plan "
                f"has profiles 0 to {count - 1}"
            )
        numbers.append(int(text))
    return numbers or [0]


# --- running


def make_output_allocator(trt: Any, device: Device, stream: Stream) -> Any:
    """Return an allocator for an output whose shape only its values tell; keeps the largest block it ever needed."""

    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc]
        """See make_output_allocator."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.memory: Memory | None = None
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream_handle: int
        ) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            # An exception cannot pass through TensorRT: no address is its way to say that there is no room.
            try:
                if self.memory is None or self.memory.byte_size < size:
                    larger = device.allocate(size)
                    if self.memory is not None:
                        stream.synchronize()
                        self.memory.close()
                    self.memory = larger
                return self.memory.address
            except DeviceError as error:
                log.error(f"output '{tensor_name}': {error}")
                return 0

        def notify_shape(self, tensor_name: str, shape: Iterable[int]) -> None:
            self.shape = tuple(shape)

    return OutputAllocator()


class _Profile:
    """One optimisation profile with its execution context."""

    def __init__(self, context: Any, ranges: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> None:
        self.context = context
        self.ranges = ranges
        #: Shapes to the captured graph; None: capturing them failed, and is not tried again.
        self.graphs: dict[tuple[object, ...], Graph | None] = {}

    def takes(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """True if all input shapes are in the profile's range."""
        return all(
            len(shapes[name]) == len(low)
            and all(lo <= size <= hi for lo, size, hi in zip(low, shapes[name], high, strict=True))
            for name, (low, high) in self.ranges.items()
            if name in shapes
        )


class TensorRtInstance(TensorInstance):
    """One engine on one GPU: a context for each profile, all on one stream and with one scratch memory."""

    def __init__(self, spec: InstanceSpec, trt: Any, owner: Any, device: Device, stream: Stream) -> None:
        """Take ownership of the stream."""
        self._trt = trt
        self._owner: Any = owner
        self._engine: Any = owner.engine
        self._model = spec.model
        self._device = device
        self._stream = stream
        self._staging = Staging(device, stream)
        self._arenas = PinnedArenas(device, spec)
        self._inputs = tensor_names(trt, self._engine, "INPUT")
        self._outputs = tensor_names(trt, self._engine, "OUTPUT")
        host = trt.TensorLocation.HOST
        self._on_host = {
            name for name in (*self._inputs, *self._outputs) if self._engine.get_tensor_location(name) == host
        }
        self._unbatched = {
            tensor.name
            for tensor in (*spec.inputs, *spec.outputs)
            if tensor.is_shape_tensor and spec.max_batch_size > 0
        }
        self._dtypes = {
            name: DATATYPES[datatype_of_tensor(self._engine, name)].numpy_dtype
            for name in (*self._inputs, *self._outputs)
        }
        is_fixed = all(tensor.is_fixed for tensor in (*spec.inputs, *spec.outputs))
        self._uses_graphs = bool(spec.optimization.get("cuda_graphs")) and is_fixed and not self._on_host
        self._allocators: dict[str, Any] = {}
        self._scratch: Memory | None = None
        self._profiles = self._make_profiles(parse_profiles(spec, self._engine.num_optimization_profiles))

    def _make_profiles(self, numbers: Sequence[int]) -> list[_Profile]:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        # Contexts that never run at the same time can share their scratch memory; its size is that of the largest
        # profile, used or not.
        self._scratch = self._device.allocate(int(self._engine.device_memory_size_v2))
        profiles: list[_Profile] = []
        for number in numbers:
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise InvalidArgument(f"unable to load model '{self._model}': {self._owner.logger.take()}")
            context.set_device_memory(self._scratch.address, self._scratch.byte_size)
            if number != 0 and not context.set_optimization_profile_async(number, self._stream.handle):
                raise InvalidArgument(f"model '{self._model}': cannot use profile {number}")
            ranges: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
            for name in self._inputs:
                if name not in self._on_host:
                    low, _usual, high = self._engine.get_tensor_profile_shape(name, number)
                    ranges[name] = (tuple(low), tuple(high))
            profiles.append(_Profile(context, ranges))
        self._stream.synchronize()
        return profiles

    # --- arenas ---

    def attach_memory(self, address: int, byte_size: int) -> None:
        """An arena has been mapped here: page-lock it."""
        self._arenas.attach(address, byte_size)

    def detach_memory(self, address: int) -> None:
        """An arena is about to be unmapped."""
        self._arenas.detach(address)

    # --- requests ---

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        with DeviceGuard():
            profile, shapes, kept = self._place_inputs(inputs)
            host_outputs = self._place_outputs(profile.context)
            self._execute(profile, (*shapes.items(),))
            results: Arrays = {}
            for name in outputs:
                if name in host_outputs:
                    results[name] = host_outputs[name]
                    continue
                shape, address = self._output_place(profile.context, name)
                results[name] = result = np.empty(shape, self._dtypes[name])
                if result.nbytes:
                    self._stream.copy_out(result.ctypes.data, address, result.nbytes)
            self._stream.synchronize()
            del kept
            return results

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        if self._on_host:
            return super().bind(inputs, outputs)

        def run_bound() -> None:
            with DeviceGuard():
                profile, shapes, _kept = self._place_inputs(inputs)
                self._place_outputs(profile.context)
                self._execute(profile, (*shapes.items(),))
                for name, target in outputs.items():
                    shape, address = self._output_place(profile.context, name)
                    if shape != target.shape:
                        self._stream.synchronize()
                        raise InvalidArgument(
                            f"the model produced output '{name}' as {list(shape)}, "
                            f"but the model configuration promises {list(target.shape)}"
                        )
                    if target.nbytes:
                        self._stream.copy_out(target.ctypes.data, address, target.nbytes)
                self._stream.synchronize()

        return run_bound

    def _place_inputs(self, inputs: Mapping[str, Array]) -> tuple[_Profile, dict[str, tuple[int, ...]], list[Array]]:
        """Copy the inputs to the device and tell a context about them; returns what must live until the run is over."""
        # A shape tensor is the same for the whole batch: its first row counts (spec D-018).
        arrays = {
            name: np.ascontiguousarray(array[0]) if name in self._unbatched else array for name, array in inputs.items()
        }
        missing = [name for name in self._inputs if name not in arrays]
        if missing:
            raise InvalidArgument(f"model '{self._model}' needs its input '{missing[0]}'")
        shapes = {name: arrays[name].shape for name in self._inputs}
        profile = next((one for one in self._profiles if one.takes(shapes)), None)
        if profile is None:
            raise InvalidArgument(self._shape_problem(shapes))
        context = profile.context
        for name in self._inputs:
            array = arrays[name]
            if not context.set_input_shape(name, array.shape):
                raise InvalidArgument(self._shape_problem(shapes))
            if name in self._on_host:
                context.set_tensor_address(name, array.ctypes.data)
            else:
                [address] = self._staging.copy_in({name: array}).values()
                context.set_tensor_address(name, address)
        unknown = list(context.infer_shapes())
        if unknown:
            raise InvalidArgument(f"model '{self._model}': the shape of '{unknown[0]}' cannot be told from the inputs")
        return profile, shapes, list(arrays.values())

    def _shape_problem(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        for name, shape in shapes.items():
            ranges = [one.ranges[name] for one in self._profiles if name in one.ranges]
            if ranges and not any(one.takes({name: shape}) for one in self._profiles):
                allowed = " or ".join(f"{list(low)} to {list(high)}" for low, high in ranges)
                return (
                    f"request specifies invalid shape for input '{name}' for model '{self._model}': {list(shape)}, the "
                    f"plan takes {allowed}"
                )
        return f"no optimisation profile of model '{self._model}' takes these inputs together"

    def _place_outputs(self, context: Any) -> Arrays:
        """Give every output a place; returns those that TensorRT leaves on the host."""
        on_host: Arrays = {}
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            if name in self._on_host:
                on_host[name] = array = np.empty([max(size, 1) for size in shape], self._dtypes[name])
                context.set_tensor_address(name, array.ctypes.data)
            elif -1 in shape:
                allocator = self._allocators.get(name)
                if allocator is None:
                    allocator = make_output_allocator(self._trt, self._device, self._stream)
                    self._allocators[name] = allocator
                context.set_output_allocator(name, allocator)
            else:
                byte_size = int(np.prod(shape)) * self._dtypes[name].itemsize
                context.set_tensor_address(name, self._staging.reserve(name, byte_size))
        return on_host

    def _output_place(self, context: Any, name: str) -> tuple[tuple[int, ...], int]:
        """Return an output's shape and address after the run."""
        allocator = self._allocators.get(name)
        shape = tuple(context.get_tensor_shape(name))
        if allocator is None or -1 not in shape:
            return shape, self._staging.reserve(name, 0)
        if allocator.memory is None:
            raise BackendFailed(f"model '{self._model}': no room on the GPU for output '{name}'")
        return allocator.shape, allocator.memory.address

    def _execute(self, profile: _Profile, key: tuple[object, ...]) -> None:
        key = (self._staging.generation, *key)
        graph = profile.graphs.get(key)
        if graph is not None:
            self._stream.launch(graph)
            return
        if not profile.context.execute_async_v3(self._stream.handle):
            self._stream.synchronize()
            raise BackendFailed(f"model '{self._model}': TensorRT: {self._owner.logger.take()}")
        # What has run once as it is can be captured for the next time.
        if self._uses_graphs and key not in profile.graphs:
            profile.graphs[key] = self._capture(profile)

    def _capture(self, profile: _Profile) -> Graph | None:
        self._stream.synchronize()
        self._stream.begin_capture()
        has_run = profile.context.execute_async_v3(self._stream.handle)
        try:
            graph = self._stream.end_capture()
        except DeviceError as error:
            log.warning(f"model '{self._model}' runs without CUDA graphs: {error}")
            return None
        if not has_run:
            graph.close()
            return None
        return graph

    def close(self) -> None:
        self._stream.synchronize()
        for profile in self._profiles:
            for graph in profile.graphs.values():
                if graph is not None:
                    graph.close()
        # Contexts go before the engine, and all of them before the memory that they were given.
        self._profiles.clear()
        self._engine = None
        self._owner = None
        self._staging.close()
        for allocator in self._allocators.values():
            if allocator.memory is not None:
                allocator.memory.close()
        if self._scratch is not None:
            self._scratch.close()
        self._arenas.close()
        self._stream.close()


class TensorRtBackend(Backend):
    """``backend: "tensorrt"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        device = _open_gpu(spec)
        trt, owner = load_engine(spec, device, compute_capability=device.compute_capability, device_name=device.name)

        def described(mode: str) -> tuple[DescribedTensor, ...]:
            return tuple(
                DescribedTensor(
                    name,
                    DATATYPES[datatype_of_tensor(owner.engine, name)].config_name,
                    tuple(int(size) for size in owner.engine.get_tensor_shape(name)),
                )
                for name in tensor_names(trt, owner.engine, mode)
            )

        return DescribedModel(described("INPUT"), described("OUTPUT"))

    def load(self, spec: InstanceSpec) -> TensorInstance:
        device = _open_gpu(spec)
        trt, owner = load_engine(spec, device, compute_capability=device.compute_capability, device_name=device.name)
        check_config(spec, trt, owner.engine)
        priority = _STREAM_PRIORITIES.get(str(spec.optimization.get("priority", "DEFAULT")), 0)
        return TensorRtInstance(spec, trt, owner, device, device.make_stream(priority))


def _open_gpu(spec: InstanceSpec) -> Any:
    try:
        return open_device("cuda", spec.device_id)
    except Unsupported as error:
        raise Unsupported(f"model '{spec.model}': TensorRT runs on GPUs only: {error.text}") from None


BACKEND = TensorRtBackend
