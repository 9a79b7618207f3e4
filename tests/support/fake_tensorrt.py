"""A library with TensorRT's interface that computes with numpy, over the host as a device.

For the backend's own decisions: which profile, which address, what is copied when. It says nothing about TensorRT.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__version__ = "0"

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class TensorFormat(enum.Enum):
    LINEAR = 0
    CHW32 = 5


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


class DataType(enum.Enum):
    FLOAT = 0
    INT32 = 3
    INT64 = 8
    FP8 = 6


class IOutputAllocator:
    pass


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = range(3)


_NUMPY = {DataType.FLOAT: np.float32, DataType.INT32: np.int32, DataType.INT64: np.int64}


class Tensor:
    """One input or output of a fake engine."""

    def __init__(
        self,
        mode: TensorIOMode,
        shape: Shape,
        kind: DataType = DataType.FLOAT,
        location: Any = TensorLocation.DEVICE,
        *,
        is_shape: bool = False,
        layout: TensorFormat = TensorFormat.LINEAR,
    ) -> None:
        self.mode, self.shape, self.kind, self.location = mode, shape, kind, location
        self.is_shape, self.layout = is_shape, layout


class Engine:
    """Runs ``function(inputs by name) -> outputs by name``.

    ``profiles``: input to (least, usual, most), sizes or the values of a shape tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        function: Callable[[dict[str, Array]], dict[str, Array]],
        profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]],
        shapes: Callable[[dict[str, Shape]], dict[str, Shape]],
    ) -> None:
        self.tensors = dict(tensors)
        self.function = function
        self.profiles = profiles
        self.shapes = shapes
        self.contexts: list[Context] = []
        self.fails = False

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name].mode

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].kind

    def get_tensor_shape(self, name: str) -> Shape:
        return self.tensors[name].shape

    def get_tensor_location(self, name: str) -> TensorLocation:
        return self.tensors[name].location

    @property
    def device_memory_size_v2(self) -> int:
        return 1024 * len(self.profiles)

    def is_shape_inference_io(self, name: str) -> bool:
        return self.tensors[name].is_shape

    def get_tensor_format(self, name: str) -> TensorFormat:
        return self.tensors[name].layout

    def get_tensor_format_desc(self, name: str) -> str:
        words = {"LINEAR": "Row major linear format", "CHW32": "Thirty-two wide channel vectorized row major format"}
        return words[self.tensors[name].layout.name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        assert not self.tensors[name].is_shape
        return self.profiles[profile][name]

    def get_tensor_profile_values(self, profile: int, name: str) -> list[list[int]]:
        """As in TensorRT the number comes first, and there is nothing if the values are not known."""
        assert self.tensors[name].is_shape
        return [list(values) for values in self.profiles[profile].get(name, ())]

    def create_execution_context(self, strategy: object) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    """Does at once what it is asked to enqueue."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.scratch = (0, 0)
        self.runs_count = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        #: Shapes that only the last run could tell.
        self._found: dict[str, Shape] = {}

    def set_device_memory(self, address: int, byte_size: int) -> None:
        self.scratch = (address, byte_size)

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._shapes[name] = tuple(shape)
        self._found.clear()
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self._allocators[name] = allocator
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> Shape:
        return self._found.get(name) or self.engine.shapes(self._shapes)[name]

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.fails:
            return False
        self.runs_count += 1
        inputs = {name: self._view(name, shape, self._addresses[name]).copy() for name, shape in self._shapes.items()}
        for name, value in self.engine.function(inputs).items():
            array = np.ascontiguousarray(value, dtype=_NUMPY[self.engine.tensors[name].kind])
            if name in self._allocators:
                allocator = self._allocators[name]
                address = allocator.reallocate_output_async(name, 0, array.nbytes, 256, stream)
                allocator.notify_shape(name, array.shape)
                self._found[name] = array.shape
                if not address:
                    return False
            else:
                address = self._addresses[name]
            if array.nbytes:
                ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return True

    def _view(self, name: str, shape: Shape, address: int) -> Array:
        dtype = np.dtype(_NUMPY[self.engine.tensors[name].kind])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


#: Values of ``size`` that :func:`reshaping_engine` takes if nothing else is said.
SIZES = ((1, 1, 1), (4, 2, 3), (8, 6, 6))


def reshaping_engine(location: TensorLocation = TensorLocation.HOST, *sizes: Any) -> Engine:
    """Return an engine that gives each item of ``x`` the shape of ``size``, and says which that is.

    Args:
        sizes: least, usual and largest values of ``size`` by profile.
    """
    return Engine(
        {
            "x": Tensor(TensorIOMode.INPUT, (-1, 6)),
            "size": Tensor(TensorIOMode.INPUT, (3,), DataType.INT32, location, is_shape=True),
            "y": Tensor(TensorIOMode.OUTPUT, (-1, -1, -1)),
            "made": Tensor(TensorIOMode.OUTPUT, (3,), DataType.INT32, location, is_shape=True),
        },
        lambda inputs: {"y": inputs["x"].reshape(inputs["size"]), "made": inputs["size"]},
        [{"x": ((1, 6), (8, 6), (8, 6)), "size": one} for one in sizes or (SIZES,)],
        lambda shapes: {**shapes, "y": (-1, -1, -1), "made": (3,)},
    )


class Runtime:
    """Takes plans that are the values of ``size`` by profile, as JSON."""

    def __init__(self, logger: object) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        try:
            return reshaping_engine(TensorLocation.HOST, *json.loads(plan))
        except ValueError:
            return None
