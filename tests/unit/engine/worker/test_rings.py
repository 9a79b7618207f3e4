"""Rings: what a client may hand to a worker itself, and when (docs/shm-protocol.md); with and without the lane."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from unittest import mock

import pytest

from forebay.engine.worker.lanes import open_lane
from forebay.engine.worker.placement import Placement
from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.rings import Rings
from forebay.engine.worker.wait_styles import Park
from forebay.ipc.arena import create_memory_file
from forebay.ipc.counters import instance_words
from forebay.ipc.doorbell import Bell, create_doorbell
from forebay.ipc.wire import GRANT, HEADER, PARCEL, RUN, TOKEN, Kind
from forebay.ipc.worker_messages import InstanceSpec

SPEC = InstanceSpec(
    model="m", version=1, route=5, instance=9, instance_name="m_0_0", backend="", model_path="", version_path="",
    model_file="", max_batch_size=4,
)  # fmt: skip
TICKET = 1 << 63 | 7


class Scene:
    """A worker's rings with one client, number 3."""

    def __init__(self, *, has_lane: bool) -> None:
        lane = None
        if has_lane:
            pytest.importorskip("forebay.engine.worker.rows_lane", reason="built without a C compiler")
            counters = memoryview(bytearray(8 * instance_words(SPEC.max_batch_size))).cast("Q")
            # It knows no rows, so it leaves every message to the rings.
            lane = open_lane(
                SPEC.instance, counters, mock.create_autospec(Bell, instance=True), tells_requests_apart=False
            )
        self.ran: list[tuple[int, bytes]] = []
        #: Producer and token.
        self.still_open: list[tuple[int, int]] = []
        self.buffer = bytearray(4096)
        self.doorbell_in, self.doorbell = create_doorbell()
        producers = Producers()
        bell, self.completions = create_doorbell()
        self.completions.settimeout(0.0)
        producer = Producer(3, create_memory_file("arena", 4096), 4096, bell.detach(), is_trusted=False)
        producers.attach(producer)
        self.placement = mock.create_autospec(Placement, instance=True)
        self.rings = Rings(
            SPEC, producers, self.doorbell, lambda kind, data: self.ran.append((kind, bytes(data))), Park(),
            self.placement, lambda producer: [token for owner, token in self.still_open if owner == producer],
            lane, mock.Mock(side_effect=AssertionError("the lane runs nothing here")),
        )  # fmt: skip
        self.ring, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.rings.attach(producer, receiver.detach())
        self._producers = producers

    def send_run(self, ticket: int = TICKET, *, place: int = 0, **changes: int) -> None:
        fields = {"producer": 99, "requests": 1, "base": 64, "capacity": 8, "first": 0, "rows": 1, "attempt": 0}
        self.ring.send(HEADER.pack(Kind.RUNS, 1, 1, place, ticket) + RUN.pack(*(fields | changes).values(), 0))

    def turn(self) -> bool:
        return self.rings.wait_doorbell(self.buffer, 0)

    def revoked(self) -> int:
        """Return the ticket of the REVOKE that the client got; 0: none."""
        try:
            message = self.completions.recv(4096)
        except BlockingIOError:
            return 0
        kind, _flags, _count, instance, ticket = HEADER.unpack_from(message)
        assert (kind, instance) == (Kind.REVOKE, 9)
        assert GRANT.unpack_from(message, HEADER.size)[:2] == (5, 9)
        return int(ticket)

    def close(self) -> None:
        self.rings.detach(3)
        self._producers.detach(3)
        for sock in (self.doorbell_in, self.doorbell, self.completions, self.ring):
            sock.close()


@pytest.fixture(params=["python", "lane"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = Scene(has_lane=request.param == "lane")
    yield made
    made.close()


def test_a_ring_is_read_while_it_is_open(scene: Scene) -> None:
    scene.send_run()
    assert not scene.rings.is_open
    scene.rings.open(3, TICKET)
    assert scene.rings.is_open
    scene.turn()
    ((kind, message),) = scene.ran
    assert kind == Kind.RUNS
    # The producer is the ring's owner, whatever the message says.
    assert RUN.unpack_from(message, HEADER.size)[0] == 3


def test_the_doorbell_is_told_apart(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    assert not scene.turn()
    scene.doorbell_in.send(b"x")
    assert scene.turn()


def test_what_was_rung_runs_before_the_grant_ends(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.send_run()
    scene.rings.close(3, TICKET, scene.buffer)
    assert len(scene.ran) == 1
    assert scene.revoked() == TICKET
    assert not scene.rings.is_open


def test_what_is_rung_too_late_never_runs(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.rings.close(3, TICKET, scene.buffer)
    scene.send_run()
    scene.rings.open(3, TICKET + 1)
    scene.turn()
    assert scene.ran == []
    assert scene.revoked() == TICKET
    scene.send_run(TICKET + 1)
    scene.turn()
    assert len(scene.ran) == 1


def test_the_end_of_a_grant_names_what_has_run_and_is_still_to_be_answered(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.still_open = [(3, 11), (4, 12), (3, 13)]
    scene.rings.close(3, TICKET, scene.buffer)
    message = scene.completions.recv(4096)
    assert HEADER.unpack_from(message)[2] == 2
    assert list(TOKEN.iter_unpack(message[HEADER.size + GRANT.size :])) == [(11,), (13,)]


def test_the_end_of_another_grant_does_nothing(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.rings.close(3, TICKET + 1, scene.buffer)
    scene.rings.close(4, TICKET, scene.buffer)
    assert scene.rings.is_open
    assert scene.revoked() == 0


def test_a_new_scheduler_ends_all_grants(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.rings.close_all(scene.buffer)
    assert not scene.rings.is_open
    assert scene.revoked() == TICKET


def test_several_rings_are_told_apart(scene: Scene) -> None:
    ring, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bell, completions = create_doorbell()
    other = Producer(4, create_memory_file("arena", 4096), 4096, bell.detach(), is_trusted=False)
    scene.rings.attach(other, receiver.detach())
    scene.rings.open(3, TICKET)
    scene.rings.open(4, TICKET + 1)
    run = RUN.pack(99, 1, 64, 8, 0, 1, 0, 0)
    with ring, completions:
        for _ in range(3):
            ring.send(HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET + 1) + run)
            scene.send_run()
        scene.doorbell_in.send(b"x")
        # Nobody is read for ever while others wait.
        assert any(scene.turn() for _ in range(3))
        while len(scene.ran) < 6:
            scene.turn()
        assert sorted(RUN.unpack_from(message, HEADER.size)[0] for _, message in scene.ran) == [3, 3, 3, 4, 4, 4]
        scene.rings.close(3, TICKET, scene.buffer)
        ring.send(HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET + 1) + run)
        scene.doorbell.recv(1)
        scene.turn()
        assert len(scene.ran) == 7
        scene.rings.detach(4)
    other.close()


@pytest.mark.parametrize(
    "message",
    [
        HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET),
        HEADER.pack(Kind.RUNS, 1, 2, 0, TICKET) + bytes(2 * RUN.size),
        HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET) + RUN.pack(3, 1, 64, 8, 0, 5, 0, 0),
        HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET) + RUN.pack(3, 2, 64, 8, 0, 1, 0, 0),
        HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET) + RUN.pack(3, 0, 64, 8, 0, 1, 0, 0),
        HEADER.pack(Kind.PARCELS, 1, 1, 0, TICKET) + PARCEL.pack(3, 1, 1, 0, 100),
        HEADER.pack(Kind.PARCELS, 1, 1, 0, TICKET) + PARCEL.pack(3, 5, 1, 0, 0),
        HEADER.pack(Kind.WAKE, 1, 1, 0, TICKET),
        HEADER.pack(Kind.SYNC, 1, 1, 0, TICKET),
        b"x",
    ],
)
def test_who_breaks_the_rules_loses_the_ring(scene: Scene, message: bytes) -> None:
    scene.rings.open(3, TICKET)
    scene.ring.send(message)
    scene.turn()
    assert scene.ran == []
    assert not scene.rings.is_open
    with pytest.raises(BrokenPipeError):
        scene.ring.send(b"x")


def test_stale_messages_beyond_one_per_grant_lose_the_ring(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.send_run(TICKET + 5)
    scene.turn()
    assert scene.revoked() == TICKET
    assert not scene.rings.is_open


def test_times_that_cannot_be_are_put_right(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    for claimed in (0, (1 << 64) - 1):
        scene.ring.send(HEADER.pack(Kind.RUNS, 1, 1, 0, TICKET) + RUN.pack(3, 2, 64, 8, 0, 2, 0, claimed))
        scene.turn()
        sum_ns = RUN.unpack_from(scene.ran.pop()[1], HEADER.size)[-1]
        assert 0 < sum_ns < 1 << 63


def test_a_parcel_is_handed_on(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.ring.send(HEADER.pack(Kind.PARCELS, 1, 1, 0, TICKET) + PARCEL.pack(77, 2, 5, 0, 4) + b"head")
    scene.turn()
    ((kind, message),) = scene.ran
    assert (kind, PARCEL.unpack_from(message, HEADER.size)[:3], message[-4:]) == (Kind.PARCELS, (3, 2, 5), b"head")


def test_a_client_that_hangs_up_is_forgotten(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    scene.ring.close()
    scene.turn()
    assert not scene.rings.is_open


def test_descriptors_are_given_back() -> None:
    gc.collect()  # What earlier tests left behind may be closed at any time.
    before = len(os.listdir("/proc/self/fd"))
    Scene(has_lane=False).close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_worker_runs_on_the_core_that_the_client_shares_with_it(scene: Scene) -> None:
    scene.rings.open(3, TICKET)
    for place in (0, 2, 2, 0, 1):
        scene.send_run(place=place)
        scene.turn()
    assert scene.placement.mock_calls == [mock.call.join(3, 1), mock.call.leave(3), mock.call.join(3, 0)]
    assert len(scene.ran) == 5


@pytest.mark.parametrize("end", ["closed", "detached"])
def test_worker_is_free_when_the_ring_is(scene: Scene, end: str) -> None:
    scene.rings.open(3, TICKET)
    scene.send_run(place=2)
    scene.turn()
    if end == "closed":
        scene.rings.close(3, TICKET, scene.buffer)
    else:
        scene.rings.detach(3)
    assert scene.placement.mock_calls == [mock.call.join(3, 1), mock.call.leave(3)]
