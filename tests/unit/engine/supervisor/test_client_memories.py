"""Device memory of shared-memory clients: how much each gets, and when it is freed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from forebay.engine.settings import DeviceBytes, GpuSettings
from forebay.engine.supervisor import client_memories as module
from forebay.engine.supervisor.client_memories import ClientMemories
from forebay.engine.supervisor.device_pools import DEFAULT_BYTES
from forebay.ipc.errors import AlreadyExists, InvalidArgument, Unavailable
from forebay.ipc.messages import DeviceMemory


class Maker:
    """Stands in for the couriers."""

    def __init__(self) -> None:
        self.worker = 1
        self.closed: list[tuple[int, int]] = []
        #: Workers close nothing before this.
        self.may_close = asyncio.Event()
        self.may_close.set()

    async def make(self, device_id: int, owner: int, number: int, byte_size: int) -> DeviceMemory:
        await asyncio.sleep(0)
        return DeviceMemory(owner, number, device_id, byte_size, b"handle")

    async def close(self, memory: DeviceMemory) -> None:
        await self.may_close.wait()
        self.closed.append((memory.owner, memory.number))

    def worker_of(self, device_id: int) -> int:
        return self.worker


def play(scenario: Callable[[ClientMemories, Maker], Awaitable[None]], pools: tuple[DeviceBytes, ...] = ()) -> None:
    async def run() -> None:
        memories, maker = ClientMemories(GpuSettings(memory_pool_byte_sizes=pools)), Maker()
        memories.use_maker(maker, (0, 1))
        await scenario(memories, maker)
        memories.stop()

    asyncio.run(run())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_each_client_gets_half_of_what_is_left() -> None:
    """F-151."""

    async def scenario(memories: ClientMemories, maker: Maker) -> None:
        made = await asyncio.gather(*(memories.make(client, 1, 0) for client in (7, 8)))
        assert [memory.byte_size for memory in made] == [DEFAULT_BYTES // 2, DEFAULT_BYTES // 4]
        assert (await memories.make(7, 2, 1)).byte_size == DEFAULT_BYTES // 2
        with pytest.raises(AlreadyExists, match="has memory on GPU 0 already"):
            await memories.make(7, 3, 0)
        await memories.close(7, 1, 0)
        assert (await memories.make(9, 1, 0)).byte_size == DEFAULT_BYTES * 3 // 8

    play(scenario)


def test_no_memory_where_none_is_configured_or_there_is_no_gpu() -> None:
    async def scenario(memories: ClientMemories, maker: Maker) -> None:
        with pytest.raises(Unavailable, match="--cuda-memory-pool-byte-size"):
            await memories.make(7, 1, 0)
        with pytest.raises(InvalidArgument, match="has no GPU 2"):
            await memories.make(7, 1, 2)
        await memories.close(7, 1, 2)
        assert maker.closed == []

    play(scenario, (DeviceBytes(device=0, byte_size=0),))


def test_a_client_that_is_gone_leaves_nothing() -> None:
    async def scenario(memories: ClientMemories, maker: Maker) -> None:
        for client in (7, 8):
            await memories.make(client, 5, 0)
        memories.forget(7)
        await settled()
        assert maker.closed == [(7, 5)]

    play(scenario)


def test_a_client_is_told_of_workers_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_TIMEOUT_S", 0.01)

    async def scenario(memories: ClientMemories, maker: Maker) -> None:
        maker.may_close.clear()
        for _ in range(2):
            with pytest.raises(Unavailable, match="still has the memory open, ask again"):
                await memories.close(7, 1, 0)
        maker.may_close.set()
        await memories.close(7, 1, 0)
        assert maker.closed == [(7, 1)]

    play(scenario)


def test_clients_are_told_when_a_courier_ends() -> None:
    async def scenario(memories: ClientMemories, maker: Maker) -> None:
        lost: list[tuple[int, int]] = []
        memories.on_lost = lambda client, number: lost.append((client, number))
        await memories.make(7, 5, 0)
        memories.note_couriers()
        assert lost == []
        maker.worker = 2
        memories.note_couriers()
        assert lost == [(7, 5)]
        assert (await memories.make(7, 6, 0)).byte_size == DEFAULT_BYTES // 2

    play(scenario)
