"""Doorbells keep messages whole and in order, and never block their owner."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from forebay.ipc.doorbell import Bell, LoopBell, WatchedBell, create_doorbell, flush_lagging

Pair = tuple[Bell, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    sender, receiver = create_doorbell()
    receiver.setblocking(False)
    bell = Bell(sender)
    yield bell, receiver
    bell.close()
    receiver.close()


def fill(bell: Bell) -> int:
    """Ring until the kernel takes no more; return how many messages it took."""
    count = 0
    while not bell.backlog_count:
        assert bell.ring(count.to_bytes(4, "little") + bytes(1000))
        count += 1
    return count - 1


def drain(receiver: socket.socket) -> list[int]:
    numbers: list[int] = []
    while True:
        try:
            numbers.append(int.from_bytes(receiver.recv(2000)[:4], "little"))
        except BlockingIOError:
            return numbers


def test_messages_stay_whole(pair: Pair) -> None:
    bell, receiver = pair
    bell.ring(b"one")
    bell.ring(b"second")
    assert (receiver.recv(100), receiver.recv(100)) == (b"one", b"second")


def test_full_doorbell_keeps_messages_in_order(pair: Pair) -> None:
    bell, receiver = pair
    taken = fill(bell)
    for number in range(taken + 1, taken + 5):
        bell.ring(number.to_bytes(4, "little"))
    assert bell.backlog_count == 5
    received = drain(receiver)
    assert bell.flush()
    received += drain(receiver)
    assert received == list(range(taken + 5))
    assert bell.backlog_count == 0


def test_later_message_does_not_overtake_those_that_wait(pair: Pair) -> None:
    bell, receiver = pair
    taken = fill(bell)
    drain(receiver)
    bell.ring((taken + 1).to_bytes(4, "little"))
    assert drain(receiver) == [taken, taken + 1]


def test_ring_says_when_the_receiver_is_gone(pair: Pair) -> None:
    bell, receiver = pair
    fill(bell)
    receiver.close()
    assert not bell.flush()
    assert bell.backlog_count == 0
    assert not bell.ring(b"x")


def test_many_senders_share_one_receiver() -> None:
    sender, receiver = create_doorbell()
    bells = [Bell(sender.dup()) for _ in range(3)]
    sender.close()
    for number, bell in enumerate(bells):
        bell.ring(bytes([number]))
        bell.close()
    assert [receiver.recv(10) for _ in range(3)] == [b"\0", b"\1", b"\2"]
    assert receiver.recv(10) == b""
    receiver.close()


def test_bell_is_among_those_that_lag_until_it_is_rid_of_everything() -> None:
    sender, receiver = create_doorbell()
    lagging: set[Bell] = set()
    bell = WatchedBell(sender, lagging)
    receiver.setblocking(False)
    with receiver, contextlib.closing(bell):
        taken = fill(bell)
        flush_lagging(lagging)
        assert lagging == {bell}
        drain(receiver)
        flush_lagging(lagging)
        assert not lagging
        assert drain(receiver) == [taken]


def test_event_loop_tries_a_full_doorbell_again() -> None:
    sender, receiver = create_doorbell()
    bell = LoopBell(sender)

    receiver.setblocking(False)

    async def read_what_is_rung() -> None:
        last = fill(bell)
        found = drain(receiver)
        # The reader has seen everything, and would sleep now.
        while last not in found:
            await asyncio.sleep(0.001)
            found = drain(receiver)

    with receiver, contextlib.closing(bell):
        asyncio.run(read_what_is_rung())
    assert bell.backlog_count == 0
