"""Places in device memory that clients have registered, as requests name them. Frontends never open any of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.regions import check_place


class DevicePlace(msgspec.Struct, frozen=True):
    """Where a tensor lies, or shall lie."""

    memory: DeviceMemory
    offset: int
    byte_size: int
    """Of an output: how much room there is."""
    courier: ModelEntry
    """Who carries it for models that do not live on the memory's GPU."""


class DeviceRegion:
    """A registered part of a client's device memory.

    ``uses`` counts requests; a region that is taken away stays open in the workers until the last of them has ended
    (spec H-194). The supervisor waits for that, though not for ever: what has not run by then fails cleanly, see
    ``engine/worker/device_memories.py``.
    """

    __slots__ = ("_is_gone", "_on_unused", "_uses", "courier", "memory", "name")

    def __init__(self, name: str, memory: DeviceMemory, courier: ModelEntry, on_unused: Callable[[int], None]) -> None:
        """
        Args:
            on_unused: told the memory's number when the region was taken away and no request uses it.
        """
        self.name = name
        self.memory = memory
        #: Who carries tensors for models that do not live on its GPU.
        self.courier = courier
        self._on_unused = on_unused
        self._uses = 0
        self._is_gone = False

    def check(self, offset: int, byte_size: int) -> None:
        """Raise InvalidArgument unless the place lies in the region (spec H-200)."""
        check_place(self.name, self.memory.byte_size, offset, byte_size)

    def acquire(self) -> None:
        """A request uses the region."""
        self._uses += 1

    def release(self) -> None:
        """A request has ended."""
        self._uses -= 1
        self._report_if_unused()

    def retire(self) -> None:
        """It is not registered any more."""
        self._is_gone = True
        self._report_if_unused()

    def _report_if_unused(self) -> None:
        if self._is_gone and not self._uses:
            self._on_unused(self.memory.number)


#: Output name to where it goes.
Targets = Mapping[str, DevicePlace]
NO_TARGETS: Targets = {}


class HeadMemories:
    """The device memories of one request's head, each named once."""

    __slots__ = ("memories",)

    def __init__(self) -> None:
        self.memories: list[DeviceMemory] = []

    def place(self, name: str, datatype: str, shape: tuple[int, ...], place: DevicePlace) -> TensorPlace:
        """Return a place as a worker is told of it."""
        if place.memory not in self.memories:
            self.memories.append(place.memory)
        number = self.memories.index(place.memory) + 1
        return TensorPlace(name, datatype, shape, place.offset, place.byte_size, memory=number)

    def targets(self, targets: Targets) -> tuple[TensorPlace, ...]:
        """Return where outputs go, as a worker is told."""
        return tuple(self.place(name, "", (), target) for name, target in targets.items())
