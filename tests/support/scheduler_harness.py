"""A scheduler core on real socket pairs, without processes: tests play supervisor, frontends and workers."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from forebay.engine.scheduler.core import SchedulerCore
from forebay.ipc.client_wire import NUMBER, SubmitKind
from forebay.ipc.counters import COUNTERS_BYTES, SCHEDULER_WORDS, CountersFile, SchedulerCounter
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.messages import Message, ParcelSubmit, ReplyHead, RunSubmit, Submit
from forebay.ipc.scheduler_messages import (
    BatchingPolicy,
    InstanceDown,
    InstanceUp,
    ProducerUp,
    Resource,
    RouteUp,
    SchedulerStart,
)
from forebay.ipc.scheduler_messages import CountersFile as CountersFileMessage
from forebay.ipc.wire import (
    GRANT,
    HEADER,
    MESSAGE_BYTES_MAX,
    OPEN,
    PARCEL,
    SLOT,
    TIMES,
    TOKEN,
    Kind,
    Run,
    Slot,
    unpack_runs,
)

ROUTE = 3
MS = 1_000_000
DYNAMIC = BatchingPolicy(max_batch_size=8, dynamic=True, preferred_batch_sizes=(8,))


@dataclass
class Batch:
    """What a worker was given."""

    number: int
    runs: list[Run]
    tokens: list[int]
    slots: list[Slot]


@dataclass
class Answer:
    """What a producer was told."""

    kind: Kind
    number: int
    """Batch, epoch or ticket."""
    instance: int
    flags: int
    runs: list[Run]
    tokens: list[int]
    code: int
    text: str
    generation: int


class SchedulerHarness:
    """The core and its surroundings; time is :attr:`now_ns`."""

    def __init__(self, *, epoch: int = 1, **start: Any) -> None:
        self.epoch = epoch
        self.now_ns = 1_000 * MS
        self.told: list[Message] = []
        self.alarm_ns = 0
        self._epoll = select.epoll()
        self.core = SchedulerCore(self.told.append, self._epoll)
        self.core.start(SchedulerStart(epoch=epoch, runtime_directory="", **start))
        self._counters = CountersFile()
        self._offset = self._counters.allocate(SCHEDULER_WORDS)
        self._handle(CountersFileMessage(byte_size=COUNTERS_BYTES), os.dup(self._counters.fd))
        self._workers: dict[int, socket.socket] = {}
        self._producers: dict[int, socket.socket] = {}
        self._submissions: list[socket.socket] = []

    def close(self) -> None:
        self.core.close()
        for sock in (*self._workers.values(), *self._producers.values(), *self._submissions):
            sock.close()
        self._epoll.close()

    # --- supervisor ---

    def handle(self, message: Any, *fds: int) -> None:
        """Send a message of the supervisor and let the core decide."""
        self._handle(message, *fds)
        self.decide()

    def _handle(self, message: Any, *fds: int) -> None:
        self.core.handle(message, list(fds), self.now_ns)

    def add_route(
        self, policy: BatchingPolicy = DYNAMIC, *, route: int = ROUTE, extra: Mapping[str, Any] | None = None
    ) -> None:
        offset = self._offset if route == ROUTE else 0
        self.handle(
            RouteUp(
                route=route,
                name=f"model{route}",
                version=1,
                batching=policy,
                extra=dict(extra or {}),
                counter_offset=offset,
            )
        )

    def add_instance(
        self, instance: int = 1, *, route: int = ROUTE, resources: tuple[Resource, ...] = (), priority: int = 1
    ) -> None:
        sender, receiver = create_doorbell()
        receiver.setblocking(False)
        self._workers[instance] = receiver
        message = InstanceUp(
            route=route, instance=instance, name=f"i{instance}", resources=resources, rate_priority=priority
        )
        self.handle(message, sender.detach())

    def kill_instance(self, instance: int) -> None:
        self._workers.pop(instance).close()
        self.handle(InstanceDown(instance=instance))

    def add_producer(self, producer: int = 7) -> None:
        self.handle(ProducerUp(producer=producer, name=f"http {producer}"), self._completions_of(producer))

    def add_client(self, producer: int, *rings: int) -> None:
        """Add a shared-memory client that can ring these instances."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._submissions.append(ours)
        up = ProducerUp(producer=producer, name="client", arena_bytes=1 << 20, trusted=False)
        self.handle(up, self._completions_of(producer), theirs.detach())
        ours.send(HEADER.pack(SubmitKind.RINGS, 0, len(rings), 0, self.epoch) + b"".join(map(NUMBER.pack, rings)))
        for submissions, _events in self._epoll.poll(0):
            self.core.clients.read(submissions)

    def _completions_of(self, producer: int) -> int:
        sender, receiver = create_doorbell()
        receiver.setblocking(False)
        self._producers[producer] = receiver
        return sender.detach()

    def counter(self, counter: SchedulerCounter) -> int:
        return int(self._counters.block(self._offset, SCHEDULER_WORDS)[counter])

    # --- time ---

    def decide(self) -> None:
        while self.core.has_to_decide:
            self.alarm_ns = self.core.decide(self.now_ns)

    def advance(self, ns: int) -> None:
        """Let time pass; the alarm goes off if it is due."""
        self.now_ns += ns
        if self.alarm_ns and self.alarm_ns <= self.now_ns:
            self.core.wake(self.now_ns)
            self.decide()

    # --- producers ---

    def submit_runs(
        self, *runs: tuple[int, int], producer: int = 7, rows: int = 1, route: int = ROUTE, **f: Any
    ) -> None:
        """Submit (first row, requests) pairs as one turn."""
        self.accept(
            Submit(
                producer=producer,
                epoch=f.pop("epoch", self.epoch),
                runs=tuple(RunSubmit(route, 4096, 1024, first, n, rows, self.now_ns, **f) for first, n in runs),
            )
        )

    def submit_parcels(self, *tokens: int, producer: int = 7, route: int = ROUTE, **fields: Any) -> None:
        """Submit parcels as one turn."""
        epoch = fields.pop("epoch", self.epoch)
        fields = {"rows": 1, "head": b"head", **fields}
        self.accept(
            Submit(
                producer=producer,
                epoch=epoch,
                parcels=tuple(
                    ParcelSubmit(route=route, token=token, enqueue_ns=self.now_ns, **fields) for token in tokens
                ),
            )
        )

    def accept(self, message: Any) -> None:
        self.core.accept(message)
        self.decide()

    def answers(self, producer: int = 7) -> list[Answer]:
        """Return what the producer has been told since the last call."""
        return [_answer(message) for message in _drain(self._producers[producer])]

    # --- workers ---

    def batches(self, instance: int = 1) -> list[Batch]:
        """Return what the worker was given since the last call."""
        return [_batch(m) for m in self.messages(instance) if m[0] in (Kind.RUNS, Kind.PARCELS, Kind.SEQUENCES)]

    def messages(self, instance: int = 1) -> list[bytes]:
        return _drain(self._workers[instance])

    def batch(self, instance: int = 1) -> Batch:
        """Return the one batch that the worker was given."""
        (batch,) = self.batches(instance)
        return batch

    def finish(
        self, batch: Batch, instance: int = 1, *, left_open: Sequence[tuple[int, int]] = (), flags: int = 0
    ) -> None:
        """Say that the worker has run a batch.

        Args:
            left_open: (producer, token) of requests that are not answered yet.
            flags: of each of those.
        """
        header = HEADER.pack(Kind.DONE, 0, len(left_open), instance, batch.number)
        times = TIMES.pack(self.now_ns, self.now_ns, self.now_ns + 5, self.now_ns + 5)
        self.done(header + times + b"".join(OPEN.pack(p, flags, token) for p, token in left_open))

    def close_request(self, token: int, instance: int = 1, producer: int = 7) -> None:
        self.done(HEADER.pack(Kind.CLOSED, 0, 1, instance, 0) + OPEN.pack(producer, 0, token))

    def done(self, message: bytes) -> None:
        self.core.take_done(message, self.now_ns)
        self.decide()


def _drain(sock: socket.socket) -> list[bytes]:
    messages: list[bytes] = []
    while True:
        try:
            messages.append(sock.recv(MESSAGE_BYTES_MAX))
        except BlockingIOError:
            return messages


def _batch(message: bytes) -> Batch:
    kind, _flags, count, _sender, number = HEADER.unpack_from(message)
    view = memoryview(message)
    if kind == Kind.RUNS:
        return Batch(number, unpack_runs(view, count, HEADER.size), [], [])
    offset = HEADER.size
    slots: list[Slot] = []
    if kind == Kind.SEQUENCES:
        slots = [Slot._make(SLOT.unpack_from(message, offset + index * SLOT.size)) for index in range(count)]
        offset += count * SLOT.size
    tokens: list[int] = []
    for _ in range(count):
        _producer, _rows, token, _enqueue_ns, head_bytes = PARCEL.unpack_from(message, offset)
        offset += PARCEL.size + head_bytes
        tokens.append(token)
    assert offset == len(message)
    return Batch(number, [], tokens, slots)


def _answer(message: bytes) -> Answer:
    kind, flags, count, instance, number = HEADER.unpack_from(message)
    answer = Answer(Kind(kind), number, instance, flags, [], [], -1, "", 0)
    after_times = HEADER.size + TIMES.size
    match answer.kind:
        case Kind.RUNS_FAILED | Kind.RUNS_LOST | Kind.RUNS_DONE:
            answer.runs = unpack_runs(memoryview(message), count, after_times)
            end = after_times + count * 40
            if answer.kind is Kind.RUNS_FAILED:
                answer.code, answer.text = message[end], message[end + 1 :].decode()
        case Kind.PARCEL_LOST:
            answer.tokens = [token for (token,) in TOKEN.iter_unpack(message[after_times:])]
        case Kind.PARCEL_REPLY:
            answer.tokens = [TOKEN.unpack_from(message, after_times)[0]]
            reply = msgspec.msgpack.decode(message[after_times + TOKEN.size :], type=ReplyHead)
            answer.code, answer.text = reply.code, reply.text
        case Kind.RESYNC:
            answer.tokens = [token for (token,) in TOKEN.iter_unpack(message[HEADER.size :])]
        case Kind.GRANT | Kind.REVOKE:
            _route, answer.instance, answer.generation, _rows = GRANT.unpack_from(message, HEADER.size)
        case _:
            pass
    return answer
