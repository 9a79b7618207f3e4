"""Grants: an idle instance lent to the producer that was served last, which then rings it without asking.

A grant ends when the producer gives it back after a REVOKE, or with the instance or the producer. A shared-memory
client is not waited for: its worker keeps the grant and is told itself when it ends.
"""

from __future__ import annotations

from collections.abc import Callable

from forebay.engine.scheduler.client_submissions import ClientSubmissions, ticket_of
from forebay.engine.scheduler.instances import Instance, InstanceState
from forebay.engine.scheduler.producers import Producers
from forebay.engine.scheduler.route import Route
from forebay.ipc.counters import SchedulerCounter
from forebay.ipc.wire import FLAG_GONE, FLAG_HUNG, GRANT, HEADER, Kind


class Grants:
    """Gives and takes back; the instances know who holds them."""

    def __init__(
        self,
        producers: Producers,
        clients: ClientSubmissions,
        *,
        on_end: Callable[[Instance], None],
        count: Callable[[int, SchedulerCounter], None],
    ) -> None:
        """Hold nothing yet.

        Args:
            on_end: told that an instance is the scheduler's again.
            count: adds one to a route's counter.
        """
        self._producers = producers
        self._clients = clients
        self._on_end = on_end
        self._count = count
        self._epoch = 0

    def start(self, epoch: int) -> None:
        """Number grants so that none is taken for one of an earlier scheduler."""
        self._epoch = epoch

    @property
    def first_generation(self) -> int:
        """The generation of an instance that has not been granted yet."""
        return (self._epoch & 0x7FFF) << 16

    def give(self, route: Route, instance: Instance) -> None:
        """Grant an idle instance to whom it served last, if that one can use it."""
        producer = self._producers.get(instance.grantee)
        if producer is None or instance not in route.idle:
            return
        if not producer.trusted and not self._clients.can_ring(producer.id, instance.id):
            return
        route.idle.remove(instance)
        instance.state = InstanceState.GRANTED
        instance.generation += 1
        self._count(route.id, SchedulerCounter.GRANTS)
        ticket = 0
        if not producer.trusted:
            # Its worker keeps the grant: nobody ever has to wait for a client to give one back.
            ticket = ticket_of(self._epoch, instance)
            instance.ringers.add(producer.id)
            instance.bell.ring(HEADER.pack(Kind.RING_OPEN, 0, 0, producer.id, ticket))
        self._producers.ring(
            producer.id,
            HEADER.pack(Kind.GRANT, 0, 0, instance.id, ticket)
            + GRANT.pack(route.id, instance.id, instance.generation, route.grant_rows),
        )

    def revoke(self, instance: Instance) -> None:
        """Ask for a granted instance."""
        self._count(instance.route, SchedulerCounter.REVOKES)
        holder = self._producers.get(instance.grantee)
        if holder is not None and not holder.trusted:
            # What is sent to the worker from now on comes after it: the instance is ours at once.
            ticket = ticket_of(self._epoch, instance)
            instance.bell.ring(HEADER.pack(Kind.RING_CLOSE, 0, 0, instance.grantee, ticket))
            self.end(instance)
            return
        instance.state = InstanceState.REVOKING
        self._producers.ring(
            instance.grantee,
            HEADER.pack(Kind.REVOKE, 0, 0, instance.id, 0)
            + GRANT.pack(instance.route, instance.id, instance.generation, 0),
        )

    def end(self, instance: Instance) -> None:
        """The holder does not ring the instance any more."""
        if instance.state in (InstanceState.GRANTED, InstanceState.REVOKING):
            self._on_end(instance)

    def end_all_of(self, producer: int, instances: list[Instance]) -> None:
        """The producer is gone. What it had rung is in the workers' own queues, before anything that we send now."""
        for instance in instances:
            instance.ringers.discard(producer)
            if instance.grantee == producer:
                self.end(instance)

    def tell_gone(self, instance: Instance, *, is_hung: bool = False) -> None:
        """An instance's process is gone: what was rung under a grant and is not answered is lost.

        All frontends are told, not the holder alone: a grant of an earlier scheduler may still have something under
        way. Of clients only those that have held one: what they rang under it may run still, although it is over.
        """
        flags = FLAG_GONE | FLAG_HUNG if is_hung else FLAG_GONE
        message = HEADER.pack(Kind.REVOKE, flags, 0, instance.id, 0) + GRANT.pack(
            instance.route, instance.id, instance.generation & 0xFFFFFFFF, 0
        )
        for producer in self._producers:
            if producer.trusted or producer.id in instance.ringers:
                self._producers.ring(producer.id, message)
