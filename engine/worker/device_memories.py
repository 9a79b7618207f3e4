"""Device memory of other processes, as a worker on that device has it open.

Clients' CUDA regions, and what shared-memory clients export themselves, come with the requests that use them: a handle
that this worker opens when it first meets it and keeps open. Its owner must not free the memory before everybody has
closed it, so that MEMORY_DOWN is answered when this worker has. A courier also makes memory, for frontends.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from forebay.engine.devices.base import Device, DeviceError, Memory
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.messages import DeviceMemory

#: Memories open at a time; beyond that the one that was used longest ago is closed.
OPEN_MAX = 1024

#: Memories that are known to be gone; the oldest are forgotten.
_GONE_MAX = 4096

#: Owner (a producer's id, 0 for clients' regions) and number.
MemoryKey = tuple[int, int]


class DeviceMemories:
    """What one instance has open on its device. Thread-safe: models answer from threads of their own."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._open: OrderedDict[MemoryKey, tuple[DeviceMemory, Memory]] = OrderedDict()
        self._gone: OrderedDict[MemoryKey, None] = OrderedDict()
        #: Our own, which others open.
        self._made: dict[MemoryKey, Memory] = {}

    def make(self, key: MemoryKey, byte_size: int) -> bytes:
        """Allocate memory that is kept until :meth:`forget`, whatever becomes of its owner; return its handle.

        Raises:
            DeviceMemoryFull: there is no room.
            DeviceError: it cannot be exported.
        """
        memory = self._device.allocate(byte_size)
        try:
            handle = self._device.export_memory(memory)
        except DeviceError:
            memory.close()
            raise
        self._made[key] = memory
        return handle

    def address(self, key: MemoryKey, memory: DeviceMemory, offset: int, byte_size: int) -> int:
        """Return the address of a place in a memory, which is opened if it is not yet.

        Raises:
            InvalidArgument: the place is outside of it, it is on another device, or it was taken away.
            DeviceError: it cannot be opened.
        """
        if offset < 0 or byte_size < 0 or offset + byte_size > memory.byte_size:
            raise InvalidArgument(f"a tensor of {byte_size} bytes at {offset} lies outside of its device memory")
        if memory.device_id != self._device.index:
            raise InvalidArgument(f"a tensor lies on device {memory.device_id}, the model on {self._device.index}")
        if key in self._gone:
            raise InvalidArgument("a tensor lies in device memory that was taken away from the server")
        with self._lock:
            return self._opened(key, memory).address + offset

    def _opened(self, key: MemoryKey, memory: DeviceMemory) -> Memory:
        known = self._open.get(key)
        if known is None or known[0] != memory:
            if known is not None:
                self._close(key)
            if len(self._open) >= OPEN_MAX:
                self._close(next(iter(self._open)))
            with self._device.current():
                opened = self._device.open_memory(memory.handle, memory.byte_size)
            known = self._open[key] = (memory, opened)
        self._open.move_to_end(key)
        return known[1]

    def forget(self, key: MemoryKey) -> None:
        """Close or free a memory, and never open it again."""
        self._close(key)
        made = self._made.pop(key, None)
        if made is not None:
            made.close()
        self._gone[key] = None
        if len(self._gone) > _GONE_MAX:
            self._gone.popitem(last=False)

    def forget_owner(self, owner: int) -> None:
        """A producer is gone, and its memories with it."""
        with self._lock:
            for key in [key for key in self._open if key[0] == owner]:
                self._close(key)

    def close(self) -> None:
        for key in list(self._open):
            self._close(key)
        while self._made:
            self._made.popitem()[1].close()

    def _close(self, key: MemoryKey) -> None:
        with self._lock:
            found = self._open.pop(key, None)
            if found is not None:
                with self._device.current():
                    found[1].close()
