"""What the scheduler takes from shared-memory clients, and what it answers instead (docs/shm-protocol.md)."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from forebay.engine.scheduler.client_submissions import ClientSubmissions, believable_ns
from forebay.engine.scheduler.instances import Instance
from forebay.engine.scheduler.route import Route
from forebay.ipc.client_wire import (
    CANCEL_RUN,
    CANCEL_RUNG,
    FLAG_SEQUENCE_END,
    FLAG_SEQUENCE_START,
    NUMBER,
    OUTSTANDING_MAX,
    SUBMIT_PARCEL,
    SUBMIT_RUN,
    SubmitKind,
)
from forebay.ipc.messages import Cancel, FrontendToScheduler, ParcelSubmit, ReplyHead, RowsCancel, RunSubmit, Submit
from forebay.ipc.scheduler_messages import BatchingPolicy, ProducerUp, RouteUp
from forebay.ipc.wire import FLAG_MOVED, GROW, HEADER, RUN, TIMES, TOKEN, Kind, pack_rows_cancel

EPOCH = 4


class FakeEngine:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.accepted: list[FrontendToScheduler] = []
        self.rung: list[bytes] = []
        self.to_worker: list[bytes] = []
        self.ringers = {3}
        self.is_draining = False
        self.waiting = 0

    def accept(self, message: FrontendToScheduler) -> None:
        self.accepted.append(message)

    def ring_producer(self, producer_id: int, message: bytes) -> None:
        assert producer_id == 3
        self.rung.append(message)

    def route_of(self, number: int) -> Route | None:
        return cast(Route, SimpleNamespace(is_draining=self.is_draining)) if number == 5 else None

    def instance_of(self, number: int) -> Instance | None:
        return (
            cast(Instance, SimpleNamespace(hint=self.to_worker.append, ringers=self.ringers)) if number == 9 else None
        )

    def count_waiting(self, producer_id: int) -> int:
        return self.waiting


class Scene:
    """One client, number 3, with an arena of 64 KiB; route 5 takes up to 8 rows of 256 and 4 bytes."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.epoll = select.epoll()
        self.clients = ClientSubmissions(self.engine, self.epoll)
        self.clients.start(EPOCH)
        self.clients.add_route(
            RouteUp(route=5, name="m", version=1, batching=BatchingPolicy(max_batch_size=8), row_bytes=(256, 4))
        )
        self.client, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = receiver.detach()
        self.clients.add(ProducerUp(producer=3, name="c", arena_bytes=65536, trusted=False), self.fd)
        self.send(SubmitKind.RINGS, NUMBER.pack(9))

    @property
    def is_listened_to(self) -> bool:
        return self.clients.can_ring(3, 9)

    def send(self, kind: int, body: bytes = b"", count: int = 1, sender: int = 0, epoch: int = EPOCH) -> None:
        self.client.send(HEADER.pack(kind, 0, count, sender, epoch) + body)
        self.clients.read(self.fd)

    def send_run(self, **changes: int) -> None:
        fields = {
            "route": 5, "requests": 2, "base": 64, "capacity": 16, "first": 4, "rows_each": 3, "attempt": 0,
            "priority": 1, "patience_us": 0, "timeout_us": 7, "enqueue_ns": 0,
        } | changes  # fmt: skip
        self.send(SubmitKind.RUNS, SUBMIT_RUN.pack(*fields.values()))

    def send_parcel(self, head: bytes = b"head", text: bytes = b"", **changes: int) -> None:
        fields = {
            "route": 5, "rows": 2, "token": 11, "shape_key": 12, "timeout_us": 13, "deadline_ns": 14,
            "enqueue_ns": 0, "correlation": 15, "priority": 16, "attempt": 1, "head": len(head), "text": len(text),
            "flags": 0, "zero": 0,
        } | changes  # fmt: skip
        self.send(SubmitKind.PARCEL, SUBMIT_PARCEL.pack(*fields.values()) + head + text)

    def close(self) -> None:
        self.clients.remove(3)
        self.client.close()
        self.epoll.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def test_runs_are_handed_on(scene: Scene) -> None:
    now_ns = time.monotonic_ns()
    scene.send_run(enqueue_ns=now_ns)
    expected = RunSubmit(
        route=5, base=64, capacity=16, first=4, requests=2, rows_each=3, enqueue_ns=now_ns, priority=1, timeout_us=7
    )
    assert scene.engine.accepted == [Submit(producer=3, epoch=EPOCH, runs=(expected,))]


def test_deadlines_of_runs_count_from_when_the_requests_were_made(scene: Scene) -> None:
    made_ns = time.monotonic_ns() - 1_000_000
    scene.send_run(enqueue_ns=made_ns, patience_us=5_000)
    scene.send_run(enqueue_ns=made_ns)
    runs = [message.runs[0] for message in scene.engine.accepted if isinstance(message, Submit)]
    assert [run.deadline_ns for run in runs] == [made_ns + 5_000_000, 0]


def test_parcels_are_handed_on(scene: Scene) -> None:
    now_ns = time.monotonic_ns()
    scene.send_parcel(enqueue_ns=now_ns, flags=FLAG_SEQUENCE_START)
    scene.send_parcel(enqueue_ns=now_ns, flags=FLAG_SEQUENCE_END, text="\u00fc".encode())
    expected = ParcelSubmit(
        route=5, token=11, rows=2, enqueue_ns=now_ns, head=b"head", shape_key=12, priority=16, timeout_us=13,
        deadline_ns=14, correlation_id=15, sequence_start=True, attempt=1,
    )  # fmt: skip
    by_name = msgspec.structs.replace(expected, correlation_id="\u00fc", sequence_start=False, sequence_end=True)
    parcels = [message.parcels[0] for message in scene.engine.accepted if isinstance(message, Submit)]
    assert parcels == [expected, by_name]


def test_cancellations_are_handed_on(scene: Scene) -> None:
    scene.send(SubmitKind.CANCEL, TOKEN.pack(1) + TOKEN.pack(2), 2)
    scene.send(SubmitKind.CANCEL_RUNS, CANCEL_RUN.pack(5, 7, 64))
    rows = (RowsCancel(route=5, base=64, firsts=(7,)),)
    assert scene.engine.accepted == [Cancel(producer=3, tokens=(1, 2)), Cancel(producer=3, rows=rows)]


def test_worker_hears_that_what_it_was_rung_for_is_cancelled(scene: Scene) -> None:
    rung = CANCEL_RUNG.pack(77, 64, 7, 0)
    scene.send(SubmitKind.CANCEL_RUNG, rung, sender=9)
    assert scene.engine.to_worker == [pack_rows_cancel(77, 3, 64, (7,))]
    scene.send(SubmitKind.CANCEL_RUNG, rung, sender=10)
    scene.engine.ringers.clear()  # It was never granted to this client.
    scene.send(SubmitKind.CANCEL_RUNG, rung, sender=9)
    assert len(scene.engine.to_worker) == 1
    assert scene.is_listened_to


def test_collects_go_to_the_worker_in_the_clients_name(scene: Scene) -> None:
    scene.send(SubmitKind.COLLECT, GROW.pack(1, 64, 128), sender=9)
    scene.send(SubmitKind.COLLECT, GROW.pack(1, 64, 128), sender=10)
    scene.send(SubmitKind.COLLECT, GROW.pack(2, 64, 128) + b"rooms", sender=9)
    header = HEADER.pack(Kind.COLLECT, 0, 1, 3, 0)
    assert scene.engine.to_worker == [header + GROW.pack(1, 64, 128), header + GROW.pack(2, 64, 128) + b"rooms"]


def test_rings_count_for_instances_that_are(scene: Scene) -> None:
    scene.send(SubmitKind.RINGS, NUMBER.pack(9) + NUMBER.pack(10), 2)
    assert scene.clients.can_ring(3, 9)
    assert not scene.clients.can_ring(3, 10)
    assert not scene.clients.can_ring(4, 9)
    scene.clients.forget_instance(9)
    assert not scene.clients.can_ring(3, 9)


def test_messages_for_an_earlier_scheduler_are_dropped(scene: Scene) -> None:
    scene.send(SubmitKind.RUNS, b"whatever", epoch=EPOCH - 1)
    assert scene.engine.accepted == scene.engine.rung == []
    assert scene.is_listened_to


def test_refused_rows_are_named_in_the_answer(scene: Scene) -> None:
    scene.send_run(rows_each=9)
    (message,) = scene.engine.rung
    assert HEADER.unpack_from(message) == (Kind.RUNS_FAILED, 0, 1, 0, 0)
    run = RUN.unpack_from(message, HEADER.size + TIMES.size)
    assert run[:6] == (3, 2, 64, 16, 4, 18)
    assert b"1 to 8 rows, this one has 9" in message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"first": 11}, "rows outside their slab"),
        ({"base": 65536 - 16 * 256}, "outside the client's arena"),
        ({"capacity": 1 << 21}, "impossible slab"),
    ],
)
def test_places_are_checked_to_the_byte(scene: Scene, changes: dict[str, int], text: str) -> None:
    scene.send_run(**changes)
    assert text.encode() in scene.engine.rung[0]
    assert scene.engine.accepted == []


def test_the_last_place_that_fits_is_taken(scene: Scene) -> None:
    scene.send_run(first=10, base=65536 - 16 * 256 - 64)
    assert scene.engine.rung == []
    assert len(scene.engine.accepted) == 1


def test_clients_of_a_route_that_ends_are_told_to_move(scene: Scene) -> None:
    scene.engine.is_draining = True
    scene.send_run()
    scene.send_parcel()
    run, parcel = scene.engine.rung
    assert HEADER.unpack_from(run)[1] & FLAG_MOVED
    assert HEADER.unpack_from(parcel)[1] & FLAG_MOVED
    reply = msgspec.msgpack.decode(parcel[HEADER.size + TIMES.size + TOKEN.size :], type=ReplyHead)
    assert reply.text == "the model version was unloaded before the request could run"


def test_more_in_flight_than_allowed_is_refused_until_some_have_ended(scene: Scene) -> None:
    scene.engine.waiting = 2 * OUTSTANDING_MAX
    for _ in range(OUTSTANDING_MAX):
        scene.send_run()
    assert scene.engine.rung == []
    scene.send_run()
    assert f"may have {OUTSTANDING_MAX} requests in flight".encode() in scene.engine.rung[0]
    scene.engine.waiting = 0
    time.sleep(0.002)
    scene.send_run()
    assert len(scene.engine.rung) == 1


def test_a_client_that_cannot_be_understood_is_not_listened_to_any_more(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.send(99)
    assert not scene.is_listened_to
    assert "client 3 sent a message that cannot be read (unknown kind 99)" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError):
        scene.client.send(b"x")


def test_the_end_of_the_socket_is_no_error(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.client.shutdown(socket.SHUT_RDWR)
    scene.clients.read(scene.fd)
    assert not scene.is_listened_to
    assert capsys.readouterr().err == ""


def test_one_turn_takes_a_bounded_number_of_messages(scene: Scene) -> None:
    for _ in range(100):
        scene.client.send(HEADER.pack(SubmitKind.CANCEL, 0, 0, 0, EPOCH))
    scene.clients.read(scene.fd)
    assert len(scene.engine.accepted) == 64


def test_claims_about_time_are_believed_within_reason() -> None:
    now_ns = 10_000_000_000
    assert believable_ns(now_ns - 5, now_ns) == now_ns - 5
    assert believable_ns(now_ns + 5, now_ns) == now_ns
    assert believable_ns(0, now_ns) == now_ns
