"""The regions of shared memory that clients register (spec H-190..H-203): opened here, handed to every frontend.

A CUDA region is a handle that the courier of its GPU opens in our stead; frontends and workers get the handle.

::

    frontend -- region_register --> supervisor: open, check, remember
                                    supervisor -- RegionUp, descriptor --> every frontend
                                    supervisor <-- RegionsSeen ----------- every frontend
    frontend <-- reply ------------ supervisor

    frontend -- region_unregister -> supervisor: forget
                                    supervisor -- RegionDown ------------> every frontend: for no further request
                                    supervisor <-- RegionsSeen ----------- every frontend
                                    supervisor <-- RegionUnused ---------- every frontend, of a CUDA region: its last
                                                                           request has ended
    frontend <-- reply ------------ supervisor: closed

so that a client may use a region in any protocol once it has the reply. A frontend that is restarted gets all of them
again. Regions are opened once and never by name again: clients unlink the name while they still use the memory.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from forebay.ipc.frontend_messages import RegionDown, RegionUp
from forebay.ipc.log import log
from forebay.ipc.messages import DeviceMemory, Message
from forebay.ipc.regions import open_shared_memory

#: Regions at most: each is a descriptor here and in every frontend.
REGIONS_MAX = 1024

#: Bytes of a region's name at most.
_NAME_BYTES_MAX = 1024

#: How often to look for regions whose clients are gone, s.
_REPORT_S = 30.0

#: How long frontends may take to know a region, s.
_SEEN_TIMEOUT_S = 10.0

#: How long the requests that use a CUDA region may go on when it is taken away, s: shorter than clients wait for a
#: reply. Their owner frees the memory after it, so what has not run by then fails.
_IN_USE_TIMEOUT_S = 30.0

_TITLES = {"system": "system", "cuda": "CUDA"}


class DeviceOpener(Protocol):
    """Opens device memory elsewhere: the couriers."""

    async def open(self, memory: DeviceMemory) -> tuple[ModelEntry, str]: ...

    async def close(self, memory: DeviceMemory) -> None: ...


class Recipient(Protocol):
    """A frontend's process."""

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool: ...


@dataclass(frozen=True)
class _Registered:
    """One region of system memory. Owns ``fd``."""

    name: str
    key: str
    offset: int
    byte_size: int
    fd: int
    kind: ClassVar[str] = "system"

    @property
    def is_abandoned(self) -> bool:
        """Whether its name is gone, as after the end of the client that made it."""
        return os.fstat(self.fd).st_nlink == 0

    def status(self) -> dict[str, Any]:
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}

    def announcement(self, generation: int) -> tuple[RegionUp, tuple[int, ...]]:
        """Return what a frontend is told, and the descriptors that go with it."""
        message = RegionUp(
            generation=generation, name=self.name, kind=self.kind, offset=self.offset, byte_size=self.byte_size
        )
        return message, (self.fd,)

    async def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class _RegisteredDevice:
    """One region of device memory."""

    name: str
    memory: DeviceMemory
    courier: ModelEntry
    opener: DeviceOpener
    kind: ClassVar[str] = "cuda"
    #: Nobody but its GPU knows whether its client is still there.
    is_abandoned: ClassVar[bool] = False

    def status(self) -> dict[str, Any]:
        return {"name": self.name, "device_id": self.memory.device_id, "byte_size": self.memory.byte_size}

    def announcement(self, generation: int) -> tuple[RegionUp, tuple[int, ...]]:
        """Return what a frontend is told; no descriptors."""
        message = RegionUp(
            generation=generation,
            name=self.name,
            kind=self.kind,
            offset=0,
            byte_size=self.memory.byte_size,
            memory=self.memory,
            courier=self.courier,
        )
        return message, ()

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self.opener.close(self.memory), _SEEN_TIMEOUT_S)
        except TimeoutError:
            log.warning(f"a worker has not closed the CUDA shared memory region '{self.name}' yet")


@dataclass(frozen=True)
class _Leaving:
    """A region of device memory that no further request may use."""

    users: set[int]
    """Frontends with requests that use it."""
    is_unused: asyncio.Event = field(default_factory=asyncio.Event)

    def discard(self, frontend: int) -> None:
        self.users.discard(frontend)
        if not self.users:
            self.is_unused.set()


class RegionRegistry:
    """All regions of a server, and which frontends know them."""

    def __init__(self) -> None:
        self._regions: dict[str, _Registered | _RegisteredDevice] = {}
        #: Opens device memory; None: there are no GPUs.
        self.device_opener: DeviceOpener | None = None
        self._device_ids: tuple[int, ...] = ()
        self._numbers = itertools.count(1)
        self._frontends: dict[int, Recipient] = {}
        #: Changes so far, and up to which one each frontend knows them.
        self._generation = 0
        self._seen: dict[int, int] = {}
        #: Changes that wait until every frontend knows them, with their number.
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        #: Device memory that requests may still use though it was taken away, by number.
        self._leaving: dict[int, _Leaving] = {}
        self._reporting: asyncio.TimerHandle | None = None
        #: Regions that the log has named as abandoned.
        self._reported: set[str] = set()

    # --- frontends ---

    def attach(self, number: int, frontend: Recipient) -> None:
        """A frontend has been started: tell it every region."""
        self._frontends[number] = frontend
        self._seen[number] = self._generation
        for region in self._regions.values():
            frontend.send(*region.announcement(self._generation))

    def detach(self, number: int) -> None:
        """A frontend's process is gone."""
        if self._frontends.pop(number, None) is not None:
            self._seen.pop(number, None)
            self._notify()
            for leaving in self._leaving.values():
                leaving.discard(number)

    def note_seen(self, number: int, generation: int) -> None:
        """A frontend knows the regions as of a change."""
        if number in self._seen:
            self._seen[number] = max(self._seen[number], generation)
            self._notify()

    def note_unused(self, number: int, region_number: int) -> None:
        """No request of a frontend uses a region any more that was taken away."""
        leaving = self._leaving.get(region_number)
        if leaving is not None:
            leaving.discard(number)

    def _notify(self) -> None:
        known = min(self._seen.values(), default=self._generation)
        for generation, future in self._waiting:
            if generation <= known and not future.done():
                future.set_result(None)
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]

    async def _announce(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Tell every frontend of the latest change and wait until they know it."""
        for frontend in list(self._frontends.values()):
            frontend.send(message, fds)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((self._generation, future))
        self._notify()
        try:
            await asyncio.wait_for(future, _SEEN_TIMEOUT_S)
        except TimeoutError:
            log.warning("a frontend has not taken in a change of shared memory regions yet")

    # --- commands ---

    async def register(self, arguments: dict[str, Any]) -> None:
        """Carry out ``region_register``.

        Raises:
            ServingError: with Triton's texts (spec H-193, H-196).
        """
        kind, name = _kind(arguments), _text(arguments, "name")
        if len(name.encode(errors="replace")) > _NAME_BYTES_MAX:
            raise InvalidArgument(f"the name of a shared memory region has at most {_NAME_BYTES_MAX} bytes")
        if kind == "cuda" and self.device_opener is None:
            raise InvalidArgument(f"failed to register CUDA shared memory region: '{name}', GPUs not supported")
        await self._reclaim()
        self._check_is_new(name)
        region: _Registered | _RegisteredDevice
        if self.device_opener is not None and kind == "cuda":
            region = await self._open_device(self.device_opener, name, arguments)
            self._check_is_new(name)
        else:
            region = _open(name, _text(arguments, "key"), _number(arguments, "offset"), _number(arguments, "byte_size"))
        self._regions[name] = region
        self._reported.discard(name)
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(_REPORT_S, self._report)
        log.verbose(1, f"registered {_TITLES[kind]} shared memory region '{name}': {region.status()}")
        self._generation += 1
        await self._announce(*region.announcement(self._generation))

    def _check_is_new(self, name: str) -> None:
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")

    async def _open_device(self, opener: DeviceOpener, name: str, arguments: dict[str, Any]) -> _RegisteredDevice:
        """Have a courier open a client's device memory (spec H-196).

        Raises:
            InvalidArgument: it leads nowhere, there is no such GPU, or it has fewer bytes than the client says.
        """
        raw_handle = arguments.get("raw_handle")
        memory = DeviceMemory(
            owner=0,
            number=next(self._numbers),
            device_id=_number(arguments, "device_id"),
            byte_size=_number(arguments, "byte_size"),
            handle=raw_handle if isinstance(raw_handle, bytes) else b"",
        )
        failure = f"failed to register CUDA shared memory region '{name}': "
        if memory.byte_size <= 0:
            raise InvalidArgument(f"{failure}invalid args")
        if memory.device_id not in self._device_ids:
            raise InvalidArgument(f"{failure}failed to open CUDA IPC handle: invalid device ordinal")
        courier, problem = await opener.open(memory)
        if problem:
            raise InvalidArgument(f"{failure}failed to open CUDA IPC handle: {problem}")
        return _RegisteredDevice(name, memory, courier, opener)

    def use_devices(self, opener: DeviceOpener, device_ids: Iterable[int]) -> None:
        """From now on clients may register memory of these GPUs."""
        self._device_ids = tuple(device_ids)
        self.device_opener = opener if self._device_ids else None

    async def status(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Carry out ``region_status``: one region, or all of a kind (spec H-191, H-195, H-201)."""
        kind, name = _kind(arguments), _text(arguments, "name")
        if not name:
            return [region.status() for _, region in sorted(self._regions.items()) if region.kind == kind]
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find {kind} shared memory region: '{name}'")
        if region.kind != kind:
            raise NotFound(
                f"The region named '{name}' is registered as {_TITLES[region.kind]} shared memory, not {_TITLES[kind]} "
                "shared memory"
            )
        return [region.status()]

    async def unregister(self, arguments: dict[str, Any]) -> None:
        """Carry out ``region_unregister``: one region, or all of a kind; unknown ones are no error (spec H-194).

        Requests in flight keep what they use; see :class:`forebay.ipc.regions.Region`. Device memory is its owner's to
        free as soon as we have answered, so they are waited for.
        """
        kind, name = _kind(arguments), _text(arguments, "name")
        await self._forget([r.name for r in self._regions.values() if r.kind == kind and name in ("", r.name)])

    async def _forget(self, names: list[str]) -> None:
        if names:
            gone = [self._regions.pop(name) for name in names]
            for region in gone:
                if isinstance(region, _RegisteredDevice):
                    self._leaving[region.memory.number] = _Leaving(set(self._frontends))
            self._generation += 1
            await self._announce(RegionDown(generation=self._generation, names=tuple(names)))
            # Now that no further request uses them.
            await asyncio.gather(*map(self._close, gone))

    async def _close(self, region: _Registered | _RegisteredDevice) -> None:
        if isinstance(region, _RegisteredDevice):
            await self._wait_unused(region)
        await region.close()

    async def _wait_unused(self, region: _RegisteredDevice) -> None:
        number = region.memory.number
        try:
            if self._leaving[number].users:
                await asyncio.wait_for(self._leaving[number].is_unused.wait(), _IN_USE_TIMEOUT_S)
        except TimeoutError:
            log.warning(
                f"CUDA shared memory region '{region.name}' was unregistered {_IN_USE_TIMEOUT_S:g} s ago and is still "
                "in use; requests that have not run yet fail"
            )
        finally:
            del self._leaving[number]

    def _report(self) -> None:
        """Look for abandoned regions, now and as long as there are any regions."""
        self.report_abandoned()
        again = asyncio.get_running_loop().call_later
        self._reporting = again(_REPORT_S, self._report) if self._regions else None

    def report_abandoned(self) -> None:
        """Name regions in the log, once each, whose memory is kept only because they are registered."""
        for region in self._regions.values():
            if region.name not in self._reported and region.is_abandoned:
                self._reported.add(region.name)
                log.warning(
                    f"shared memory region '{region.name}' has been unlinked, as when its client has ended; its "
                    f"{region.status()['byte_size']} bytes are kept until it is unregistered: POST "
                    f"/v2/systemsharedmemory/region/{region.name}/unregister"
                )

    async def _reclaim(self) -> None:
        """Make room: forget the regions of clients that are gone.

        Raises:
            Unavailable: all of them are still in use.
        """
        if len(self._regions) < REGIONS_MAX:
            return
        abandoned = [region.name for region in self._regions.values() if region.is_abandoned]
        if not abandoned:
            raise Unavailable(f"{REGIONS_MAX} shared memory regions are registered; unregister those not in use")
        log.warning(f"unregistered {len(abandoned)} shared memory regions whose clients have unlinked them")
        await self._forget(abandoned)

    def close(self) -> None:
        """Close every descriptor."""
        if self._reporting is not None:
            self._reporting.cancel()
        for region in self._regions.values():
            if isinstance(region, _Registered):
                os.close(region.fd)
        self._regions.clear()


def _open(name: str, key: str, offset: int, byte_size: int) -> _Registered:
    fd = open_shared_memory(name, key)
    size = os.fstat(fd).st_size
    if byte_size <= 0 or offset < 0 or offset + byte_size > size:
        os.close(fd)
        raise InvalidArgument(f"failed to register shared memory region '{name}': invalid args")
    return _Registered(name, key, offset, byte_size, fd)


def _kind(arguments: dict[str, Any]) -> str:
    kind = arguments.get("kind")
    if kind not in _TITLES:
        raise InvalidArgument("control argument 'kind' must be system or cuda")
    return str(kind)


def _text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"control argument '{name}' must be a string")
    return value


def _number(arguments: dict[str, Any], name: str) -> int:
    value = arguments.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"control argument '{name}' must be an integer")
    return value
