"""PyTorch on a GPU: every instance has its own stream, and its inputs lie in staging buffers that stay where they are.

PyTorch's caching allocator serves memory in the order of the stream that is current, so that what the model makes is
valid for our copies on the same stream, and is used again only by what comes later on it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forebay.engine.backends.base import parse_bool
from forebay.engine.backends.device_instance import DeviceInstance, PlacedTensor
from forebay.engine.backends.torch_instance import TorchCall
from forebay.engine.backends.torch_library import LoadedModule, Tensor, torch
from forebay.engine.backends.torch_tensors import data_type
from forebay.engine.devices.base import Device, Stream
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.staging import Staging
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.worker_messages import InstanceSpec


class _OnDevice:
    """Elements on a GPU as PyTorch takes them without a copy (CUDA array interface)."""

    def __init__(self, array: DeviceArray, typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": typestr,
            "data": (array.address, False),
            "version": 3,
        }


def view_tensor(array: DeviceArray, datatype: str, device: Device) -> Tensor:
    """Return a tensor over device memory, for as long as the memory is there."""
    # Neither numpy nor the interface knows bfloat16: 16 bits go through as integers.
    dtype = np.dtype(np.int16) if datatype == "BF16" else array.dtype
    if array.nbytes == 0:
        tensor = torch.empty(array.shape, dtype=getattr(torch, dtype.name), device=_place(device))
    elif device.kind == "cuda":
        tensor = torch.as_tensor(_OnDevice(array, dtype.str), device=_place(device))
    else:
        raw = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
        tensor = torch.from_numpy(np.frombuffer(memoryview(raw), dtype).reshape(array.shape))
    return tensor.view(torch.bfloat16) if datatype == "BF16" else tensor


def _place(device: Device) -> Any:
    return torch.device("cuda", device.index) if device.kind == "cuda" else torch.device("cpu")


class TorchDeviceInstance(DeviceInstance):
    """One loaded model on one GPU; or, to be tested without one, on the host as a device. Tensors only, no strings."""

    def __init__(self, spec: InstanceSpec, loaded: LoadedModule, device: Device, stream: Stream) -> None:
        """Take ownership of the stream."""
        super().__init__(spec, device, stream)
        self._call = TorchCall(spec, loaded)
        self._staging = Staging(device, stream)
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*spec.inputs, *spec.outputs)}
        self._cleans_cache = parse_bool(spec.parameters, "ENABLE_CACHE_CLEANING", False)
        # Kept: making the object anew for each batch costs more than entering it.
        self._torch_stream: Any = None
        if device.kind == "cuda":
            # The weights came on PyTorch's stream, for which ours does not wait.
            torch.cuda.synchronize(device.index)
            self._torch_stream = torch.cuda.ExternalStream(stream.handle, device=device.index)

    def _current(self) -> contextlib.AbstractContextManager[object]:
        if self._torch_stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._torch_stream)  # type: ignore[no-any-return]

    def compute(self, batch: Sequence[Mapping[str, PlacedTensor]], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        missing = [name for name in self._call.signature.inputs if name not in batch[0]]
        if missing:
            raise InvalidArgument(f"input '{missing[0]}' is missing")
        placed = self._staging.gather(batch)
        with self._current():
            arguments = [
                view_tensor(placed[name], self._datatypes[name], self.device) for name in self._call.signature.inputs
            ]
            try:
                results = self._call.run(arguments)
                return {name: self._on_device(name, self._call.pick(results, name)) for name in outputs}
            finally:
                if self._cleans_cache and self._torch_stream is not None:
                    torch.cuda.empty_cache()

    def _on_device(self, name: str, value: Any) -> DeviceArray:
        promised = DATATYPES[self._datatypes[name]]
        if not isinstance(value, torch.Tensor):
            raise BackendFailed(
                f"the model produced strings for output '{name}', but its configuration promises {promised.config_name}"
            )
        if value.dim() == 0:
            raise InvalidArgument(f"output '{name}' is a scalar which is not supported.")
        if data_type(value.dtype) != promised.config_name:
            raise BackendFailed(
                f"the model produced output '{name}' as {data_type(value.dtype)} {list(value.shape)}, "
                f"but its configuration promises {promised.config_name}"
            )
        kept = value.detach().to(_place(self.device)).contiguous()
        return DeviceArray(kept.data_ptr(), tuple(kept.shape), promised.numpy_dtype, kept)

    def close(self) -> None:
        self.stream.synchronize()
        self._call.close()
        self._staging.close()
        self._arenas.close()
        self.stream.close()
