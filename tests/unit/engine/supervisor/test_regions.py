"""The registry of clients' shared memory: what frontends are told, and what waits for them."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from forebay.engine.supervisor import regions as module
from forebay.engine.supervisor.regions import RegionRegistry
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from forebay.ipc.frontend_messages import RegionDown, RegionUp
from forebay.ipc.messages import DeviceMemory, Message


@pytest.fixture
def key() -> Iterator[str]:
    name = f"forebay-unit-{os.getpid()}-{secrets.token_hex(4)}"
    with open(f"/dev/shm/{name}", "wb") as file:
        file.write(bytes(4096))
    yield f"/{name}"
    if os.path.exists(f"/dev/shm/{name}"):
        os.unlink(f"/dev/shm/{name}")


class Frontend:
    """Remembers what it was sent; says at once that it has seen it, unless told otherwise."""

    def __init__(self, registry: RegionRegistry, number: int, *, answers: bool = True) -> None:
        self.messages: list[Message] = []
        self._registry = registry
        self._number = number
        self._answers = answers
        #: Requests use every CUDA region, until :meth:`end_requests`.
        self.is_busy = False
        #: Of the CUDA regions that it knows, by name.
        self._memories: dict[str, int] = {}
        registry.attach(number, self)

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        assert len(fds) == (1 if isinstance(message, RegionUp) and message.memory is None else 0)
        self.messages.append(message)
        if isinstance(message, RegionUp) and message.memory is not None:
            self._memories[message.name] = message.memory.number
        if self._answers:
            self.confirm()
        return True

    def confirm(self) -> None:
        last = self.messages[-1]
        assert isinstance(last, RegionUp | RegionDown)
        self._registry.note_seen(self._number, last.generation)
        if isinstance(last, RegionDown) and not self.is_busy:
            self.end_requests()

    def end_requests(self) -> None:
        last = self.messages[-1]
        assert isinstance(last, RegionDown)
        for number in (self._memories[name] for name in last.names if name in self._memories):
            self._registry.note_unused(self._number, number)


def arguments(name: str, key: str = "", byte_size: int = 0, offset: int = 0, kind: str = "system") -> dict[str, Any]:
    return {"kind": kind, "name": name, "key": key, "byte_size": byte_size, "offset": offset}


def test_every_frontend_knows_a_region_before_it_is_registered(key: str) -> None:
    async def scenario() -> None:
        registry = RegionRegistry()
        Frontend(registry, 1)
        late = Frontend(registry, 2, answers=False)
        task = asyncio.create_task(registry.register(arguments("a", key, 100, 7)))
        await asyncio.sleep(0.01)
        assert not task.done()
        late.confirm()
        await task
        assert late.messages == [RegionUp(generation=1, name="a", kind="system", offset=7, byte_size=100)]
        task = asyncio.create_task(registry.unregister(arguments("a")))
        await asyncio.sleep(0.01)
        assert not task.done()
        registry.detach(2)  # A frontend that has died is not waited for.
        await task
        assert late.messages[1] == RegionDown(generation=2, names=("a",))
        registry.close()

    asyncio.run(scenario())


def test_a_restarted_frontend_gets_all_regions(key: str) -> None:
    async def scenario() -> None:
        registry = RegionRegistry()
        await registry.register(arguments("b", key, 10))
        await registry.register(arguments("a", key, 20))
        frontend = Frontend(registry, 9)
        assert [message.name for message in frontend.messages if isinstance(message, RegionUp)] == ["b", "a"]
        registry.close()

    asyncio.run(scenario())


def test_status_and_errors(key: str) -> None:
    """H-191, H-193..H-196."""

    async def scenario() -> None:
        registry = RegionRegistry()
        await registry.register(arguments("b", key, 4096))
        await registry.register(arguments("a", key, 6, 4090))
        entry = {"name": "a", "key": key, "offset": 4090, "byte_size": 6}
        assert await registry.status(arguments("a")) == [entry]
        assert [each["name"] for each in await registry.status(arguments(""))] == ["a", "b"]
        assert await registry.status(arguments("", kind="cuda")) == []
        with pytest.raises(NotFound, match="Unable to find system shared memory region: 'z'"):
            await registry.status(arguments("z"))
        with pytest.raises(NotFound, match="Unable to find cuda shared memory region: 'z'"):
            await registry.status(arguments("z", kind="cuda"))
        with pytest.raises(NotFound, match="registered as system shared memory, not CUDA shared memory"):
            await registry.status(arguments("a", kind="cuda"))
        with pytest.raises(AlreadyExists, match="shared memory region 'a' already in manager"):
            await registry.register(arguments("a", key, 1))
        for size, offset in ((4097, 0), (1, 4096), (0, 0), (-1, 0), (1, -1)):
            with pytest.raises(InvalidArgument, match="failed to register shared memory region 'c': invalid args"):
                await registry.register(arguments("c", key, size, offset))
        with pytest.raises(InvalidArgument, match="failed to register CUDA shared memory region: 'c'"):
            await registry.register(arguments("c", kind="cuda"))
        for wrong in ({"kind": "x"}, arguments("c") | {"name": 5}, arguments("c", key) | {"offset": True}):
            with pytest.raises(InvalidArgument, match="control argument"):
                await registry.register(wrong)
        await registry.unregister(arguments("nobody"))
        await registry.unregister(arguments(""))
        assert await registry.status(arguments("")) == []

    asyncio.run(scenario())


def test_regions_of_clients_that_are_gone_make_room(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "REGIONS_MAX", 3)
        registry = RegionRegistry()
        frontend = Frontend(registry, 1)
        for name in "abc":
            await registry.register(arguments(name, key, 10))
        with pytest.raises(Unavailable, match="3 shared memory regions are registered"):
            await registry.register(arguments("d", key, 10))
        os.rename(f"/dev/shm{key}", f"/dev/shm{key}-old")
        os.unlink(f"/dev/shm{key}-old")
        replacement = os.open(f"/dev/shm{key}", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(replacement, 10)
        os.close(replacement)
        await registry.register(arguments("d", key, 10))
        assert [entry["name"] for entry in await registry.status(arguments(""))] == ["d"]
        assert RegionDown(generation=4, names=("a", "b", "c")) in frontend.messages
        registry.close()

    asyncio.run(scenario())


def test_abandoned_regions_are_reported_once(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(module.log, "warning", warnings.append)

    async def scenario() -> None:
        registry = RegionRegistry()
        await registry.register(arguments("a", key, 100))
        registry.report_abandoned()
        assert warnings == []
        os.unlink(f"/dev/shm{key}")
        registry.report_abandoned()
        registry.report_abandoned()
        [warning] = warnings
        assert warning.startswith("shared memory region 'a' has been unlinked")
        assert "100 bytes" in warning
        assert warning.endswith("/v2/systemsharedmemory/region/a/unregister")
        await registry.unregister(arguments("a"))
        assert await registry.status(arguments("")) == []
        registry.close()

    asyncio.run(scenario())


class Opener:
    """Couriers that open everything but what begins with a zero byte; remembers what was closed."""

    def __init__(self) -> None:
        self.opened: list[DeviceMemory] = []
        self.closed: list[DeviceMemory] = []

    async def open(self, memory: DeviceMemory) -> tuple[ModelEntry, str]:
        self.opened.append(memory)
        entry = ModelEntry(name="courier", version=1, state="READY", route=9)
        return entry, "invalid argument" if memory.handle.startswith(b"\0") else ""

    async def close(self, memory: DeviceMemory) -> None:
        self.closed.append(memory)


def device_arguments(name: str, handle: bytes = b"h" * 64, device_id: int = 1, byte_size: int = 8) -> dict[str, Any]:
    return {"kind": "cuda", "name": name, "raw_handle": handle, "device_id": device_id, "byte_size": byte_size}


def device_registry() -> tuple[RegionRegistry, Opener]:
    registry, opener = RegionRegistry(), Opener()
    registry.use_devices(opener, (0, 1))
    return registry, opener


def test_device_memory_stays_open_until_the_requests_that_use_it_have_ended() -> None:
    """H-194; a frontend that dies takes its requests along."""

    async def scenario() -> None:
        registry, opener = device_registry()
        for number in (1, 2):
            Frontend(registry, number).is_busy = True
        await registry.register(device_arguments("d"))
        task = asyncio.create_task(registry.unregister(arguments("d", kind="cuda")))
        await asyncio.sleep(0.01)
        assert await registry.status(arguments("", kind="cuda")) == []
        await registry.register(device_arguments("d"))  # The name is free at once.
        registry.note_unused(1, 1)
        await asyncio.sleep(0.01)
        assert not task.done()
        assert opener.closed == []
        registry.detach(2)
        await task
        assert opener.closed == opener.opened[:1]
        registry.close()

    asyncio.run(scenario())


def test_requests_that_go_on_for_ever_lose_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(module.log, "warning", warnings.append)
    monkeypatch.setattr(module, "_IN_USE_TIMEOUT_S", 0.02)

    async def scenario() -> None:
        registry, opener = device_registry()
        Frontend(registry, 1).is_busy = True
        await registry.register(device_arguments("d"))
        await registry.unregister(arguments("d", kind="cuda"))
        assert opener.closed == opener.opened
        registry.close()

    asyncio.run(scenario())
    [warning] = warnings
    assert "region 'd' was unregistered 0.02 s ago and is still in use" in warning


def test_device_memory_is_opened_by_couriers_and_closed_after_its_last_frontend() -> None:
    """H-195, H-196, H-201."""

    async def scenario() -> None:
        registry, opener = device_registry()
        frontend = Frontend(registry, 1)
        await registry.register(device_arguments("d"))
        [announced] = frontend.messages
        assert isinstance(announced, RegionUp)
        assert announced.memory == opener.opened[0] == DeviceMemory(0, 1, 1, 8, b"h" * 64)
        assert announced.courier is not None
        assert await registry.status(arguments("d", kind="cuda")) == [{"name": "d", "device_id": 1, "byte_size": 8}]
        with pytest.raises(AlreadyExists):
            await registry.register(device_arguments("d"))
        failed = "failed to register CUDA shared memory region 'e': "
        for wrong, text in (
            ({"device_id": 2}, "failed to open CUDA IPC handle: invalid device ordinal"),
            ({"handle": bytes(64)}, "failed to open CUDA IPC handle: invalid argument"),
            ({"byte_size": 0}, "invalid args"),
        ):
            with pytest.raises(InvalidArgument) as raised:
                await registry.register(device_arguments("e", **wrong))
            assert raised.value.text == failed + text
        late = Frontend(registry, 2, answers=False)
        task = asyncio.create_task(registry.unregister(arguments("", kind="cuda")))
        await asyncio.sleep(0.01)
        assert opener.closed == []
        late.confirm()
        await task
        assert opener.closed == opener.opened[:1]
        registry.close()

    asyncio.run(scenario())
