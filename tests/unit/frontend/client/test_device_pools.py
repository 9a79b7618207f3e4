"""A client's device memory: when it is asked for, and when it is given back."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import pytest

from forebay.client import device_pools as module
from forebay.client.device_pools import DevicePools
from forebay.ipc.messages import DeviceMemory


class Door:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.memories: deque[DeviceMemory] = deque()
        self.lost_memories: deque[int] = deque()
        self.asked: list[tuple[int, int]] = []
        self.given_back: list[int] = []

    def ask_memory(self, number: int, device_id: int) -> None:
        self.asked.append((number, device_id))

    def give_memory_back(self, number: int, device_id: int) -> None:
        self.given_back.append(number)

    def answer(self, byte_size: int) -> int:
        """Say yes to the last question; return the memory's number."""
        number, device_id = self.asked[-1]
        self.memories.append(DeviceMemory(0, number, device_id, byte_size, b"handle"))
        return number


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def pools(door: Door) -> DevicePools:
    return DevicePools(cast("Any", door))


def test_memory_is_asked_for_once_and_used_when_it_comes(door: Door, pools: DevicePools) -> None:
    assert pools.take(1, 10) is None
    assert pools.take(1, 10) is None
    assert [device_id for _number, device_id in door.asked] == [1]
    number = door.answer(1024)
    leases = [pools.take(1, 300), pools.take(1, 10)]
    assert [(lease.memory.number, lease.offset) for lease in leases if lease is not None] == [
        (number, 0),
        (number, 512),
    ]
    assert pools.take(1, 300) is None
    del leases
    assert pools.take(1, 1024) is not None


def test_memory_that_was_refused_is_asked_for_again_later(
    door: Door, pools: DevicePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_FIRST_NS", 0)
    pools.take(0, 10)
    pools.take(0, 10)
    assert len(door.asked) == 2


def test_memory_that_is_lost_is_given_back_when_nobody_uses_it(door: Door, pools: DevicePools) -> None:
    closed: list[int] = []
    pools.on_over = lambda memory: closed.append(memory.number)
    pools.take(0, 10)
    number = door.answer(1024)
    lease = pools.take(0, 10)
    assert lease is not None
    door.lost_memories.append(number)
    assert pools.take(0, 10) is None
    assert (len(door.asked), door.given_back) == (2, [])
    del lease
    pools.take(0, 10)
    assert (closed, door.given_back) == ([number], [number])


def test_what_an_output_does_not_use_of_its_room_is_free_again(door: Door, pools: DevicePools) -> None:
    pools.take(0, 1)
    door.answer(1024)
    lease = pools.take(0, 1000)
    assert lease is not None
    lease.shrink(300)
    second = pools.take(0, 512)
    assert second is not None
    assert (lease.byte_size, second.offset) == (300, 512)
    lease.shrink(257)
    del lease
    assert pools.take(0, 512) is not None
