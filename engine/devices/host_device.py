"""The host as a device: its memory is a second place in this machine's memory, its streams do everything at once.

Keeps the whole contract of :mod:`forebay.engine.devices.base`, so that everything above it is tested without a GPU.
Exported memory is reached through ``/proc/<pid>/fd/<fd>``; the kernel allows it to processes of the same user.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable

from forebay.engine.devices.base import (
    HANDLE_BYTES,
    Device,
    DeviceError,
    DeviceMemoryFull,
    Event,
    Graph,
    Memory,
    Pin,
    Stream,
    Traffic,
)

#: pid, descriptor, bytes, device; the rest of the handle is zero.
_HANDLE = struct.Struct("<QQQQ")


class HostMemory(Memory):
    """A mapping of a memory file."""

    def __init__(self, fd: int, byte_size: int) -> None:
        """Take ownership of ``fd``."""
        self.fd = fd
        self.byte_size = byte_size
        self._map: mmap.mmap | None = mmap.mmap(fd, max(byte_size, 1))
        # The object that exports the address would keep the mapping open.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        if self._map is None:
            return
        self._map.close()
        self._map = None
        os.close(self.fd)


class HostPin(Pin):
    """Does nothing: every copy is done at once."""

    def __init__(self, ranges: dict[int, int], address: int) -> None:
        self._ranges = ranges
        self._address = address

    def close(self) -> None:
        self._ranges.pop(self._address, None)


class HostEvent(Event):
    """Is done as soon as it is recorded."""

    @property
    def is_done(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def close(self) -> None:
        return


class HostGraph(Graph):
    """A list of calls."""

    def __init__(self, steps: list[Callable[[], None]]) -> None:
        self.steps = steps

    def close(self) -> None:
        self.steps = []


class HostStream(Stream):
    """Does everything before it returns, except while it captures."""

    def __init__(self, traffic: Traffic) -> None:
        self.handle = 0
        self._traffic = traffic
        self._captured: list[Callable[[], None]] | None = None
        self._began_ns = 0

    def do(self, step: Callable[[], None]) -> None:
        """Do, or capture, any call: what a kernel is to a GPU."""
        if self._captured is None:
            step()
        else:
            self._captured.append(step)

    def copy_in(self, target: int, source: int, byte_size: int) -> None:
        def step() -> None:
            self._traffic.copies_in += 1
            self._traffic.bytes_in += byte_size
            ctypes.memmove(target, source, byte_size)

        self.do(step)

    def copy_out(self, target: int, source: int, byte_size: int) -> None:
        def step() -> None:
            self._traffic.copies_out += 1
            self._traffic.bytes_out += byte_size
            ctypes.memmove(target, source, byte_size)

        self.do(step)

    def copy_within(self, target: int, source: int, byte_size: int) -> None:
        self.do(lambda: _discard(ctypes.memmove(target, source, byte_size)))

    def clear(self, target: int, byte_size: int) -> None:
        self.do(lambda: _discard(ctypes.memset(target, 0, byte_size)))

    def record(self, event: Event) -> None:
        return

    def wait(self, event: Event) -> None:
        return

    @property
    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self._captured is not None:
            # As CUDA does: waiting cannot be part of a graph.
            self._captured = None
            raise DeviceError("a stream that captures cannot be waited for; the capture has ended")

    def begin_timing(self) -> None:
        self._began_ns = time.monotonic_ns()

    def end_timing(self) -> None:
        self.synchronize()
        self._traffic.device_ns += time.monotonic_ns() - self._began_ns

    def begin_capture(self) -> None:
        if self._captured is not None:
            raise DeviceError("the stream captures already")
        self._captured = []

    def end_capture(self) -> Graph:
        if self._captured is None:
            raise DeviceError("the stream does not capture")
        graph = HostGraph(self._captured)
        self._captured = None
        return graph

    def launch(self, graph: Graph) -> None:
        assert isinstance(graph, HostGraph)
        self._traffic.graph_launches += 1
        for step in graph.steps:
            step()

    def close(self) -> None:
        return


class HostDevice(Device):
    """This machine's own memory."""

    def __init__(self, index: int = 0) -> None:
        """Open it as the device of this number, for tests of what several GPUs do."""
        self.kind = "host"
        self.index = index
        self.traffic = Traffic()
        self._pinned: dict[int, int] = {}

    @property
    def name(self) -> str:
        return "host"

    @property
    def compute_capability(self) -> str:
        return "0.0"

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait_default_stream(self) -> None:
        return

    def allocate(self, byte_size: int) -> Memory:
        free, _total = self.memory_info()
        if byte_size > free:
            # The kernel would try all the same, and end processes on the way.
            raise DeviceMemoryFull(f"no room for {byte_size} bytes on the host, which has {free}")
        fd = os.memfd_create("forebay-device", os.MFD_CLOEXEC)
        try:
            # Fails now, where there is no room, and not with SIGBUS later.
            os.posix_fallocate(fd, 0, max(byte_size, 1))
            return HostMemory(fd, byte_size)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise DeviceMemoryFull(f"no room for {byte_size} bytes on the host: {error}") from None

    def pin(self, address: int, byte_size: int) -> Pin:
        if byte_size <= 0:
            raise DeviceError("a range of 0 bytes cannot be page-locked")
        if any(address < start + size and start < address + byte_size for start, size in self._pinned.items()):
            raise DeviceError("the range is page-locked already")
        self._pinned[address] = byte_size
        return HostPin(self._pinned, address)

    def make_stream(self, priority: int = 0) -> HostStream:
        return HostStream(self.traffic)

    def make_event(self) -> Event:
        return HostEvent()

    def export_memory(self, memory: Memory) -> bytes:
        assert isinstance(memory, HostMemory)
        return _HANDLE.pack(os.getpid(), memory.fd, memory.byte_size, self.index).ljust(HANDLE_BYTES, b"\0")

    def open_memory(self, handle: bytes, byte_size: int) -> Memory:
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(f"a memory handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        pid, fd, size, index = _HANDLE.unpack_from(handle)
        if pid == os.getpid():
            # CUDA refuses it too; code that is tested here must not rely on it.
            raise DeviceError("a process cannot open memory that it exported itself")
        if index != self.index:
            raise DeviceError(f"the memory is on device {index}, not on {self.index}")
        if byte_size > size:
            raise DeviceError(f"the exported memory has {size} bytes, not {byte_size}")
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(f"the memory handle leads nowhere: {error.strerror}") from None
        if os.fstat(own).st_size < max(byte_size, 1):
            os.close(own)
            raise DeviceError("the memory handle leads to something else")
        return HostMemory(own, byte_size)

    def memory_info(self) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _discard(_value: object) -> None:
    return
