"""Room in device memory for outputs, and how workers are told of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from forebay.ipc.arena import align
from forebay.ipc.messages import DeviceMemory, Rooms, TensorPlace


class DeviceRoom(Protocol):
    """Bytes of a device memory."""

    @property
    def memory(self) -> DeviceMemory: ...

    @property
    def offset(self) -> int: ...

    @property
    def byte_size(self) -> int: ...


#: A client that has no device memory of its own.
NO_OUTPUT_ROOMS: Mapping[str, DeviceRoom] = {}


def device_targets(
    memories: Sequence[DeviceMemory], rooms: Mapping[str, DeviceRoom | None]
) -> tuple[tuple[DeviceMemory, ...], tuple[TensorPlace, ...]]:
    """Return the device memories of a request, and where in them its outputs go, as a worker is told.

    Args:
        memories: that its inputs lie in.
        rooms: of outputs by name; None: there is none yet.
    """
    named = list(memories)
    targets: list[TensorPlace] = []
    for name, room in rooms.items():
        if room is None:
            targets.append(TensorPlace(name, "", (), 0, 0))
            continue
        if room.memory not in named:
            named.append(room.memory)
        targets.append(TensorPlace(name, "", (), room.offset, room.byte_size, memory=named.index(room.memory) + 1))
    return tuple(named), tuple(targets)


def lent_rooms(rooms: Mapping[str, DeviceRoom]) -> Rooms:
    """Return what a worker is told of rooms that were lent for outputs that wait, by name."""
    return Rooms(*device_targets((), rooms))


def bytes_without_room(needs: Mapping[str, int], rooms: Mapping[str, DeviceRoom]) -> int:
    """Return how many bytes of a reply block outputs take that wait on a device and were given no room there."""
    return sum(align(byte_size) for name, byte_size in needs.items() if name not in rooms)
