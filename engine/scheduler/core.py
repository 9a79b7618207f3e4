"""What the scheduler knows and decides: messages in, doorbells out; no loop, no ZeroMQ, time given by the caller.

One :class:`SchedulerCore` per scheduler process; ``loop.py`` feeds it. Whatever has arrived is taken first, then every
route that changed decides once (:meth:`SchedulerCore.decide`), so that requests which arrive together are batched
together and the cost is per batch.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Sequence

from forebay.engine.scheduler.batch_messages import pack_batch
from forebay.engine.scheduler.client_submissions import ClientSubmissions, count_requests
from forebay.engine.scheduler.grants import Grants
from forebay.engine.scheduler.instances import Instance, InstanceState
from forebay.engine.scheduler.line import Choice
from forebay.engine.scheduler.producers import Producer, Producers
from forebay.engine.scheduler.rate_limiter import RateLimiter
from forebay.engine.scheduler.request_queue import part_cancelled
from forebay.engine.scheduler.restart import Restart, take_open
from forebay.engine.scheduler.route import Route
from forebay.engine.scheduler.waiting import Waiting, WaitingParcel, WaitingRun
from forebay.ipc.counters import SCHEDULER_WORDS, CountersFile, SchedulerCounter
from forebay.ipc.doorbell import Bell, ClientBell, WatchedBell, flush_lagging
from forebay.ipc.errors import Cancelled, Code, InvalidArgument, NotReady, ServingError, WorkerDied, from_wire
from forebay.ipc.log import log
from forebay.ipc.messages import Cancel, FrontendToScheduler, GrantReturned, LogChanged, Message, Stop, Submit
from forebay.ipc.scheduler_messages import CountersFile as CountersFileMessage
from forebay.ipc.scheduler_messages import (
    Drained,
    Explain,
    Explained,
    InstanceDown,
    InstanceDrain,
    InstanceUp,
    ProducerDown,
    ProducerUp,
    Restored,
    RouteDrain,
    RouteGone,
    RouteUp,
    SchedulerStart,
    SupervisorToScheduler,
)
from forebay.ipc.wire import FLAG_RESCHEDULE, HEAD_BYTES_MAX, HEADER, OPEN, TIMES, TOKEN, Kind

#: Text of what was cancelled before it ran.
CANCELLED_TEXT = "request was cancelled"


class SchedulerCore:
    """All routes, instances and producers."""

    def __init__(self, tell: Callable[[Message], None], epoll: select.epoll) -> None:
        """Know nobody yet.

        Args:
            tell: sends to the supervisor.
            epoll: clients' submission sockets are registered there.
        """
        self.is_stopping = False
        self.producers = Producers()
        self.clients = ClientSubmissions(self, epoll)
        self.producers.on_deaf = self.clients.remove
        self._tell = tell
        self._grants = Grants(self.producers, self.clients, on_end=self._set_idle, count=self._bump)
        self._routes: dict[int, Route] = {}
        self._instances: dict[int, Instance] = {}
        self._limiter: RateLimiter | None = None
        self._hold_back = 0
        self._counters_file: CountersFile | None = None
        self._counters: dict[int, memoryview] = {}
        self._next_batch = 1
        #: Routes that have to decide.
        self._dirty: set[int] = set()
        #: Doorbells of workers that do not take what is sent.
        self._lagging: set[Bell] = set()
        #: By route: when it has to decide although nothing happens.
        self._alarms: dict[int, int] = {}
        self._restart = Restart()

    @property
    def has_lagging(self) -> bool:
        """Whether somebody does not take what is sent: :meth:`flush_lagging` now and then."""
        return self.producers.has_lagging or bool(self._lagging)

    def flush_lagging(self) -> None:
        """Try again to send what full doorbells did not take."""
        self.producers.flush_lagging()
        flush_lagging(self._lagging)

    def close(self) -> None:
        """Close every doorbell."""
        for instance in self._instances.values():
            instance.bell.close()
        self.producers.close()
        self.clients.close()

    # --- from the supervisor ---

    def start(self, start: SchedulerStart) -> None:
        """Take the first message."""
        self._restart.start(start.epoch)
        # A batch of an earlier scheduler must not be taken for one of ours.
        self._next_batch = (start.epoch & 0x7FFF) << 48 | 1
        self._hold_back = start.hold_back_requests
        self._limiter = RateLimiter(start.resources) if start.is_rate_limited else None
        self._grants.start(start.epoch)
        self.clients.start(start.epoch)

    def handle(self, message: SupervisorToScheduler, fds: list[int], now_ns: int) -> None:
        """Take a message of the supervisor and ownership of its descriptors."""
        match message:
            case RouteUp():
                self._route_up(message)
            case InstanceUp():
                self._instance_up(message, fds[0])
            case ProducerUp():
                kind = Bell if message.trusted else ClientBell
                self.producers.add(Producer(message, kind(socket.socket(fileno=fds[0]))))
                self._restart.add_producer(message.producer)
                if not message.trusted:
                    self.clients.add(message, fds[1])
            case CountersFileMessage():
                self._counters_file = CountersFile(fds[0])
                os.close(fds[0])
            case InstanceDown():
                self._instance_down(message.instance, now_ns, is_hung=message.is_hung)
            case InstanceDrain():
                self._instance_drain(message.instance)
            case ProducerDown():
                self._producer_down(message.producer)
            case RouteDrain():
                self._route_drain(message.route)
            case RouteGone():
                self._route_gone(message)
            case Explain():
                route = self._routes.get(message.route)
                self._tell(Explained(request=message.request, batches=[] if route is None else route.explain()))
            case Restored():
                self._restart.restored()
                self._resync_due()
            case LogChanged():
                log.follow(message.options)
            case Stop():
                self.is_stopping = True
            case SchedulerStart():
                pass

    def _route_up(self, up: RouteUp) -> None:
        route = self._routes.get(up.route)
        if route is None:
            self._routes[up.route] = Route(up, hold_back_requests=self._hold_back)
        else:
            for item, error in route.change_policy(up):
                self.producers.refuse(item, error)
            for instance in route.granted():
                # What the holder may do with it has changed.
                self._grants.revoke(instance)
            self._dirty.add(up.route)
        self.clients.add_route(up)
        if self._counters_file is not None and up.counter_offset:
            self._counters[up.route] = self._counters_file.block(up.counter_offset, SCHEDULER_WORDS)

    def _route_drain(self, route_id: int) -> None:
        route = self._routes.get(route_id)
        if route is None:
            self._tell(Drained(route=route_id))
            return
        route.is_draining = True
        for instance in route.granted():
            self._grants.revoke(instance)
        self._dirty.add(route_id)

    def _route_gone(self, gone: RouteGone) -> None:
        route = self._routes.pop(gone.route, None)
        self.clients.remove_route(gone.route)
        self._counters.pop(gone.route, None)
        if self._alarms.pop(gone.route, None) is not None:
            # Others have alarms: decide, though not about this route, so that the next of them is set.
            self._dirty.add(gone.route)
        if route is None:
            return
        error = from_wire(gone.code, gone.text)
        for item in route.line.clear():
            self.producers.refuse(item, error)
        for instance in list(route.instances.values()):
            self._instances.pop(instance.id, None)
            self._release(instance)
            instance.bell.close()

    def _instance_up(self, up: InstanceUp, fd: int) -> None:
        route = self._routes.get(up.route)
        bell = WatchedBell(socket.socket(fileno=fd), self._lagging)
        if route is None:
            bell.close()
            return
        instance = Instance(
            up.instance,
            up.route,
            up.name,
            bell,
            syncing=self._restart.is_restoring,
            generation=self._grants.first_generation,
            resources=up.resources,
            rate_priority=up.rate_priority,
        )
        self._instances[instance.id] = instance
        route.add_instance(instance)
        if self._limiter is not None:
            self._limiter.add(self._instances.values())
        if self._restart.is_restoring:
            bell.ring(self._restart.pack_sync())
        self._dirty.add(up.route)

    def _instance_drain(self, instance_id: int) -> None:
        instance = self._instances.get(instance_id)
        if instance is None:
            self._tell(Drained(instance=instance_id))
            return
        route = self._routes.get(instance.route)
        if route is not None:
            route.drain_instance(instance)
        if instance.state is InstanceState.GRANTED:
            self._grants.revoke(instance)
        else:
            self._tell_if_drained(instance)

    def _tell_if_drained(self, instance: Instance) -> None:
        route = self._routes.get(instance.route)
        if instance.draining and route is not None and route.is_drained(instance):
            self._tell(Drained(instance=instance.id))

    def _instance_down(self, instance_id: int, now_ns: int, *, is_hung: bool) -> None:
        """A worker's process is gone. The caller has taken everything that it had sent."""
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return
        self.clients.forget_instance(instance_id)
        route = self._routes.get(instance.route)
        lost: list[Waiting] = [*instance.items, *instance.open.values()]
        if lost:
            self._bump(instance.route, SchedulerCounter.LOST_BATCHES)
        if route is not None:
            route.remove_instance(instance)
            self._tell_lost(route, instance, lost, now_ns, is_hung=is_hung)
        self._grants.tell_gone(instance, is_hung=is_hung)
        self._release(instance)
        if self._limiter is not None:
            self._limiter.add(self._instances.values())
        instance.bell.close()
        self._dirty.add(instance.route)
        self._resync_due()

    def _tell_lost(self, route: Route, instance: Instance, lost: list[Waiting], now_ns: int, *, is_hung: bool) -> None:
        if route.sequences is None:
            self.producers.tell_lost(instance.id, instance.batch_id, lost, is_hung=is_hung)
            return
        # What a sequence has done so far is lost too: no other instance can go on with it.
        route.sequences.answered(lost, now_ns)
        for item in lost:
            assert isinstance(item, WaitingParcel)
            self.producers.refuse(item, route.sequences.lost_error(item))
        for item, error in route.sequences.remove_instance(instance.id, now_ns):
            self.producers.refuse(item, error)

    def _producer_down(self, producer: int) -> None:
        self._restart.remove_producer(producer)
        self.clients.remove(producer)
        self.producers.remove(producer)
        for route in self._routes.values():
            for item in route.line.remove_producer(producer):
                self.producers.refuse(item, Cancelled(CANCELLED_TEXT))
            self._dirty.add(route.id)
        self._grants.end_all_of(producer, list(self._instances.values()))

    # --- restart ---

    def _resync_due(self) -> None:
        """Ask for what was lost with the last scheduler whoever can be asked by now."""
        for producer in self._restart.take_due(self._instances.values()):
            self._resync(producer)

    def _resync(self, producer: int) -> None:
        self.producers.ring(producer, self._restart.pack_resync(producer, self._instances.values()))

    # --- from producers ---

    def accept(self, message: FrontendToScheduler) -> None:
        """Take a message of a producer whose numbers are known to be sound."""
        if isinstance(message, Submit):
            if message.producer not in self.producers:
                return
            if message.epoch != self._restart.epoch:
                # Meant for an earlier scheduler. Who submits so late may have missed the call to hand in again.
                if self._restart.has_asked(message.producer):
                    self._resync(message.producer)
                return
            for run in message.runs:
                self._enqueue(run.route, WaitingRun.of(message.producer, run))
            for parcel in message.parcels:
                self._enqueue(parcel.route, WaitingParcel.of(message.producer, parcel))
        elif isinstance(message, GrantReturned):
            instance = self._instances.get(message.instance)
            if instance is not None and instance.generation == message.generation:
                self._grants.end(instance)
        else:
            self._cancel(message)

    def _enqueue(self, route_id: int, item: Waiting) -> None:
        route = self._routes.get(route_id)
        error: ServingError | None = None
        if route is None:
            error = NotReady("the model version was unloaded before the request could run")
        elif not route.instances:
            error = _no_instance(route, item)
        elif isinstance(item, WaitingParcel) and len(item.head) > HEAD_BYTES_MAX:
            error = InvalidArgument(f"a request's names and parameters may take {HEAD_BYTES_MAX} bytes")
        else:
            try:
                route.line.append(item, item.enqueue_ns)
            except ServingError as refusal:
                error = refusal
                if refusal.code is Code.UNAVAILABLE:
                    self._bump(route_id, SchedulerCounter.REJECTED, item.requests)
            self._dirty.add(route_id)
        if error is not None:
            self.producers.refuse(item, error)

    def _cancel(self, message: Cancel) -> None:
        left = frozenset(message.tokens)
        if left:
            for route in self._routes.values():
                removed = route.line.remove_tokens(message.producer, left)
                self._refuse_cancelled(route, removed)
                left -= {item.token for item in removed if isinstance(item, WaitingParcel)}
        for rows in message.rows:
            rows_route = self._routes.get(rows.route)
            if rows_route is not None and rows.firsts:
                removed = rows_route.line.remove_rows(message.producer, rows.base, frozenset(rows.firsts))
                self._refuse_cancelled(rows_route, removed)
                if rows_route.keeps_requests:
                    rows_route.cancel_running(message.producer, rows)
        if self._limiter is not None:
            self._cut_staged(self._limiter, message)
        if not left:
            return
        for instance in self._instances.values():
            meant = [token for token in left if instance.holds(message.producer, token)]
            if meant:
                packed = b"".join(TOKEN.pack(token) for token in meant)
                instance.hint(HEADER.pack(Kind.CANCEL, 0, len(meant), message.producer, 0) + packed)

    def _cut_staged(self, limiter: RateLimiter, message: Cancel) -> None:
        """Take cancelled requests out of batches that wait for resources; those of sequences run with their batch."""
        for instance in list(self._instances.values()):
            route = self._routes.get(instance.route)
            if instance.state is not InstanceState.STAGED or route is None or route.sequences is not None:
                continue
            kept, removed = part_cancelled(instance.items, message, route.id)
            if not removed:
                continue
            instance.items = kept
            if kept:
                limiter.restage(instance)
            else:
                self._set_idle(instance)
            self._refuse_cancelled(route, removed)

    def _refuse_cancelled(self, route: Route, items: Sequence[Waiting]) -> None:
        for item in items:
            self._bump(route.id, SchedulerCounter.CANCELED, item.requests)
            self.producers.refuse(item, Cancelled(CANCELLED_TEXT))
            self._tell_sequence_worker(route, item)
        if items:
            self._dirty.add(route.id)

    # What clients' submissions ask of us.

    def ring_producer(self, producer_id: int, message: bytes) -> None:
        self.producers.ring(producer_id, message)

    def route_of(self, number: int) -> Route | None:
        return self._routes.get(number)

    def instance_of(self, number: int) -> Instance | None:
        return self._instances.get(number)

    def count_waiting(self, producer_id: int) -> int:
        """Return how many requests of a producer wait or run."""
        running = (instance.items for instance in self._instances.values())
        still_open = (instance.open.values() for instance in self._instances.values())
        return count_requests(producer_id, [*(route.line for route in self._routes.values()), *running, *still_open])

    # --- from workers ---

    def take_done(self, message: bytes, now_ns: int) -> None:
        """Take one message of the done doorbell."""
        if len(message) < HEADER.size:
            return
        kind, _flags, count, instance_id, batch_id = HEADER.unpack_from(message)
        instance = self._instances.get(instance_id)
        if instance is None:
            return
        if kind == Kind.DONE:
            if instance.state is InstanceState.BUSY and instance.batch_id == batch_id:
                self._batch_done(instance, message, count, now_ns)
        elif kind == Kind.OPENED:
            take_open(instance, message, count, now_ns)
        elif kind == Kind.CLOSED:
            self._closed(instance, message, now_ns)
        elif batch_id == self._restart.epoch and instance.state is InstanceState.SYNCING:
            if kind == Kind.SYNCED:
                self._synced(instance, message, count, now_ns)
            elif kind == Kind.UNSYNCED:
                self._unsynced(instance, message, count, now_ns)

    def _batch_done(self, instance: Instance, message: bytes, count: int, now_ns: int) -> None:
        route = self._routes.get(instance.route)
        if route is None:
            return
        try:
            start_ns, _input_end_ns, _output_start_ns, end_ns = TIMES.unpack_from(message, HEADER.size)
            left = [OPEN.unpack_from(message, HEADER.size + TIMES.size + i * OPEN.size) for i in range(count)]
        except struct.error:
            start_ns, end_ns, left = 0, 0, []
        route.note_end(instance, end_ns - start_ns, now_ns)
        answered = instance.items
        if left:
            answered = self._note_open(route, instance, left, now_ns)
        route.line.answered(answered, now_ns)
        self._set_idle(instance)
        # Whoever rings an instance by a grant asks nobody for its resources.
        if self._limiter is None and route.wants_grant() and not instance.draining:
            self._grants.give(route, instance)

    def _synced(self, instance: Instance, message: bytes, count: int, now_ns: int) -> None:
        """A worker has run what the last scheduler sent, and says what it has still to answer."""
        instance.open.clear()
        take_open(instance, message, count, now_ns)
        self._set_idle(instance)
        self._resync_due()

    def _unsynced(self, instance: Instance, message: bytes, count: int, now_ns: int) -> None:
        """A worker says what it has, of what the last scheduler sent, before it has run all of it."""
        instance.unnamed_producers = take_open(instance, message, count, now_ns)
        self._resync_due()

    def _note_open(
        self, route: Route, instance: Instance, left: list[tuple[int, ...]], now_ns: int
    ) -> Sequence[Waiting]:
        """Remember the requests of the batch that are not answered yet; return the others."""
        flags_by_key = {(producer, token): flags for producer, flags, token in left}
        answered: list[Waiting] = []
        for item in instance.items:
            flags = flags_by_key.get(item.key) if isinstance(item, WaitingParcel) else None
            if flags is None or not isinstance(item, WaitingParcel):
                answered.append(item)
            elif flags & FLAG_RESCHEDULE:
                if not self._reschedule(route, item, now_ns):
                    answered.append(item)
            else:
                instance.open[item.key] = item
        return answered

    @staticmethod
    def _reschedule(route: Route, item: WaitingParcel, now_ns: int) -> bool:
        return route.sequences is not None and route.sequences.reschedule(item, now_ns)

    def _closed(self, instance: Instance, message: bytes, now_ns: int) -> None:
        try:
            producer, flags, token = OPEN.unpack_from(message, HEADER.size)
        except struct.error:
            return
        item = instance.open.pop((producer, token), None)
        route = self._routes.get(instance.route)
        if item is not None and route is not None:
            if not flags & FLAG_RESCHEDULE or not self._reschedule(route, item, now_ns):
                route.line.answered((item,), now_ns)
                if flags & FLAG_RESCHEDULE and not item.head:
                    # An earlier scheduler's: only its producer has what it takes to bring it to the model again.
                    self.producers.tell_lost(instance.id, instance.batch_id, (item,))
            self._tell_if_drained(instance)
            self._dirty.add(route.id)

    def _set_idle(self, instance: Instance) -> None:
        self._release(instance)
        route = self._routes.get(instance.route)
        if route is None:
            return
        route.set_idle(instance)
        self._dirty.add(route.id)
        self._tell_if_drained(instance)

    # --- decisions ---

    @property
    def has_to_decide(self) -> bool:
        return bool(self._dirty)

    def wake(self, now_ns: int) -> None:
        """An alarm went off."""
        self._dirty.update(route for route, alarm in self._alarms.items() if alarm <= now_ns)

    def decide(self, now_ns: int) -> int:
        """Let every route that changed decide; return when to be woken next, 0: only when something happens."""
        dirty, self._dirty = self._dirty, set()
        for route_id in dirty:
            route = self._routes.get(route_id)
            if route is not None:
                self._expire(route, now_ns)
                self._decide_route(route, now_ns)
        if self._limiter is not None:
            for instance, choice in self._limiter.admit():
                self._dispatch(self._routes[instance.route], instance, choice, now_ns)
        return min(self._alarms.values(), default=0)

    def _expire(self, route: Route, now_ns: int) -> None:
        for item, error in route.line.expire(now_ns):
            counter = SchedulerCounter.CANCELED if error.code is Code.CANCELLED else SchedulerCounter.TIMED_OUT
            self._bump(route.id, counter, item.requests)
            self.producers.refuse(item, error)
            self._tell_sequence_worker(route, item)

    def _tell_sequence_worker(self, route: Route, item: Waiting) -> None:
        """A worker keeps what a model wants again: let it forget a request that will not come."""
        if route.sequences is not None and isinstance(item, WaitingParcel):
            for instance in route.instances.values():
                instance.bell.ring(HEADER.pack(Kind.CANCEL, 0, 1, item.producer, 0) + TOKEN.pack(item.token))

    def _decide_route(self, route: Route, now_ns: int) -> None:
        wait_until_ns = 0 if route.is_held_back else self._start_ready(route, now_ns)
        waiting = route.line.request_count
        if waiting and not route.idle:
            route.note_contention()
            for instance in route.granted():
                self._grants.revoke(instance)
        alarm_ns = route.next_alarm_ns(wait_until_ns)
        if alarm_ns:
            self._alarms[route.id] = alarm_ns
        else:
            self._alarms.pop(route.id, None)
        counters = self._counters.get(route.id)
        if counters is not None:
            counters[SchedulerCounter.PENDING] = waiting
        if route.sequences is not None:
            # Their sequences may have ended by any of the above.
            for instance in route.instances.values():
                self._tell_if_drained(instance)
        if route.is_draining and not route.is_drain_reported and route.is_quiescent:
            route.is_drain_reported = True
            self._tell(Drained(route=route.id))

    def _start_ready(self, route: Route, now_ns: int) -> int:
        """Start every batch that is ready; return until when what is left waits, 0: until something happens."""
        wait_until_ns = 0
        for instance, choice in route.choices(now_ns):
            if choice.items:
                route.idle.remove(instance)
                instance.items = choice.items
                if self._limiter is None:
                    self._dispatch(route, instance, choice, now_ns)
                else:
                    instance.state = InstanceState.STAGED
                    self._limiter.stage(instance, choice)
            elif choice.decision.wait_until_ns and (not wait_until_ns or choice.decision.wait_until_ns < wait_until_ns):
                wait_until_ns = choice.decision.wait_until_ns
        return wait_until_ns

    def _dispatch(self, route: Route, instance: Instance, choice: Choice, now_ns: int) -> None:
        batch_id = self._next_batch
        self._next_batch += 1
        instance.state = InstanceState.BUSY
        instance.batch_id = batch_id
        instance.started_ns = now_ns
        instance.grantee = choice.items[-1].producer
        message, segments = pack_batch(batch_id, choice.items, choice.slots, keeps_requests=route.keeps_requests)
        instance.bell.ring(message)
        route.note_dispatch(instance, batch_id, choice.items, segments, choice.decision, now_ns)
        self._bump(route.id, SchedulerCounter.BATCHES)

    def _release(self, instance: Instance) -> None:
        if self._limiter is not None and self._limiter.release(instance):
            # Somebody else may have waited for the resources; a decision of any route lets them go on.
            self._dirty.add(instance.route)

    def _bump(self, route_id: int, counter: SchedulerCounter, amount: int = 1) -> None:
        counters = self._counters.get(route_id)
        if counters is not None:
            counters[counter] += amount


def _no_instance(route: Route, item: Waiting) -> ServingError:
    """Return why a request cannot wait; one that ended the only instance hears so, not that there is none."""
    if item.attempt:
        return WorkerDied(f"an instance of model '{route.name}' ended unexpectedly while it ran the request")
    return NotReady(f"model '{route.name}' version {route.version} has no running instance")
