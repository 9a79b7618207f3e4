"""The scheduler's loop: sockets in, decisions, sockets out. ``python -m forebay.engine.scheduler.loop``.

One thread, one epoll. Whatever arrived is read first, then every route that changed decides once, so that requests
which arrive together are batched together and the cost is per batch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import struct
import sys
import time
import traceback

import msgspec
import zmq

from forebay.engine.scheduler.batcher import NOTHING, Decision
from forebay.engine.scheduler.client_submissions import ClientSubmissions, count_requests, ticket_of
from forebay.engine.scheduler.instances import Instance, InstanceState
from forebay.engine.scheduler.request_queue import TIMEOUT_TEXT
from forebay.engine.scheduler.route import BatchRecord, Route
from forebay.engine.scheduler.timer import Timer
from forebay.engine.scheduler.waiting import Waiting, WaitingParcel, WaitingRun
from forebay.ipc.channel import SubmitReceiver
from forebay.ipc.counters import SCHEDULER_WORDS, CountersFile, SchedulerCounter
from forebay.ipc.doorbell import Bell, ClientBell
from forebay.ipc.errors import Code, NotReady, ServingError, Unavailable, from_wire
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.messages import (
    Cancel,
    Drained,
    Explain,
    Explained,
    FrontendToScheduler,
    GrantReturned,
    InstanceDown,
    InstanceDrain,
    InstanceUp,
    ParcelSubmit,
    ProducerDown,
    ProducerUp,
    ReplyHead,
    Restored,
    RouteDrain,
    RouteGone,
    RouteUp,
    RunSubmit,
    SchedulerStart,
    Started,
    Stop,
    Submit,
    SupervisorToScheduler,
)
from forebay.ipc.messages import (
    CountersFile as CountersFileMessage,
)
from forebay.ipc.process import ignore_terminal_signals, set_name
from forebay.ipc.wire import (
    FLAG_FINAL,
    FLAG_GONE,
    GRANT,
    HEADER,
    NO_TIMES,
    PARCEL,
    TIMES,
    TOKEN,
    Kind,
    Run,
    pack_runs,
)

#: Doorbell messages from workers are a header and times.
_DONE_BYTES_MAX = 256


class Producer:
    """A frontend or shared-memory client, as the scheduler sees it. Owns the sending end of its doorbell."""

    __slots__ = ("arena_bytes", "bell", "id", "name", "trusted")

    def __init__(self, up: ProducerUp, bell: Bell) -> None:
        self.id = up.producer
        self.name = up.name
        self.arena_bytes = up.arena_bytes
        self.trusted = up.trusted
        self.bell = bell


class Scheduler:
    """All routes, and the sockets."""

    def __init__(self, lifeline: Lifeline[SupervisorToScheduler]) -> None:
        self._lifeline = lifeline
        self._epoch = 0
        self._routes: dict[int, Route] = {}
        self._instances: dict[int, Instance] = {}
        self._producers: dict[int, Producer] = {}
        self._counters_file: CountersFile | None = None
        self._counters: dict[int, memoryview] = {}
        self._next_batch = 1
        self._dirty: set[int] = set()
        self._alarms: dict[int, int] = {}
        self._restoring = False
        self._stopping = False
        self._timer = Timer()
        self._epoll = select.epoll()
        self._clients = ClientSubmissions(self, self._epoll)
        self._done: socket.socket | None = None
        self._submit: SubmitReceiver | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        #: Producers with doorbell messages that the kernel did not take.
        self._lagging: set[int] = set()

    # --- start and the big loop ---

    def run(self) -> None:
        """Serve until told to stop or the supervisor is gone."""
        message, fds = self._lifeline.receive()
        if not isinstance(message, SchedulerStart):
            raise PeerClosed("the first message must be SchedulerStart")
        self._start(message, fds[0])
        assert self._done is not None and self._submit is not None
        lifeline_fd, done_fd = self._lifeline.fileno(), self._done.fileno()
        submit_fd, timer_fd = self._submit.fileno(), self._timer.fileno()
        for fd in (lifeline_fd, done_fd, submit_fd, timer_fd):
            self._epoll.register(fd, select.EPOLLIN)
        self._lifeline.send(Started())
        poll = self._epoll.poll
        while not self._stopping:
            for fd, _events in poll(0.05 if self._lagging else -1):
                if fd == done_fd:
                    self._read_done()
                elif fd == lifeline_fd:
                    self._read_lifeline()
                elif fd == timer_fd:
                    self._timer.acknowledge()
                    now_ns = time.monotonic_ns()
                    self._dirty.update(route for route, alarm in self._alarms.items() if alarm <= now_ns)
                elif fd != submit_fd:
                    self._clients.read(fd)
            # ZeroMQ's descriptor is edge-triggered: look whenever we are awake.
            self._read_submissions()
            while self._dirty:
                self._decide()
            if self._lagging:
                self._flush_lagging()

    def _start(self, start: SchedulerStart, done_fd: int) -> None:
        self._epoch = start.epoch
        self._restoring = start.epoch > 1
        self._done = socket.socket(fileno=done_fd)
        self._done.setblocking(False)
        self._submit = SubmitReceiver(self._context, start.runtime_directory)
        self._clients.start(start.epoch)

    def close(self) -> None:
        if self._submit is not None:
            self._submit.close()
        self._context.term()

    # --- lifeline ---

    def _read_lifeline(self) -> None:
        for message, fds in self._lifeline.receive_nowait():
            self._handle(message, fds)

    def _handle(self, message: SupervisorToScheduler, fds: list[int]) -> None:
        match message:
            case RouteUp():
                self._routes[message.route] = Route(message)
                self._clients.add_route(message)
                if self._counters_file is not None and message.counter_offset:
                    self._counters[message.route] = self._counters_file.block(message.counter_offset, SCHEDULER_WORDS)
            case InstanceUp():
                self._instance_up(message, fds[0])
            case ProducerUp():
                kind = Bell if message.trusted else ClientBell
                self._producers[message.producer] = Producer(message, kind(socket.socket(fileno=fds[0])))
                if not message.trusted:
                    self._clients.add(message, fds[1])
            case CountersFileMessage():
                self._counters_file = CountersFile(fds[0])
                os.close(fds[0])
            case InstanceDown():
                self._instance_down(message.instance)
            case InstanceDrain():
                self._instance_drain(message.instance)
            case ProducerDown():
                self._producer_down(message.producer)
            case RouteDrain():
                self._route_drain(message.route)
            case RouteGone():
                self._route_gone(message)
            case Explain():
                self._explain(message)
            case Restored():
                self._restoring = False
                self._resync_if_ready()
            case Stop():
                self._stopping = True
            case SchedulerStart():
                pass

    def _instance_up(self, up: InstanceUp, fd: int) -> None:
        route = self._routes.get(up.route)
        bell = Bell(socket.socket(fileno=fd))
        if route is None:
            bell.close()
            return
        syncing = self._restoring
        instance = Instance(up.instance, up.route, up.name, bell, syncing=syncing)
        self._instances[instance.id] = instance
        route.add_instance(instance)
        if syncing:
            bell.ring(HEADER.pack(Kind.SYNC, 0, 0, 0, self._epoch))
        self._dirty.add(up.route)

    def _instance_down(self, instance_id: int) -> None:
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return
        self._clients.forget_instance(instance_id)
        route = self._routes.get(instance.route)
        if route is not None:
            route.remove_instance(instance)
        if instance.state is InstanceState.BUSY:
            # Everything the worker had sent is ahead of this in the producers' doorbells (one queue), so what they
            # still wait for when they read it is truly lost.
            self._bump(instance.route, SchedulerCounter.LOST_BATCHES)
            self._send_lost(instance)
        elif instance.state in (InstanceState.GRANTED, InstanceState.REVOKING):
            self.ring_producer(
                instance.grantee,
                HEADER.pack(Kind.REVOKE, FLAG_GONE, 0, instance.id, 0)
                + GRANT.pack(instance.route, instance.id, instance.generation, 0),
            )
        instance.bell.close()
        self._dirty.add(instance.route)
        self._resync_if_ready()

    def _instance_drain(self, instance_id: int) -> None:
        instance = self._instances.get(instance_id)
        if instance is None:
            self._lifeline.send(Drained(instance=instance_id))
            return
        instance.draining = True
        route = self._routes.get(instance.route)
        if route is not None and instance in route.idle:
            route.idle.remove(instance)
        if instance.state is InstanceState.IDLE:
            self._lifeline.send(Drained(instance=instance_id))
        elif instance.state is InstanceState.GRANTED:
            self._revoke(instance)

    def _producer_down(self, producer_id: int) -> None:
        self._clients.remove(producer_id)
        producer = self._producers.pop(producer_id, None)
        if producer is not None:
            producer.bell.close()
        self._lagging.discard(producer_id)
        for route in self._routes.values():
            route.queue.remove_producer(producer_id)
            self._dirty.add(route.id)
        for instance in self._instances.values():
            if instance.grantee == producer_id and instance.state in (InstanceState.GRANTED, InstanceState.REVOKING):
                # What it had rung is in the worker's own queue, before anything that we send now.
                self._grant_ended(instance)

    def _route_drain(self, route_id: int) -> None:
        route = self._routes.get(route_id)
        if route is None:
            self._lifeline.send(Drained(route=route_id))
            return
        route.is_draining = True
        for instance in route.granted():
            self._revoke(instance)
        self._dirty.add(route_id)

    def _route_gone(self, gone: RouteGone) -> None:
        route = self._routes.pop(gone.route, None)
        self._clients.remove_route(gone.route)
        self._counters.pop(gone.route, None)
        self._alarms.pop(gone.route, None)
        if route is None:
            return
        error = from_wire(gone.code, gone.text)
        for item in route.queue.clear():
            self._refuse(item, error)
        for instance in list(route.instances.values()):
            self._instances.pop(instance.id, None)
            instance.bell.close()

    def _explain(self, message: Explain) -> None:
        route = self._routes.get(message.route)
        batches: list[dict[str, object]] = []
        if route is not None:
            for record in route.recent:
                entry: dict[str, object] = dict(record._asdict())
                entry["reason"] = str(record.reason)
                entry["run_ns"] = route.batch_ns.get(record.batch, 0)
                batches.append(entry)
        self._lifeline.send(Explained(request=message.request, batches=batches))

    def _resync_if_ready(self) -> None:
        """After a restart: once every worker has finished what the last scheduler sent, ask for what was lost."""
        if self._epoch <= 1 or self._restoring:
            return
        if any(instance.state is InstanceState.SYNCING for instance in self._instances.values()):
            return
        self._restoring = False
        for producer in self._producers.values():
            self.ring_producer(producer.id, HEADER.pack(Kind.RESYNC, 0, 0, 0, self._epoch))

    # --- submissions ---

    def _read_submissions(self) -> None:
        assert self._submit is not None
        while True:
            try:
                message = self._submit.receive_nowait()
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                print(f"forebay scheduler: dropped a malformed submission: {error}", file=sys.stderr)
                continue
            if message is None:
                return
            self.accept(message)

    # What the clients' submissions need of this loop.

    def route_of(self, number: int) -> Route | None:
        return self._routes.get(number)

    def instance_of(self, number: int) -> Instance | None:
        return self._instances.get(number)

    def count_waiting(self, producer_id: int) -> int:
        queues = [route.queue for route in self._routes.values()]
        return count_requests(producer_id, [*queues, *(instance.items for instance in self._instances.values())])

    def accept(self, message: FrontendToScheduler) -> None:
        """Take a message of a producer whose numbers are known to be sound."""
        if isinstance(message, Submit):
            if message.epoch != self._epoch or message.producer not in self._producers:
                return  # Meant for an earlier scheduler: resubmitted after RESYNC.
            producer = message.producer
            for run in message.runs:
                self._accept_run(producer, run)
            for parcel in message.parcels:
                self._accept_parcel(producer, parcel)
        elif isinstance(message, GrantReturned):
            instance = self._instances.get(message.instance)
            if instance is not None and instance.generation == message.generation:
                self._grant_ended(instance)
        else:
            self._cancel(message)

    def _accept_run(self, producer: int, run: RunSubmit) -> None:
        item = WaitingRun(
            producer, run.base, run.capacity, run.first, run.requests, run.rows_each, run.enqueue_ns,
            attempt=run.attempt, priority=run.priority, timeout_us=run.timeout_us,
        )  # fmt: skip
        self._enqueue(run.route, item)

    def _accept_parcel(self, producer: int, parcel: ParcelSubmit) -> None:
        item = WaitingParcel(
            producer, parcel.token, parcel.rows, parcel.enqueue_ns, parcel.head, attempt=parcel.attempt,
            priority=parcel.priority, timeout_us=parcel.timeout_us, shape_key=parcel.shape_key,
        )  # fmt: skip
        self._enqueue(parcel.route, item)

    def _enqueue(self, route_id: int, item: Waiting) -> None:
        route = self._routes.get(route_id)
        if route is None:
            self._refuse(item, NotReady("the model version was unloaded before the request could run"))
            return
        if not route.instances:
            self._refuse(item, NotReady(f"model '{route.name}' version {route.version} has no running instance"))
            return
        try:
            route.queue.append(item)
        except Unavailable as error:
            self._bump(route_id, SchedulerCounter.REJECTED, item.requests)
            self._refuse(item, error)
        self._dirty.add(route_id)

    def _cancel(self, message: Cancel) -> None:
        tokens = frozenset(message.tokens)
        for route in self._routes.values():
            for item in route.queue.remove_tokens(message.producer, tokens):
                tokens -= {item.token}
                self._bump(route.id, SchedulerCounter.CANCELED)
                self._refuse(item, from_wire(Code.CANCELLED, ""))
        if not tokens:
            return
        packed = b"".join(TOKEN.pack(token) for token in tokens)
        for instance in self._instances.values():
            running = {item.token for item in instance.items if isinstance(item, WaitingParcel)}
            if running & tokens or instance.state is InstanceState.IDLE:
                # An idle instance may hold open requests too: decoupled models answer after their batch.
                instance.bell.ring(HEADER.pack(Kind.CANCEL, 0, len(tokens), message.producer, 0) + packed)

    # --- decisions ---

    def _decide(self) -> None:
        now_ns = time.monotonic_ns()
        dirty, self._dirty = self._dirty, set()
        for route_id in dirty:
            route = self._routes.get(route_id)
            if route is not None:
                self._decide_route(route, now_ns)
        self._timer.set(min(self._alarms.values(), default=0))

    def _decide_route(self, route: Route, now_ns: int) -> None:
        for item in route.queue.expire(now_ns):
            self._bump(route.id, SchedulerCounter.TIMED_OUT, item.requests)
            self._refuse(item, Unavailable(TIMEOUT_TEXT))
        decision = NOTHING
        while route.idle and route.queue.request_count:
            decision, items = route.next_batch(now_ns)
            if not items:
                break
            self._dispatch(route, route.idle.pop(), items, decision, now_ns)
        if route.queue.request_count and not route.idle:
            route.note_contention()
            for instance in route.granted():
                self._revoke(instance)
        alarm_ns = route.next_alarm_ns(decision)
        if alarm_ns:
            self._alarms[route.id] = alarm_ns
        else:
            self._alarms.pop(route.id, None)
        counters = self._counters.get(route.id)
        if counters is not None:
            counters[SchedulerCounter.PENDING] = route.queue.request_count
        if route.is_draining and not route.is_drain_reported and route.is_quiescent:
            route.is_drain_reported = True
            self._lifeline.send(Drained(route=route.id))

    def _dispatch(
        self, route: Route, instance: Instance, items: list[Waiting], decision: Decision, now_ns: int
    ) -> None:
        batch_id = self._next_batch
        self._next_batch += 1
        instance.state = InstanceState.BUSY
        instance.items = items
        instance.batch_id = batch_id
        instance.started_ns = now_ns
        instance.grantee = items[-1].producer
        if isinstance(items[0], WaitingRun):
            runs = merge_runs(items)
            message = pack_runs(Kind.RUNS, 0, 0, batch_id, runs)
            segments = len(runs)
        else:
            message = pack_parcels(batch_id, items)
            segments = len(items)
        instance.bell.ring(message)
        route.note_dispatch()
        requests = sum(item.requests for item in items)
        rows = sum(item.requests * item.rows_each for item in items)
        route.recent.append(
            BatchRecord(
                batch_id, rows, requests, segments, now_ns - items[0].enqueue_ns, decision.reason, instance.name, now_ns
            )
        )
        self._bump(route.id, SchedulerCounter.BATCHES)

    # --- workers ---

    def _read_done(self) -> None:
        assert self._done is not None
        receive = self._done.recv
        while True:
            try:
                message = receive(_DONE_BYTES_MAX)
            except BlockingIOError:
                return
            if len(message) < HEADER.size:
                return
            kind, flags, _count, instance_id, batch_id = HEADER.unpack_from(message)
            instance = self._instances.get(instance_id)
            if instance is None:
                continue
            if kind == Kind.DONE and instance.state is InstanceState.BUSY and instance.batch_id == batch_id:
                self._batch_done(instance, flags, message)
            elif kind == Kind.SYNCED and batch_id == self._epoch and instance.state is InstanceState.SYNCING:
                self._set_idle(instance)
                self._resync_if_ready()

    def _batch_done(self, instance: Instance, _flags: int, message: bytes) -> None:
        route = self._routes.get(instance.route)
        if route is None:
            return
        try:
            start_ns, _input_end_ns, _output_start_ns, end_ns = TIMES.unpack_from(message, HEADER.size)
        except struct.error:
            start_ns = end_ns = 0
        route.batch_ns[instance.batch_id] = end_ns - start_ns
        if len(route.batch_ns) > 2 * (route.recent.maxlen or 1):
            alive = {record.batch for record in route.recent}
            route.batch_ns = {batch: ns for batch, ns in route.batch_ns.items() if batch in alive}
        producer_id = instance.grantee
        self._set_idle(instance)
        if route.wants_grant() and not instance.draining:
            self._grant(route, instance, producer_id)

    def _set_idle(self, instance: Instance) -> None:
        route = self._routes.get(instance.route)
        if route is None:
            return
        route.set_idle(instance)
        self._dirty.add(route.id)
        if instance.draining:
            self._lifeline.send(Drained(instance=instance.id))

    # --- grants ---

    def _grant(self, route: Route, instance: Instance, producer_id: int) -> None:
        producer = self._producers.get(producer_id)
        if producer is None or instance not in route.idle:
            return
        if not producer.trusted and not self._clients.can_ring(producer_id, instance.id):
            return
        route.idle.remove(instance)
        instance.state = InstanceState.GRANTED
        instance.generation += 1
        instance.grantee = producer_id
        self._bump(route.id, SchedulerCounter.GRANTS)
        ticket = 0
        if not producer.trusted:
            # Its worker keeps the grant: nobody ever has to wait for a client to give one back.
            ticket = ticket_of(self._epoch, instance)
            instance.bell.ring(HEADER.pack(Kind.RING_OPEN, 0, 0, producer_id, ticket))
        self.ring_producer(
            producer_id,
            HEADER.pack(Kind.GRANT, 0, 0, instance.id, ticket)
            + GRANT.pack(route.id, instance.id, instance.generation, route.batcher.grant_rows),
        )

    def _revoke(self, instance: Instance) -> None:
        self._bump(instance.route, SchedulerCounter.REVOKES)
        if self._clients.is_client(instance.grantee):
            # What is sent to the worker from now on comes after it: the instance is ours at once.
            ticket = ticket_of(self._epoch, instance)
            instance.bell.ring(HEADER.pack(Kind.RING_CLOSE, 0, 0, instance.grantee, ticket))
            self._grant_ended(instance)
            return
        instance.state = InstanceState.REVOKING
        self.ring_producer(
            instance.grantee,
            HEADER.pack(Kind.REVOKE, 0, 0, instance.id, 0)
            + GRANT.pack(instance.route, instance.id, instance.generation, 0),
        )

    def _grant_ended(self, instance: Instance) -> None:
        if instance.state in (InstanceState.GRANTED, InstanceState.REVOKING):
            self._set_idle(instance)

    # --- to producers ---

    def _send_lost(self, instance: Instance) -> None:
        runs: dict[int, list[Run]] = {}
        tokens: dict[int, list[int]] = {}
        for item in instance.items:
            if isinstance(item, WaitingRun):
                runs.setdefault(item.producer, []).append(to_wire(item))
            elif isinstance(item, WaitingParcel):
                tokens.setdefault(item.producer, []).append(item.token)
        for producer_id, lost in runs.items():
            self.ring_producer(
                producer_id, pack_runs(Kind.RUNS_LOST, 0, instance.id, instance.batch_id, lost, NO_TIMES)
            )
        for producer_id, lost_tokens in tokens.items():
            packed = b"".join(TOKEN.pack(token) for token in lost_tokens)
            header = HEADER.pack(Kind.PARCEL_LOST, 0, len(lost_tokens), instance.id, instance.batch_id)
            self.ring_producer(producer_id, header + NO_TIMES + packed)

    def _refuse(self, item: Waiting, error: ServingError) -> None:
        """Answer what never ran."""
        if isinstance(item, WaitingRun):
            trailer = bytes((error.code,)) + error.text.encode()
            message = pack_runs(Kind.RUNS_FAILED, 0, 0, 0, [to_wire(item)], NO_TIMES) + trailer
        else:
            assert isinstance(item, WaitingParcel)
            reply = msgspec.msgpack.encode(ReplyHead(code=error.code, text=error.text or "cancelled"))
            message = HEADER.pack(Kind.PARCEL_REPLY, FLAG_FINAL, 1, 0, 0) + NO_TIMES + TOKEN.pack(item.token) + reply
        self.ring_producer(item.producer, message)

    def ring_producer(self, producer_id: int, message: bytes) -> None:
        """Send into a producer's completion doorbell; what a full one does not take is sent later."""
        producer = self._producers.get(producer_id)
        if producer is not None:
            producer.bell.ring(message)
            if producer.bell.backlog_count:
                self._lagging.add(producer_id)

    def _flush_lagging(self) -> None:
        for producer_id in list(self._lagging):
            producer = self._producers.get(producer_id)
            if producer is None or (producer.bell.flush() and not producer.bell.backlog_count):
                self._lagging.discard(producer_id)

    def _bump(self, route_id: int, counter: SchedulerCounter, amount: int = 1) -> None:
        counters = self._counters.get(route_id)
        if counters is not None:
            counters[counter] += amount


def to_wire(item: WaitingRun) -> Run:
    """Return the item as the workers' message names it."""
    return Run(
        item.producer, item.requests, item.base, item.capacity, item.first, item.requests * item.rows_each, item.attempt,
        item.requests * item.enqueue_ns,
    )  # fmt: skip


def merge_runs(items: list[Waiting]) -> list[Run]:
    """Join neighbouring rows to as few segments as possible; usually one."""
    runs: list[Run] = []
    for item in items:
        assert isinstance(item, WaitingRun)
        run = to_wire(item)
        if runs:
            last = runs[-1]
            if (
                last.producer == run.producer
                and last.base == run.base
                and last.first + last.rows == run.first
                and last.capacity == run.capacity
            ):
                runs[-1] = last._replace(
                    requests=last.requests + run.requests,
                    rows=last.rows + run.rows,
                    attempt=max(last.attempt, run.attempt),
                    enqueue_sum_ns=last.enqueue_sum_ns + run.enqueue_sum_ns,
                )
                continue
        runs.append(run)
    return runs


def pack_parcels(batch_id: int, items: list[Waiting]) -> bytes:
    """Build a PARCELS message."""
    parts = [HEADER.pack(Kind.PARCELS, 0, len(items), 0, batch_id)]
    for item in items:
        assert isinstance(item, WaitingParcel)
        parts.append(PARCEL.pack(item.producer, item.rows_each, item.token, item.enqueue_ns, len(item.head)))
        parts.append(item.head)
    return b"".join(parts)


def main() -> int:
    """Entry of the scheduler process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline-fd", type=int, required=True)
    arguments = parser.parse_args()
    set_name("scheduler")
    ignore_terminal_signals()
    lifeline: Lifeline[SupervisorToScheduler] = Lifeline(
        socket.socket(fileno=arguments.lifeline_fd), SupervisorToScheduler
    )
    scheduler = Scheduler(lifeline)
    try:
        scheduler.run()
    except PeerClosed:
        return 1
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return 1
    with contextlib.suppress(zmq.ZMQError):
        scheduler.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
