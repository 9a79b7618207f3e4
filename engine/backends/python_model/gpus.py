"""GPUs as a process of Python models uses them: for tensors that models have there, or want there.

Opened when the first tensor on one is met. Models use their GPUs by libraries of their own, at the same time and from
any thread; here is what copies tensors between those and other processes. Thread-safe.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from forebay.client.device_pools import DeviceLease
from forebay.engine.backends.base import Array
from forebay.engine.devices.base import Device, DeviceError, Memory
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.poisoning import DeviceBatch, DeviceGuard
from forebay.engine.worker.device_memories import DeviceMemories
from forebay.engine.worker.kept_outputs import Copies, KeptOutputs
from forebay.engine.worker.pending_response import address_of
from forebay.ipc.errors import Unsupported
from forebay.ipc.log import log
from forebay.ipc.messages import DeviceMemory


class Gpu:
    """One GPU: a stream of ours, and memories that other processes have made."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.index = device.index
        self._lock = threading.Lock()
        with device.current():
            self._stream = device.make_stream()
        self._memories = DeviceMemories(device)
        #: Outputs that wait for room.
        self.kept = KeptOutputs(device, self.run)
        #: Blocks that tensors of the model begin at, as long as it has those, by address: other processes know them,
        #: whichever libraries the tensors have been through.
        self.leases: weakref.WeakValueDictionary[int, DeviceLease] = weakref.WeakValueDictionary()

    @property
    def stream_handle(self) -> int:
        """As libraries take it; 0 on the host."""
        return self._stream.handle

    def run(self, copies: Copies) -> None:
        """Begin copies, and return when they are done.

        Raises:
            BackendFailed: the device refused one.
        """
        with self._lock, self.device.current(), DeviceBatch(self.device, self._stream):
            copies(self._stream)

    def wait(self) -> None:
        """Return when what others have put before our stream is done."""
        self.run(lambda _stream: None)

    def move(self, target: int, source: DeviceArray) -> None:
        """Copy a tensor to another place on the GPU."""
        if source.nbytes:
            self.run(lambda stream: stream.copy_within(target, source.address, source.nbytes))

    def bring(self, target: int, data: memoryview) -> None:
        """Copy bytes of the host to a place on the GPU."""
        if len(data):
            self.run(lambda stream: stream.copy_in(target, address_of(data), len(data)))

    def fetch(self, source: DeviceArray, target: Array) -> None:
        """Copy a tensor to an array of its bytes on the host."""
        if source.nbytes:
            self.run(lambda stream: stream.copy_out(target.ctypes.data, source.address, source.nbytes))

    def address(self, memory: DeviceMemory, offset: int, byte_size: int) -> int:
        """Return where a place in a memory of another process is here.

        Raises:
            DeviceError: it cannot be opened.
            InvalidArgument: the place is outside of it.
        """
        return self._memories.address((memory.owner, memory.number), memory, offset, byte_size)

    def close_memory(self, memory: DeviceMemory) -> None:
        """Another process is about to take a memory away."""
        self._memories.forget((memory.owner, memory.number))

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceArray:
        """Return memory of our own, which is freed when nobody refers to it any more.

        Raises:
            BackendFailed: there is no room.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        with self.device.current(), DeviceGuard():
            memory = self.device.allocate(size)
        return DeviceArray(memory.address, shape, dtype, _Freed(self.device, memory))


class _Freed:
    """Frees device memory with itself."""

    def __init__(self, device: Device, memory: Memory) -> None:
        self._device = device
        self._memory = memory

    def __del__(self) -> None:
        with contextlib.suppress(DeviceError), self._device.current():
            self._memory.close()


class Gpus:
    """Those of this process that were needed so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By number; None: it cannot be opened here.
        self._known: dict[int, Gpu | None] = {}
        self._counters: memoryview | None = None

    def find(self, index: int) -> Gpu | None:
        """Return a GPU; None: this process cannot use it but by the model's own libraries."""
        with self._lock:
            if index not in self._known:
                self._known[index] = self._open(index)
            return self._known[index]

    def _open(self, index: int) -> Gpu | None:
        try:
            # Opening chooses the device of the thread that does it; a model's own thread keeps its choice.
            with ThreadPoolExecutor(1) as other:
                gpu = Gpu(other.submit(open_device, "cuda", index).result())
        except (Unsupported, DeviceError) as error:
            log.warning(f"tensors of models on GPU {index} go through host memory: {error.text}")
            return None
        gpu.device.traffic.show_in(self._counters)
        return gpu

    def count(self, counters: memoryview) -> None:
        """Count copies from now on.

        Args:
            counters: uint64, an instance's block.
        """
        self._counters = counters
        for gpu in self._known.values():
            if gpu is not None:
                gpu.device.traffic.show_in(counters)

    def close_memory(self, memory: DeviceMemory) -> None:
        """Another process is about to take a memory away."""
        gpu = self._known.get(memory.device_id)
        if gpu is not None:
            gpu.close_memory(memory)


#: This process's.
gpus = Gpus()
