"""What the data plane asks of a device. Used by worker processes only.

Two implementations: :mod:`forebay.engine.devices.host_device`, in plain memory, which tests and machines without a GPU
use, and :mod:`forebay.engine.devices.cuda_device`. A place in memory is its address as an integer, as frameworks take
it; whose it is follows from the call: ``copy_in`` goes from the host to the device, ``copy_out`` back.

Ownership: whoever calls ``allocate``, ``open_memory``, ``pin``, ``make_stream`` or ``make_event`` closes what it got.
"""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Internal

#: Bytes of an exported memory or event handle; CUDA's size, and ours (spec H-193).
HANDLE_BYTES = 64

#: Where blocks begin; CUDA's own allocations have this alignment.
ALIGNMENT_BYTES = 256


class DeviceError(Internal):
    """The device refused something; it can be used on."""


class DeviceMemoryFull(DeviceError):
    """No room on the device."""


class DeviceBroken(DeviceError):
    """The device's context is poisoned: nothing works any more in this process, which should end (and be replaced)."""


_SHOWN_WORDS = (
    InstanceCounter.DEVICE_COPIES_IN,
    InstanceCounter.DEVICE_BYTES_IN,
    InstanceCounter.DEVICE_BYTES_OUT,
    InstanceCounter.DEVICE_NS,
    InstanceCounter.GRAPH_LAUNCHES,
)


@dataclass(slots=True)
class Traffic:
    """What has crossed between host and device so far."""

    copies_in: int = 0
    bytes_in: int = 0
    copies_out: int = 0
    bytes_out: int = 0
    graph_launches: int = 0
    device_ns: int = 0
    """How long the device was busy with timed work."""
    _counters: memoryview | None = None
    _shown: tuple[int, ...] = (0,) * len(_SHOWN_WORDS)

    def show_in(self, counters: memoryview | None) -> None:
        """From now on have :meth:`publish` show what is new; what loading a model took is not.

        Args:
            counters: uint64, an instance's block, which outlives the process; None: show nothing.
        """
        self._counters = counters
        self._shown = self._now()

    def _now(self) -> tuple[int, ...]:
        return self.copies_in, self.bytes_in, self.bytes_out, self.device_ns, self.graph_launches

    def publish(self) -> None:
        """Add what is new to the counters, for metrics."""
        counters = self._counters
        if counters is not None:
            now = self._now()
            for word, value, shown in zip(_SHOWN_WORDS, now, self._shown, strict=True):
                counters[word] += value - shown
            self._shown = now


class Closable(abc.ABC):
    """Something of the device's that must be given back; also a context manager."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give it back; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Memory(Closable):
    """A block of device memory."""

    address: int
    byte_size: int


class Pin(Closable):
    """A page-locked range of host memory."""


class Event(Closable):
    """A point in a stream's work: recorded by a stream, waited for by other streams or by the host."""

    @property
    @abc.abstractmethod
    def is_done(self) -> bool:
        """True if all work before the recording is done, or nothing was recorded yet."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Block until it is done."""


class Graph(Closable):
    """Work that was captured once, to be launched again and again with the same addresses."""


class Stream(Closable):
    """Work in order. Calls return before it is done, unless they say otherwise; addresses stay valid until then."""

    #: What frameworks take as a stream: ``cudaStream_t`` as an integer, 0 on the host.
    handle: int

    @abc.abstractmethod
    def copy_in(self, target: int, source: int, byte_size: int) -> None:
        """Copy from host address ``source`` to device address ``target``."""

    @abc.abstractmethod
    def copy_out(self, target: int, source: int, byte_size: int) -> None:
        """Copy from device address ``source`` to host address ``target``."""

    @abc.abstractmethod
    def copy_within(self, target: int, source: int, byte_size: int) -> None:
        """Copy on the device."""

    @abc.abstractmethod
    def clear(self, target: int, byte_size: int) -> None:
        """Fill device memory with zero bytes."""

    @abc.abstractmethod
    def record(self, event: Event) -> None:
        """Make ``event`` stand for all work so far."""

    @abc.abstractmethod
    def wait(self, event: Event) -> None:
        """Do what follows only after ``event``."""

    @property
    @abc.abstractmethod
    def is_idle(self) -> bool:
        """True if all work is done."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Block until all work of this stream is done; other streams are not waited for.

        Raises:
            DeviceBroken: some of it failed.
        """

    @abc.abstractmethod
    def begin_timing(self) -> None:
        """Measure, on the device, from here on."""

    @abc.abstractmethod
    def end_timing(self) -> None:
        """Wait as :meth:`synchronize` does, and count the time since :meth:`begin_timing`."""

    @abc.abstractmethod
    def begin_capture(self) -> None:
        """Record what follows instead of doing it."""

    @abc.abstractmethod
    def end_capture(self) -> Graph:
        """Return what was recorded since ``begin_capture``.

        Raises:
            DeviceError: some of it cannot be captured; the stream can be used on.
        """

    @abc.abstractmethod
    def launch(self, graph: Graph) -> None:
        """Do what a graph holds."""


class Device(abc.ABC):
    """One device of this process. Not thread-safe."""

    #: ``host`` or ``cuda``
    kind: str
    index: int
    traffic: Traffic

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As people know it, for example ``NVIDIA H100 80GB HBM3``."""

    @property
    @abc.abstractmethod
    def compute_capability(self) -> str:
        """For example ``9.0``; what plans and libraries are built for."""

    @abc.abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Make it the calling thread's device for a while: threads of a model's own may have another."""

    @abc.abstractmethod
    def wait_default_stream(self) -> None:
        """Block until the work is done that libraries have begun without naming a stream.

        Raises:
            DeviceBroken: some of it failed.
        """

    @abc.abstractmethod
    def allocate(self, byte_size: int) -> Memory:
        """Return a block, uninitialised, aligned to :data:`ALIGNMENT_BYTES`; of one byte if ``byte_size`` is 0.

        Raises:
            DeviceMemoryFull: there is no room.
        """

    @abc.abstractmethod
    def pin(self, address: int, byte_size: int) -> Pin:
        """Page-lock a range of host memory, so that copies from and to it are asynchronous and fast.

        The range must stay mapped, and populated, until the pin is closed.

        Raises:
            DeviceError: it cannot be locked, or overlaps a locked range.
        """

    @abc.abstractmethod
    def make_stream(self, priority: int = 0) -> Stream:
        """Return a stream that never waits for others by itself.

        Args:
            priority: -1 for more important, 1 for less, where the device knows the difference.
        """

    @abc.abstractmethod
    def make_event(self) -> Event:
        """Return an event."""

    @abc.abstractmethod
    def export_memory(self, memory: Memory) -> bytes:
        """Return a handle of :data:`HANDLE_BYTES` that another process can open while this one keeps the block."""

    @abc.abstractmethod
    def open_memory(self, handle: bytes, byte_size: int) -> Memory:
        """Map a block of another process.

        Raises:
            DeviceError: the handle leads nowhere, the block is smaller, or it is this process's own.
        """

    @abc.abstractmethod
    def memory_info(self) -> tuple[int, int]:
        """Return (free, total) bytes."""
