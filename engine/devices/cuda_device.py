"""A CUDA device by way of CuPy (FACTS 1 and 2). Import it in worker processes only, after the fork.

Only stream order is used: nothing here waits for the whole device. Streams do not wait for the legacy default stream.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Generator
from typing import Any

from forebay.engine.devices.base import (
    HANDLE_BYTES,
    Device,
    DeviceBroken,
    DeviceError,
    DeviceMemoryFull,
    Event,
    Graph,
    Memory,
    Pin,
    Stream,
    Traffic,
)
from forebay.ipc.errors import Unsupported

# As Any: CuPy has no annotations, and a checkout without it must type-check too.
runtime: Any = importlib.import_module("cupy.cuda.runtime")

#: cudaErrorNotReady
_NOT_READY = 600

#: A batch is looked for so long before its thread sleeps: to be woken takes longer than many a model, ns.
_GLANCE_NS = 100_000

#: cudaError_t: memory allocation.
_OUT_OF_MEMORY = 2

#: cudaError_t after which a context cannot be used any more: uncorrectable ECC and NVLink errors, an error contained by
#: the GPU, illegal address, launch time-out, context destroyed, assert, hardware stack error, illegal instruction,
#: misaligned address, invalid address space and program counter, launch failure, tensor memory leak, MPS client
#: terminated, external device, and unknown: what comes after that nobody knows either.
_STICKY = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999})

#: cudaError_t to what helps.
_ADVICE = {
    46: "; if another process has the GPU for itself (nvidia-smi shows E. Process): --mps on, or nvidia-smi -c DEFAULT"
}


@contextlib.contextmanager
def translated(what: str) -> Generator[None]:
    """Turn CuPy's errors into ours.

    Raises:
        DeviceMemoryFull, DeviceBroken, DeviceError: by CUDA's error number.
    """
    try:
        yield
    except runtime.CUDARuntimeError as error:
        number = int(error.status)
        text = f"{what}: {error}{_ADVICE.get(number, '')}"
        if number == _OUT_OF_MEMORY:
            raise DeviceMemoryFull(text) from None
        if number in _STICKY:
            raise DeviceBroken(text) from None
        raise DeviceError(text) from None


def is_done(query: Callable[[int], int | None], handle: int) -> bool:
    """Whether an event's (``eventQuery``) or a stream's (``streamQuery``) work is done.

    Raises:
        DeviceBroken, DeviceError: some of it failed.
    """
    # By CuPy's version the status comes back as a number or as an exception.
    try:
        status = int(query(handle) or 0)
    except runtime.CUDARuntimeError as error:
        status = int(error.status)
    if status not in (0, _NOT_READY):
        with translated("work on the device"):
            raise runtime.CUDARuntimeError(status)
    return status == 0


class CudaMemory(Memory):
    """A block of cudaMalloc, or one that another process exported."""

    def __init__(self, address: int, byte_size: int, *, is_opened: bool) -> None:
        self.address = address
        self.byte_size = byte_size
        self._is_opened = is_opened

    def close(self) -> None:
        if not self.address:
            return
        address, self.address = self.address, 0
        with contextlib.suppress(DeviceError), translated("giving memory back"):
            if self._is_opened:
                runtime.ipcCloseMemHandle(address)
            else:
                runtime.free(address)


class CudaPin(Pin):
    """A range of cudaHostRegister."""

    def __init__(self, address: int) -> None:
        self._address = address

    def close(self) -> None:
        if not self._address:
            return
        address, self._address = self._address, 0
        with contextlib.suppress(DeviceError), translated("unlocking pages"):
            runtime.hostUnregister(address)


class CudaEvent(Event):
    """A cudaEvent_t without timing; waiting for it sleeps rather than spins."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @property
    def is_done(self) -> bool:
        return is_done(runtime.eventQuery, self.handle)

    def synchronize(self) -> None:
        with translated("waiting for an event"):
            runtime.eventSynchronize(self.handle)

    def close(self) -> None:
        if self.handle:
            handle, self.handle = self.handle, 0
            with contextlib.suppress(DeviceError), translated("giving an event back"):
                runtime.eventDestroy(handle)


class CudaGraph(Graph):
    """An instantiated graph."""

    def __init__(self, graph: int) -> None:
        """Take ownership of a captured graph."""
        with translated("instantiating a graph"):
            try:
                self.handle: int = runtime.graphInstantiate(graph)
            finally:
                runtime.graphDestroy(graph)

    def close(self) -> None:
        if self.handle:
            handle, self.handle = self.handle, 0
            with contextlib.suppress(DeviceError), translated("giving a graph back"):
                runtime.graphExecDestroy(handle)


class CudaStream(Stream):
    """A non-blocking stream."""

    def __init__(self, handle: int, traffic: Traffic) -> None:
        self.handle = handle
        self._traffic = traffic
        #: The two events of a measurement; made for the first.
        self._timers: tuple[int, int] | None = None

    def copy_in(self, target: int, source: int, byte_size: int) -> None:
        self._traffic.copies_in += 1
        self._traffic.bytes_in += byte_size
        with translated("copying to the device"):
            runtime.memcpyAsync(target, source, byte_size, runtime.memcpyHostToDevice, self.handle)

    def copy_out(self, target: int, source: int, byte_size: int) -> None:
        self._traffic.copies_out += 1
        self._traffic.bytes_out += byte_size
        with translated("copying from the device"):
            runtime.memcpyAsync(target, source, byte_size, runtime.memcpyDeviceToHost, self.handle)

    def copy_within(self, target: int, source: int, byte_size: int) -> None:
        with translated("copying on the device"):
            runtime.memcpyAsync(target, source, byte_size, runtime.memcpyDeviceToDevice, self.handle)

    def clear(self, target: int, byte_size: int) -> None:
        with translated("clearing device memory"):
            runtime.memsetAsync(target, 0, byte_size, self.handle)

    def record(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        with translated("recording an event"):
            runtime.eventRecord(event.handle, self.handle)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        with translated("waiting for an event on a stream"):
            runtime.streamWaitEvent(self.handle, event.handle)

    @property
    def is_idle(self) -> bool:
        return is_done(runtime.streamQuery, self.handle)

    def synchronize(self) -> None:
        with translated("waiting for a stream"):
            runtime.streamSynchronize(self.handle)

    def begin_timing(self) -> None:
        with translated("recording an event"):
            if self._timers is None:
                # Waiting for the second sleeps rather than spins.
                begin, end = (int(runtime.eventCreateWithFlags(runtime.eventBlockingSync)) for _ in range(2))
                self._timers = begin, end
            runtime.eventRecord(self._timers[0], self.handle)

    def end_timing(self) -> None:
        assert self._timers is not None
        begin, end = self._timers
        with translated("waiting for a stream"):
            runtime.eventRecord(end, self.handle)
            give_up_ns = time.monotonic_ns() + _GLANCE_NS
            while not is_done(runtime.eventQuery, end) and time.monotonic_ns() < give_up_ns:
                pass
            runtime.eventSynchronize(end)
            self._traffic.device_ns += int(runtime.eventElapsedTime(begin, end) * 1e6)

    def begin_capture(self) -> None:
        with translated("beginning a capture"):
            # Other threads and libraries may allocate meanwhile.
            runtime.streamBeginCapture(self.handle, runtime.streamCaptureModeThreadLocal)

    def end_capture(self) -> Graph:
        with translated("ending a capture"):
            return CudaGraph(runtime.streamEndCapture(self.handle))

    def launch(self, graph: Graph) -> None:
        assert isinstance(graph, CudaGraph)
        self._traffic.graph_launches += 1
        with translated("launching a graph"):
            runtime.graphLaunch(graph.handle, self.handle)

    def close(self) -> None:
        if self.handle:
            handle, self.handle = self.handle, 0
            with contextlib.suppress(DeviceError), translated("giving a stream back"):
                for timer in self._timers or ():
                    runtime.eventDestroy(timer)
                runtime.streamDestroy(handle)


class CudaDevice(Device):
    """One GPU, made current for the calling thread; its context is this process's only one."""

    def __init__(self, index: int) -> None:
        """Open the GPU with this number.

        Raises:
            Unsupported: there is no driver, or no such device.
        """
        self.kind = "cuda"
        self.index = index
        self.traffic = Traffic()
        try:
            count = int(runtime.getDeviceCount())
        except runtime.CUDARuntimeError as error:
            raise Unsupported(f"CUDA cannot be used here: {error}") from None
        if not 0 <= index < count:
            raise Unsupported(f"there is no CUDA device {index}; this process sees {count}")
        with translated("opening the device"):
            runtime.setDevice(index)

    @property
    def compute_capability(self) -> str:
        major = runtime.deviceGetAttribute(_COMPUTE_CAPABILITY_MAJOR, self.index)
        minor = runtime.deviceGetAttribute(_COMPUTE_CAPABILITY_MINOR, self.index)
        return f"{major}.{minor}"

    @property
    def name(self) -> str:
        name: bytes = runtime.getDeviceProperties(self.index)["name"]
        return name.decode(errors="replace")

    @contextlib.contextmanager
    def current(self) -> Generator[None]:
        with translated("choosing the device"):
            former = int(runtime.getDevice())
            if former != self.index:
                runtime.setDevice(self.index)
        try:
            yield
        finally:
            if former != self.index:
                runtime.setDevice(former)

    def wait_default_stream(self) -> None:
        with self.current(), translated("waiting for the default stream"):
            runtime.streamSynchronize(0)

    def allocate(self, byte_size: int) -> Memory:
        with translated(f"allocating {byte_size} bytes"):
            return CudaMemory(int(runtime.malloc(max(byte_size, 1))), byte_size, is_opened=False)

    def pin(self, address: int, byte_size: int) -> Pin:
        if byte_size <= 0:
            # CUDA reports it at the next call that has nothing to do with it (FACTS 2).
            raise DeviceError("a range of 0 bytes cannot be page-locked")
        with translated("locking pages"):
            runtime.hostRegister(address, byte_size, _HOST_REGISTER_PORTABLE)
        return CudaPin(address)

    def make_stream(self, priority: int = 0) -> Stream:
        with translated("making a stream"):
            if priority == 0:
                handle = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
            else:
                # CUDA's lower numbers are more important; what is out of range is taken as its end.
                handle = runtime.streamCreateWithPriority(runtime.streamNonBlocking, -5 if priority < 0 else 0)
            return CudaStream(int(handle), self.traffic)

    def make_event(self) -> Event:
        flags = runtime.eventDisableTiming | runtime.eventBlockingSync
        with translated("making an event"):
            return CudaEvent(int(runtime.eventCreateWithFlags(flags)))

    def export_memory(self, memory: Memory) -> bytes:
        with translated("exporting memory"):
            return bytes(runtime.ipcGetMemHandle(memory.address))

    def open_memory(self, handle: bytes, byte_size: int) -> Memory:
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(f"a memory handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        with translated("opening exported memory"):
            address = int(runtime.ipcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess))
        memory = CudaMemory(address, byte_size, is_opened=True)
        try:
            size = allocation_bytes(address)
            if byte_size > size:
                raise DeviceError(f"the exported memory has {size} bytes, not {byte_size}")
        except DeviceError:
            memory.close()
            raise
        return memory

    def memory_info(self) -> tuple[int, int]:
        with translated("asking for free memory"):
            free, total = runtime.memGetInfo()
            return int(free), int(total)


#: cudaDeviceAttr; CuPy has no names for them.
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76

#: cudaHostRegisterPortable: for every context; CuPy has no name for it.
_HOST_REGISTER_PORTABLE = 1


def allocation_bytes(address: int) -> int:
    """Return how many bytes follow ``address`` in its allocation (``cuMemGetAddressRange``).

    Raises:
        DeviceError: the address is in none.
    """
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    status = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    if status != 0:
        raise DeviceError(f"the driver does not know the memory (CUresult {status})")
    return base.value + size.value - address
