"""Reading ahead on the worker's doorbell."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence

import pytest

from forebay.engine.worker.inbox import Inbox
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.wire import HEADER, TOKEN, Kind, pack_rows_cancel

Ends = tuple[socket.socket, Inbox, list[bytes]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    sender, receiver = create_doorbell()
    handled: list[bytes] = []

    def tell_unsynced(sync: bytes, ahead: Sequence[bytes]) -> None:
        handled.extend((sync, *ahead))

    yield sender, Inbox(receiver, lambda message: handled.append(bytes(message)), tell_unsynced), handled
    sender.close()
    receiver.close()


CANCEL = HEADER.pack(Kind.CANCEL, 0, 1, 7, 0) + TOKEN.pack(3)
PARCELS = HEADER.pack(Kind.PARCELS, 0, 1, 0, 9)
SYNC = HEADER.pack(Kind.SYNC, 0, 0, 0, 2)


def test_signals_are_handled_at_once_and_batches_kept_in_order(ends: Ends) -> None:
    sender, inbox, handled = ends
    for message in (PARCELS + b"1", CANCEL, b"\3", PARCELS + b"2"):
        sender.send(message)
    with inbox.executing():
        inbox.take_signals()
        inbox.take_signals()
    assert handled == [CANCEL]
    buffer = bytearray(100)
    kept: list[bytes] = []
    while inbox.has_kept:
        kept.append(bytes(buffer[: inbox.take_kept(buffer)]))
    assert kept == [PARCELS + b"1", b"\3", PARCELS + b"2"]


def test_new_scheduler_is_told_at_once_what_it_waits_for_and_again_in_its_turn(ends: Ends) -> None:
    sender, inbox, handled = ends
    for message in (PARCELS, SYNC, PARCELS + b"2"):
        sender.send(message)
    with inbox.executing():
        inbox.take_signals()
        inbox.take_signals()
    assert handled == [SYNC, PARCELS]
    buffer = bytearray(100)
    assert [bytes(buffer[: inbox.take_kept(buffer)]) for _ in range(3)] == [PARCELS, SYNC, PARCELS + b"2"]


@pytest.mark.parametrize("cancel", [CANCEL, pack_rows_cancel(9, 7, 64, (3,))], ids=["parcel", "rows"])
def test_cancellations_of_a_batch_that_was_read_ahead_are_said_again_when_it_runs(ends: Ends, cancel: bytes) -> None:
    sender, inbox, handled = ends
    sender.send(PARCELS)
    sender.send(cancel)
    with inbox.executing():
        inbox.take_signals()
    inbox.take_kept(bytearray(100))
    handled.clear()
    with inbox.executing():
        inbox.take_signals()
    assert handled == [cancel]
    handled.clear()
    with inbox.executing():
        inbox.take_signals()
    assert not handled


def test_nothing_is_read_while_the_loop_reads_for_itself(ends: Ends) -> None:
    sender, inbox, handled = ends
    sender.send(CANCEL)
    inbox.take_signals()
    assert (handled, inbox.has_kept) == ([], False)
    with inbox.executing():
        inbox.take_signals()
    assert handled == [CANCEL]


def test_closed_doorbell_is_left_to_the_loop(ends: Ends) -> None:
    sender, inbox, handled = ends
    sender.close()
    with inbox.executing():
        inbox.take_signals()
    assert (handled, inbox.has_kept) == ([], False)


def test_many_threads_lose_and_double_nothing(ends: Ends) -> None:
    sender, inbox, handled = ends
    expected = [HEADER.pack(Kind.CANCEL, 0, 1, 7, number) + TOKEN.pack(number) for number in range(200)]
    with inbox.executing():
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                inbox.take_signals()

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for message in expected:
            sender.send(message)
        while len(handled) < len(expected):
            inbox.take_signals()
        stop.set()
        for thread in threads:
            thread.join()
    assert sorted(handled) == sorted(expected)
