"""One TensorRT engine on one GPU: profiles, dynamic shapes, shape tensors, data-dependent outputs, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from forebay.engine.backends.base import Array, Arrays
from forebay.engine.backends.device_instance import DeviceInstance, PlacedTensor
from forebay.engine.backends.tensorrt_contexts import BoundContext, Contexts
from forebay.engine.backends.tensorrt_engines import LoadedEngine
from forebay.engine.backends.tensorrt_profiles import profile_numbers
from forebay.engine.backends.tensorrt_tensors import datatype_of_tensor, tensor_names
from forebay.engine.devices.base import Device, DeviceError, Memory, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.staging import Staging
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.log import log
from forebay.ipc.tensor import DATATYPES, shape_text
from forebay.ipc.worker_messages import InstanceSpec


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


def _input_of(name: str, placed: Mapping[str, DeviceArray], on_host: Mapping[str, Array]) -> PlacedTensor:
    """Return an input where TensorRT reads it."""
    tensor = placed.get(name)
    return on_host[name] if tensor is None else tensor


class TensorRtInstance(DeviceInstance):
    """One engine on one GPU."""

    def __init__(self, spec: InstanceSpec, owner: LoadedEngine, device: Device, stream: Stream) -> None:
        """Take ownership of the stream."""
        super().__init__(spec, device, stream)
        trt = owner.trt
        self._trt = trt
        self._owner: LoadedEngine | None = owner
        self._engine: Any = owner.engine
        self._model = spec.model
        is_fixed = all(tensor.is_fixed for tensor in (*spec.inputs, *spec.outputs))
        # With room for the largest batch at once, so that nothing moves, and no graph is captured in vain.
        self._staging = Staging(device, stream, rows_max=spec.max_batch_size if is_fixed else 0)
        self._inputs = tensor_names(trt, self._engine, "INPUT")
        self._outputs = tensor_names(trt, self._engine, "OUTPUT")
        host = trt.TensorLocation.HOST
        self._on_host = {
            name for name in (*self._inputs, *self._outputs) if self._engine.get_tensor_location(name) == host
        }
        self._max_batch_size = spec.max_batch_size
        self._instance_name = spec.instance_name
        self._shape_tensors = {tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.is_shape_tensor}
        self._dtypes = {
            name: DATATYPES[datatype_of_tensor(self._engine, name)].numpy_dtype
            for name in (*self._inputs, *self._outputs)
        }
        self._has_run = False
        self._allocators: dict[str, Any] = {}
        self._contexts = Contexts(
            spec,
            owner,
            device,
            stream,
            self._inputs,
            profile_numbers(spec, self._engine.num_optimization_profiles),
            uses_graphs=bool(spec.optimization.get("cuda_graphs")) and is_fixed and not self._on_host,
        )

    # --- requests ---

    def compute(self, batch: Sequence[Mapping[str, PlacedTensor]], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        missing = [name for name in self._inputs if name not in batch[0]]
        if missing:
            raise InvalidArgument(f"model '{self._model}' needs its input '{missing[0]}'")
        in_host_memory = self._on_host | self._shape_tensors
        on_host = {name: self._host_input(name, batch) for name in self._inputs if name in in_host_memory}
        names = [name for name in self._inputs if name not in self._on_host]
        placed = self._staging.gather(
            [{name: tensors[name] for name in names if name not in self._shape_tensors} for tensors in batch]
        )
        # A shape tensor is the same for the whole batch (spec D-018).
        placed |= self._staging.gather([{name: on_host[name] for name in names if name in self._shape_tensors}])
        bound = self._choose(placed, on_host)
        host_outputs = {} if bound.is_told else self._tell(bound, placed, on_host)
        self._contexts.run(bound)
        if not self._has_run:
            self._has_run = True
            self._save_kernels()
        if host_outputs:
            self.stream.synchronize()
        results: dict[str, DeviceArray] = {}
        for name in outputs:
            if name not in host_outputs:
                shape, address = self._output_place(bound.context, name)
                results[name] = DeviceArray(address, shape, self._dtypes[name])
            if name in self._shape_tensors and self._max_batch_size > 0:
                whole = host_outputs.get(name)
                values = self.fetch({name: results[name]})[name] if whole is None else whole
                host_outputs[name] = self._row_for_each_item(name, values)
            if name in host_outputs:
                results |= self._staging.gather([{name: host_outputs[name]}])
        if host_outputs or on_host:
            # What TensorRT reads and writes in host memory must live until it has.
            self.stream.synchronize()
        return results

    def _host_input(self, name: str, batch: Sequence[Mapping[str, PlacedTensor]]) -> Array:
        """Return an input that TensorRT reads on the host: a shape, the same for the whole batch."""
        tensor = batch[0][name]
        if isinstance(tensor, DeviceArray):
            return self.fetch({name: tensor})[name]
        return tensor

    def _row_for_each_item(self, name: str, values: Array) -> Array:
        """Return an output shape tensor as Triton does: ``[rows, n]``, the same for all items of the batch.

        Args:
            values: ``[1 + n]``, the batch size and the values (spec D-018).
        """
        rows = int(values[0]) if values.size else 0
        if not 1 <= rows <= self._max_batch_size:
            raise BackendFailed(f"failed to retrieve the output shape values from binding '{self._model}'")
        return np.tile(values[1:], (rows, 1))

    def _choose(self, placed: Mapping[str, DeviceArray], on_host: Mapping[str, Array]) -> BoundContext:
        shapes = {name: _input_of(name, placed, on_host).shape for name in self._inputs}
        values = {name: tuple(on_host[name].ravel().tolist()) for name in on_host if name in self._shape_tensors}
        return self._contexts.choose(shapes, values, self._staging.generation)

    def _tell(self, bound: BoundContext, placed: Mapping[str, DeviceArray], on_host: Mapping[str, Array]) -> Arrays:
        """Tell a context where inputs and outputs are; returns the outputs that TensorRT leaves on the host."""
        context = bound.context
        for name in self._inputs:
            tensor = _input_of(name, placed, on_host)
            if not context.set_input_shape(name, tensor.shape):
                raise InvalidArgument(
                    f"trt failed to set binding dimension to {shape_text(tensor.shape)} for input '{name}' for "
                    f"{self._instance_name}: {self._take_errors()}"
                )
            context.set_tensor_address(name, tensor.address if isinstance(tensor, DeviceArray) else tensor.ctypes.data)
        try:
            unknown = list(context.infer_shapes())
        except RuntimeError as error:
            raise InvalidArgument(f"model '{self._model}': {error}: {self._take_errors()}") from None
        if unknown:
            raise InvalidArgument(f"model '{self._model}': the shape of '{unknown[0]}' cannot be told from the inputs")
        host_outputs = self._place_outputs(context)
        self._contexts.note_generation(self._staging.generation, but=bound)
        bound.is_told = bound.keeps_shapes
        return host_outputs

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
                    allocator = make_output_allocator(self._trt, self.device, self.stream)
                    self._allocators[name] = allocator
                context.set_output_allocator(name, allocator)
            else:
                context.set_tensor_address(name, self._staging.place(name, shape, self._dtypes[name]).address)
        return on_host

    def _output_place(self, context: Any, name: str) -> tuple[tuple[int, ...], int]:
        """Return an output's shape and address after the run."""
        allocator = self._allocators.get(name)
        if allocator is None:
            return tuple(context.get_tensor_shape(name)), self._staging.reserve(name, 0)
        if allocator.memory is None:
            raise BackendFailed(f"model '{self._model}': no room on the GPU for output '{name}'")
        return allocator.shape, allocator.memory.address

    def _take_errors(self) -> str:
        return "" if self._owner is None else str(self._owner.logger.take())

    def _save_kernels(self) -> None:
        if self._owner is not None and self._owner.kernels is not None:
            self._owner.kernels.save()

    def close(self) -> None:
        self.stream.synchronize()
        self._save_kernels()
        # Contexts go before the engine.
        self._contexts.close()
        self._engine = None
        self._owner = None
        self._staging.close()
        for allocator in self._allocators.values():
            if allocator.memory is not None:
                allocator.memory.close()
        self._arenas.close()
        self.stream.close()
