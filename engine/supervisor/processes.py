"""The scheduler and the frontends as the supervisor sees them: start, introduce, restart."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeVar

from forebay.engine.supervisor.backoff import Backoff
from forebay.engine.supervisor.child import Child, describe_exit
from forebay.engine.supervisor.device_pools import DevicePools
from forebay.engine.supervisor.listeners import Listener
from forebay.engine.supervisor.regions import RegionRegistry
from forebay.engine.supervisor.switchboard import Producer, Switchboard
from forebay.ipc.arena import create_memory_file
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.errors import Unavailable
from forebay.ipc.frontend_messages import (
    ConnectionMoved,
    Crowded,
    FrontendStart,
    FrontendToSupervisor,
    PoolEmpty,
    QuietWanted,
    RegionsSeen,
    RegionUnused,
    Serve,
)
from forebay.ipc.log import log
from forebay.ipc.messages import Failed, Message, Started
from forebay.ipc.scheduler_messages import Drained, Explained, SchedulerToSupervisor

Received = TypeVar("Received")

#: How often a process may die before it was ever up, until the server gives up.
_START_ATTEMPTS = 3


class Role(abc.ABC, Generic[Received]):
    """A process that there must always be one of. Restarted with back-off whenever it dies."""

    def __init__(self, name: str, module: str, union: object, arguments: tuple[str, ...] = ()) -> None:
        """Start nothing yet.

        Args:
            name: as in ps and log lines.
            union: what it sends over its lifeline.
        """
        self.name = name
        self.child: Child[Received] | None = None
        #: Resolved when it is up for the first time; fails if it never will be.
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_up = False
        self._module = module
        self._union = union
        self._arguments = arguments
        self._backoff = Backoff()
        #: Since when it is up, monotonic seconds.
        self._up_since_s = 0.0
        self._early_deaths = 0
        self._failure = ""
        self._is_stopping = False

    @property
    def pid(self) -> int:
        """Its process id, 0 while there is none."""
        return self.child.pid if self.child is not None else 0

    def start(self) -> None:
        """Start the process; it is introduced to the others at once."""
        self.child = Child(
            self.name,
            self._module,
            self._union,
            on_message=self._take,
            on_exit=self._exited,
            arguments=self._arguments,
        )
        self._introduce(self.child)

    async def stop(self, timeout_s: float) -> bool:
        """Have it finish and exit, for good; whether it did so by itself."""
        self._is_stopping = True
        return True if self.child is None else await self.child.stop(timeout_s)

    def kill(self) -> None:
        """End it at once, for good."""
        self._is_stopping = True
        if self.child is not None:
            self.child.kill()

    @abc.abstractmethod
    def _introduce(self, child: Child[Received]) -> None:
        """Tell the new process, and everybody about it."""

    @abc.abstractmethod
    def _farewell(self, child: Child[Received]) -> None:
        """Tell everybody that it is gone."""

    def _handle(self, message: Received, fds: list[int]) -> None:
        """Take a message other than Started and Failed."""

    def _take(self, message: Received, fds: list[int]) -> None:
        if isinstance(message, Started):
            self.is_up = True
            self._up_since_s = time.monotonic()
            self._early_deaths = 0
            if not self.ready.done():
                self.ready.set_result(None)
            self._went_up()
        elif isinstance(message, Failed):
            self._failure = message.text
        else:
            self._handle(message, fds)

    def _went_up(self) -> None:
        """It says that it is up."""

    def _exited(self, exit_code: int) -> None:
        child, self.child = self.child, None
        was_up, self.is_up = self.is_up, False
        assert child is not None
        self._farewell(child)
        if self._is_stopping:
            return
        if not was_up and not self.ready.done():
            self._early_deaths += 1
            if self._failure or self._early_deaths >= _START_ATTEMPTS:
                text = self._failure or f"{self.name} ended while it started: {describe_exit(exit_code)}"
                self.ready.set_exception(Unavailable(text))
                return
        why = f": {self._failure}" if self._failure else ""
        log.error(f"{self.name} died ({describe_exit(exit_code)}){why}; restarting it")
        self._failure = ""
        self._start_later(time.monotonic() - self._up_since_s if was_up else 0.0)

    def _start_later(self, lived_s: float) -> None:
        delay_s = self._backoff.died(time.monotonic(), lived_s)
        asyncio.get_running_loop().call_later(delay_s, self.start_when_possible)

    def start_when_possible(self) -> None:
        """Start the process now or, if there is no room for one, later; not if there is one or it shall stop."""
        if self._is_stopping or self.child is not None:
            return
        try:
            self.start()
        except OSError as error:
            # Processes, memory or descriptors are short for the moment.
            log.error(f"{self.name} cannot be started: {error.strerror}; trying again")
            if self.child is None:
                self._start_later(0.0)
            else:
                # It could not be introduced: its end is followed by the next try.
                self.child.kill()


class SchedulerRole(Role[Started | Failed | Drained | Explained]):
    """The scheduler."""

    def __init__(self, switchboard: Switchboard) -> None:
        super().__init__("scheduler", "forebay.engine.scheduler.loop", SchedulerToSupervisor)
        self._switchboard = switchboard
        self._requests = itertools.count(1)
        self._explanations: dict[int, asyncio.Future[list[dict[str, Any]]]] = {}

    def expect_explanation(self) -> tuple[int, asyncio.Future[list[dict[str, Any]]]]:
        """Return a number for an Explain message and what will hold its answer."""
        number = next(self._requests)
        future: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._explanations[number] = future
        future.add_done_callback(lambda _future: self._explanations.pop(number, None))
        return number, future

    def _introduce(self, child: Child[Started | Failed | Drained | Explained]) -> None:
        self._switchboard.attach_scheduler(child)

    def _farewell(self, child: Child[Started | Failed | Drained | Explained]) -> None:
        self._switchboard.detach_scheduler(child)
        for future in list(self._explanations.values()):
            if not future.done():
                future.set_exception(Unavailable("the scheduler was restarted, try again"))

    def _handle(self, message: Started | Failed | Drained | Explained, fds: list[int]) -> None:
        if isinstance(message, Drained):
            self._switchboard.note_drained(message)
        elif isinstance(message, Explained):
            future = self._explanations.get(message.request)
            if future is not None and not future.done():
                future.set_result(message.batches)


class FrontendRole(Role[FrontendToSupervisor]):
    """A frontend. Each run of it is a producer of its own, with a new number, arena and completion doorbell."""

    def __init__(
        self,
        name: str,
        module: str,
        switchboard: Switchboard,
        *,
        numbers: itertools.count[int],
        arena_bytes: int,
        settings: dict[str, Any],
        listeners: tuple[Listener, ...],
        on_gone: Callable[[int], None],
        regions: RegionRegistry,
        pools: DevicePools,
        submits: bool = True,
        cache_bytes: int = 0,
        cache_counter_offset: int = 0,
        keeps_pages: Callable[[int], bool] = lambda _byte_size: False,
        is_quiet: bool = False,
    ) -> None:
        """Start nothing yet.

        Args:
            numbers: producer numbers, shared by all frontends.
            settings: what the process gets of the server's settings, as plain data.
            listeners: sockets that it serves on; ours.
            on_gone: called with the number of a run that ended.
            regions: shared memory of clients, which it gets if it submits.
            pools: device memory for steps of ensembles, of which it gets its own if it submits.
            submits: it sends requests into the engine; False for the metrics frontend.
            cache_bytes: its share of the response cache, for which its arena has room as well.
            cache_counter_offset: of its block of ``CacheCounter`` words.
            keeps_pages: whether workers may page-lock an arena of so many bytes.
            is_quiet: it serves the connections that others hand over to it.
        """
        super().__init__(name, module, FrontendToSupervisor)
        self.number = 0
        self.submits = submits
        self.is_quiet = is_quiet
        self._switchboard = switchboard
        self._numbers = numbers
        self._arena_bytes = arena_bytes + cache_bytes
        self._cache_bytes = cache_bytes
        self._cache_counter_offset = cache_counter_offset
        # Page-locking the quiet frontend's arena would hold up the workers that it is to reach sooner.
        self._keeps_pages = not is_quiet and keeps_pages(self._arena_bytes)
        self._settings = settings
        self._listeners = listeners
        self._on_gone = on_gone
        self._regions = regions
        self._pools = pools
        self._is_serving = False
        #: Called when it wants a quiet frontend.
        self.on_quiet_wanted: Callable[[], None] = _do_nothing
        #: Called with the routes of which it has crowds.
        self.on_crowded: Callable[[Collection[int]], None] = _ignore_crowds
        #: Called with each client's socket that another frontend shall serve; the caller closes it afterwards.
        self.on_connection_moved: Callable[[int], None] = _drop
        #: Called when a run of it has come up, and when it is gone.
        self.on_presence: Callable[[], None] = _do_nothing
        #: What a new run is told before anything else.
        self.greetings: Callable[[], Iterable[Message]] = tuple

    def serve(self) -> None:
        """Have it accept connections, now and after every restart."""
        self._is_serving = True
        for listener in self._listeners:
            listener.allow_restart()
        if self.is_up and self.child is not None:
            self.child.send(Serve())

    def _went_up(self) -> None:
        if self.child is None:
            return
        for message in self.greetings():
            self.child.send(message)
        if self._is_serving:
            self.child.send(Serve())
        self.on_presence()

    def _introduce(self, child: Child[FrontendToSupervisor]) -> None:
        self.number = next(self._numbers)
        with contextlib.ExitStack() as undo:
            arena_fd = create_memory_file(f"forebay-arena-{self.number}", self._arena_bytes)
            undo.callback(os.close, arena_fd)
            sender, receiver = create_doorbell()
            undo.pop_all()
        producer = Producer(self.number, self.name, arena_fd, self._arena_bytes, sender.detach())
        if self.submits:
            # Everybody else knows it before it can send anything.
            self._switchboard.add_producer(producer)
        start = FrontendStart(
            producer=self.number,
            arena_bytes=self._arena_bytes,
            counters_bytes=self._switchboard.counters_bytes,
            runtime_directory=self._switchboard.runtime_directory,
            scheduler_epoch=self._switchboard.epoch,
            settings=self._settings,
            listen=tuple(listener.address for listener in self._listeners),
            cache_bytes=self._cache_bytes,
            cache_counter_offset=self._cache_counter_offset,
            name=self.name,
            keeps_pages=self._keeps_pages,
            is_quiet=self.is_quiet,
        )
        sockets = tuple(listener.sock.fileno() for listener in self._listeners)
        child.send(start, (arena_fd, receiver.fileno(), self._switchboard.counters_fd, *sockets))
        # Only the frontend may hold the receiving end: its death is then an error to whoever rings.
        receiver.close()
        if self.submits:
            self._switchboard.attach_frontend(self.number, child)
            self._regions.attach(self.number, child)
            # Few connections of the quiet frontend ask ensembles on GPUs; those pass tensors through host memory.
            if not self.is_quiet:
                self._pools.attach(self.number, child)
        else:
            producer.close()

    def _handle(self, message: FrontendToSupervisor, fds: list[int]) -> None:
        if isinstance(message, RegionsSeen):
            self._regions.note_seen(self.number, message.generation)
        elif isinstance(message, RegionUnused):
            self._regions.note_unused(self.number, message.number)
        elif isinstance(message, PoolEmpty):
            self._pools.note_empty(self.number, message.number)
        elif isinstance(message, QuietWanted):
            self.on_quiet_wanted()
        elif isinstance(message, Crowded):
            self.on_crowded(message.routes)
        elif isinstance(message, ConnectionMoved):
            for fd in fds:
                self.on_connection_moved(fd)
                os.close(fd)

    def _farewell(self, child: Child[FrontendToSupervisor]) -> None:
        self._regions.detach(self.number)
        self._pools.detach(self.number)
        self._switchboard.remove_producer(self.number)
        self._on_gone(self.number)
        self.on_presence()


def _do_nothing() -> None:
    """Nobody wants to know."""


def _ignore_crowds(_routes: Collection[int]) -> None:
    """Nobody's share of the cores depends on it."""


def _drop(_fd: int) -> None:
    """No other frontend can serve it: the client finds its connection closed, and makes another."""
