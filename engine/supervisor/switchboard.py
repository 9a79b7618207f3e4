"""Who exists, and who has been told: routes, instances and producers, announced to scheduler, frontends and workers.

The one place that holds every descriptor that processes share, so that a process which is started again hears all of
it anew: a scheduler gets every producer, route and instance; a frontend every instance; a worker every producer.

Order of announcements, which everybody relies on:

- a route before its instances; an instance to the scheduler only when its worker has loaded and knows every producer;
- a producer to the scheduler and to all workers before the producer's process knows that it exists;
- the end of an instance to the scheduler after the process is gone: what it had sent is then in the doorbells.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Protocol

import msgspec

from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.frontend_messages import DoorbellDown, DoorbellUp
from forebay.ipc.messages import Message
from forebay.ipc.scheduler_messages import (
    CountersFile,
    Drained,
    InstanceDown,
    InstanceDrain,
    InstanceUp,
    ProducerDown,
    ProducerUp,
    Resource,
    Restored,
    RouteDrain,
    RouteGone,
    RouteUp,
    SchedulerStart,
)
from forebay.ipc.worker_messages import ArenaDown, ArenaUp, RingUp


class Listener(Protocol):
    """A process that announcements go to; False if it is gone."""

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool: ...


class Producer(msgspec.Struct, frozen=True):
    """One run of one frontend, or one shared-memory client. Owns its descriptors."""

    number: int
    name: str
    arena_fd: int
    arena_bytes: int
    bell_fd: int
    """Sending end of its completion doorbell."""
    submit_fd: int = -1
    """Receiving end of a client's submission socket; -1: a frontend, which is trusted."""
    is_counted: bool = True
    """False: statistics are not to know of its requests (spec C-115)."""

    @property
    def is_trusted(self) -> bool:
        return self.submit_fd < 0

    def close(self) -> None:
        for fd in (self.arena_fd, self.bell_fd, self.submit_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)


class _Client:
    """What a shared-memory client has opened, and which workers know it: only those that may get its requests."""

    __slots__ = ("on_instance", "producer", "routes", "told")

    def __init__(self, producer: Producer, on_instance: Callable[[int, int, socket.socket], None]) -> None:
        self.producer = producer
        self.on_instance = on_instance
        self.routes: set[int] = set()
        self.told: set[int] = set()


class _Instance(msgspec.Struct, frozen=True):
    route: int
    name: str
    worker: WorkerHandle
    resources: tuple[Resource, ...] = ()
    rate_priority: int = 1


class Switchboard:
    """Used in the supervisor's event loop only."""

    def __init__(
        self,
        runtime_directory: str,
        counters_fd: int,
        counters_bytes: int,
        scheduling: SchedulerStart | None = None,
    ) -> None:
        """Create the done doorbell; the caller keeps ``counters_fd``.

        Args:
            scheduling: what every scheduler is told at its start, apart from what this class knows.
        """
        self._scheduling = scheduling or SchedulerStart(epoch=0, runtime_directory="")
        self.runtime_directory = runtime_directory
        self.counters_fd = counters_fd
        self.counters_bytes = counters_bytes
        #: How many schedulers there have been.
        self.epoch = 0
        self._scheduler: Listener | None = None
        self._frontends: dict[int, Listener] = {}
        self._producers: dict[int, Producer] = {}
        self._clients: dict[int, _Client] = {}
        self._routes: dict[int, RouteUp] = {}
        self._instances: dict[int, _Instance] = {}
        self._workers: dict[int, WorkerHandle] = {}
        self._drains: dict[tuple[int, int], asyncio.Future[None]] = {}
        # Workers hold duplicates of the sending end; the receiving end goes to one scheduler after the other.
        self._done_sender, self._done_receiver = create_doorbell()

    @property
    def done_fd(self) -> int:
        """Sending end of the done doorbell, for a new worker; ours."""
        return self._done_sender.fileno()

    # --- scheduler ---

    def attach_scheduler(self, scheduler: Listener) -> None:
        """Tell a scheduler that was just started everything."""
        self.epoch += 1
        self._scheduler = scheduler
        start = msgspec.structs.replace(
            self._scheduling,
            epoch=self.epoch,
            runtime_directory=self.runtime_directory,
            counters_bytes=self.counters_bytes,
        )
        scheduler.send(start, (self._done_receiver.fileno(),))
        scheduler.send(CountersFile(byte_size=self.counters_bytes), (self.counters_fd,))
        for producer in self._producers.values():
            self._announce_producer(producer)
        for route in self._routes.values():
            scheduler.send(route)
        for number, instance in self._instances.items():
            self._announce_instance(number, instance)
        for route_number, instance_number in self._drains:
            scheduler.send(
                InstanceDrain(instance=instance_number) if instance_number else RouteDrain(route=route_number)
            )
        if self.epoch > 1:
            scheduler.send(Restored())

    def detach_scheduler(self, scheduler: Listener) -> None:
        """The scheduler's process is gone."""
        if self._scheduler is scheduler:
            self._scheduler = None

    def _tell_scheduler(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        # Without one, the next hears it from attach_scheduler.
        if self._scheduler is not None:
            self._scheduler.send(message, fds)

    def note_drained(self, message: Drained) -> None:
        """The scheduler says that a route or an instance is idle."""
        waiting = self._drains.pop((0, message.instance) if message.instance else (message.route, 0), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _drain(self, route: int, instance: int, message: Message, timeout_s: float) -> bool:
        waiting = self._drains.setdefault((route, instance), asyncio.get_running_loop().create_future())
        self._tell_scheduler(message)
        try:
            await asyncio.wait_for(asyncio.shield(waiting), timeout_s)
        except TimeoutError:
            return False
        finally:
            self._drains.pop((route, instance), None)
        return True

    # --- routes and instances ---

    def add_route(self, route: RouteUp) -> None:
        self._routes[route.route] = route
        self._tell_scheduler(route)

    async def drain_route(self, route: int, timeout_s: float) -> bool:
        """Wait until nothing of the route is queued or running; False if that takes too long."""
        return await self._drain(route, 0, RouteDrain(route=route), timeout_s)

    def remove_route(self, route: int, code: int, text: str) -> None:
        """Forget a route; what is still queued fails with ``text``."""
        if self._routes.pop(route, None) is not None:
            self._tell_scheduler(RouteGone(route=route, code=code, text=text))

    async def drain_instance(self, instance: int, timeout_s: float) -> bool:
        """Wait until an instance is idle and not granted; it gets no more batches."""
        return await self._drain(0, instance, InstanceDrain(instance=instance), timeout_s)

    def introduce_worker(self, worker: WorkerHandle) -> None:
        """Give a worker, before it loads, every producer's arena; later producers follow by themselves."""
        self._workers[worker.number] = worker
        for producer in self._producers.values():
            if producer.is_trusted:
                self._tell_worker(worker, producer)

    def add_instance(
        self,
        route: int,
        name: str,
        worker: WorkerHandle,
        resources: tuple[Resource, ...] = (),
        rate_priority: int = 1,
    ) -> None:
        """A worker has loaded: let it have batches."""
        instance = self._instances[worker.number] = _Instance(route, name, worker, resources, rate_priority)
        for client in self._clients.values():
            if route in client.routes and (ring := self._connect_ring(client, worker)) is not None:
                client.on_instance(route, worker.number, ring)
        self._announce_instance(worker.number, instance)
        for frontend in self._frontends.values():
            self._announce_doorbell(frontend, worker.number, instance)

    def remove_worker(self, worker: WorkerHandle) -> None:
        """A worker's process is gone, or its instance is drained and about to be stopped."""
        self._workers.pop(worker.number, None)
        for client in self._clients.values():
            client.told.discard(worker.number)
        instance = self._instances.pop(worker.number, None)
        if instance is None:
            return
        self._tell_scheduler(
            InstanceDown(instance=worker.number, exit_status=worker.exit_code or 0, is_hung=worker.is_hung)
        )
        for frontend in self._frontends.values():
            frontend.send(DoorbellDown(instance=worker.number))
        waiting = self._drains.pop((0, worker.number), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _announce_instance(self, number: int, instance: _Instance) -> None:
        if instance.worker.ended.is_set():
            return  # Its removal is under way.
        self._tell_scheduler(
            InstanceUp(
                route=instance.route,
                instance=number,
                name=instance.name,
                resources=instance.resources,
                rate_priority=instance.rate_priority,
            ),
            (instance.worker.bell.fileno(),),
        )

    def _announce_doorbell(self, frontend: Listener, number: int, instance: _Instance) -> None:
        if not instance.worker.ended.is_set():
            frontend.send(DoorbellUp(instance=number, route=instance.route), (instance.worker.bell.fileno(),))

    # --- producers ---

    def add_producer(self, producer: Producer) -> None:
        """Announce a producer to the scheduler and to every worker; takes ownership of its descriptors."""
        self._producers[producer.number] = producer
        self._announce_producer(producer)
        for worker in self._workers.values():
            self._tell_worker(worker, producer)

    def attach_frontend(self, number: int, frontend: Listener) -> None:
        """The producer's process has its FrontendStart: tell it every instance, from now on."""
        self._frontends[number] = frontend
        for instance_number, instance in self._instances.items():
            self._announce_doorbell(frontend, instance_number, instance)

    def remove_producer(self, number: int) -> None:
        """A frontend's or client's process is gone: its requests are nobody's any more."""
        self._frontends.pop(number, None)
        client = self._clients.pop(number, None)
        producer = self._producers.pop(number, None)
        if producer is None:
            return
        self._tell_scheduler(ProducerDown(producer=number))
        for worker_number, worker in self._workers.items():
            if client is None or worker_number in client.told:
                worker.tell(ArenaDown(producer=number))
        producer.close()

    # --- shared-memory clients ---

    def add_client(self, producer: Producer, on_instance: Callable[[int, int, socket.socket], None]) -> None:
        """Announce a client to the scheduler; takes ownership of its descriptors. Workers hear of it at need.

        Args:
            on_instance: called with route, instance and the sending end of a new ring, which it then owns, whenever a
                worker of an opened route is started later.
        """
        self._producers[producer.number] = producer
        self._clients[producer.number] = _Client(producer, on_instance)
        self._announce_producer(producer)

    def open_route(self, number: int, route: int) -> list[tuple[int, socket.socket]]:
        """Let a client send requests for a route.

        Returns:
            (instance, sending end of the ring to it) of every worker that serves the route now; the caller owns them.
        """
        client = self._clients[number]
        client.routes.add(route)
        return [
            (instance_number, ring)
            for instance_number, instance in self._instances.items()
            if instance.route == route and (ring := self._connect_ring(client, instance.worker)) is not None
        ]

    def _introduce_client(self, client: _Client, worker: WorkerHandle) -> None:
        if worker.number not in client.told:
            client.told.add(worker.number)
            self._tell_worker(worker, client.producer)

    def _connect_ring(self, client: _Client, worker: WorkerHandle) -> socket.socket | None:
        """Return the sending end of a new ring; None: descriptors are short, and it goes by way of the scheduler."""
        self._introduce_client(client, worker)
        try:
            sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return None
        with receiver:
            worker.tell(RingUp(producer=client.producer.number), (receiver.fileno(),))
        return sender

    def _announce_producer(self, producer: Producer) -> None:
        fds = (producer.bell_fd,) if producer.is_trusted else (producer.bell_fd, producer.submit_fd)
        self._tell_scheduler(
            ProducerUp(
                producer=producer.number,
                name=producer.name,
                arena_bytes=producer.arena_bytes,
                trusted=producer.is_trusted,
            ),
            fds,
        )

    def _tell_worker(self, worker: WorkerHandle, producer: Producer) -> None:
        worker.tell(
            ArenaUp(
                producer=producer.number,
                byte_size=producer.arena_bytes,
                trusted=producer.is_trusted,
                counted=producer.is_counted,
            ),
            (producer.arena_fd, producer.bell_fd),
        )

    def close(self) -> None:
        """Close every descriptor; all other processes have ended."""
        for producer in self._producers.values():
            producer.close()
        self._producers.clear()
        self._done_sender.close()
        self._done_receiver.close()
