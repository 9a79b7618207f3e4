"""Who reads the completion doorbell while several wait."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from forebay.client import completions as completions_module
from forebay.client.completions import Completions
from forebay.client.errors import DeadlineExceeded
from forebay.client.pending import Pending
from forebay.ipc.errors import Cancelled


class Lock:
    """A lock that calls ``before`` when it is taken for the ``turn``-th time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self.turn = 0
        self.before: Any = None

    def __enter__(self) -> None:
        self._count += 1
        if self._count == self.turn:
            self.before()
        self._lock.acquire()

    def __exit__(self, *_exc: object) -> None:
        self._lock.release()


def pending() -> Pending:
    model: Any = type("Model", (), {"edition": 1})()
    return Pending(model, None, 1)


def test_who_is_asked_to_read_on_when_its_time_is_up_asks_the_next() -> None:
    lock: Any = Lock()
    in_flight: Any = None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    completions = Completions(ours, lock, in_flight, spins=False)
    first, behind = pending(), pending()
    woken: list[str] = []

    def reader_stops() -> None:
        """Between our timeout and our look: somebody else waits, and the thread that reads has its answer."""
        behind.waiter = lambda: woken.append("behind")
        completions._followers.append(behind)
        completions._reader.release()
        completions._wake_follower()

    completions._reader.acquire()
    lock.turn, lock.before = 2, reader_stops
    with pytest.raises(DeadlineExceeded):
        completions.wait(first, time.monotonic_ns())
    assert woken == ["behind"]
    completions.close()
    theirs.close()


def test_who_reads_goes_when_its_request_is_abandoned_and_those_behind_read_on() -> None:
    """L-026: its last answer may be long in coming, or be somebody else's to wait for."""
    in_flight: Any = type("InFlight", (), {"count": 2, "take": lambda self, message: behind.finish()})()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    completions = Completions(ours, threading.Lock(), in_flight, spins=False)
    completions.look_up_every(0.005)
    first, behind = pending(), pending()
    reader = threading.Thread(target=completions.wait, args=(first,))
    reader.start()
    while not completions._reader.locked():
        time.sleep(0.001)
    follower = threading.Thread(target=completions.wait, args=(behind,))
    follower.start()
    while not completions._followers:
        time.sleep(0.001)
    first.abandon()
    reader.join()
    theirs.send(b"an answer")
    follower.join()
    assert behind.is_done
    assert not first.is_done
    completions.close()
    theirs.close()


def test_who_was_woken_to_read_on_and_is_abandoned_wakes_the_next() -> None:
    in_flight: Any = None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    completions = Completions(ours, threading.Lock(), in_flight, spins=False)
    woken_to_read, behind = pending(), pending()
    woken: list[str] = []
    behind.waiter = lambda: woken.append("behind")
    completions._followers.append(behind)
    woken_to_read.abandon()
    completions.wait(woken_to_read)
    assert woken == ["behind"]
    completions.close()
    theirs.close()


def test_what_comes_for_an_abandoned_request_does_not_change_its_answer() -> None:
    request = pending()
    request.abandon()
    request.finish()
    with pytest.raises(Cancelled, match=r"^request was cancelled$"):
        request.raise_error()


# --- looking without sleeping, in C and in Python ---


def glances() -> list[Any]:
    """Return both implementations, of which C may not have been built."""
    found = [completions_module._python_glance]
    if completions_module._glance is not completions_module._python_glance:
        found.append(completions_module._glance)
    return found


@pytest.mark.parametrize("glance", glances())
def test_a_glance_brings_what_is_there(glance: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    buffer = bytearray(64)
    with ours, theirs:
        theirs.send(b"one")
        theirs.send(b"two")
        size, away_ns = glance(ours, buffer, 0)
        assert (size, bytes(buffer[:3])) == (3, b"one")
        assert 0 <= away_ns < 1_000_000_000
        assert glance(ours, buffer, 1_000_000_000)[0] == 3
        assert bytes(buffer[:3]) == b"two"


@pytest.mark.parametrize("glance", glances())
def test_a_glance_waits_as_long_as_it_is_told(glance: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        began_ns = time.monotonic_ns()
        size, away_ns = glance(ours, bytearray(64), 5_000_000)
        elapsed_ns = time.monotonic_ns() - began_ns
        assert size == -1
        assert elapsed_ns >= 5_000_000
        assert 0 <= away_ns <= elapsed_ns
        timer = threading.Timer(0.01, theirs.send, (b"late",))
        timer.start()
        assert glance(ours, bytearray(64), 60_000_000_000)[0] == 4
        timer.join()


@pytest.mark.parametrize("glance", glances())
def test_a_glance_at_an_end_or_at_a_broken_socket_comes_back_at_once(glance: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    assert glance(ours, bytearray(64), 60_000_000_000)[0] == 0
    ours.close()
    unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with unconnected:
        assert glance(unconnected, bytearray(64), 60_000_000_000)[0] == -1
    assert glance(unconnected, bytearray(64), 60_000_000_000)[0] == -1


@pytest.mark.parametrize("glance", glances())
def test_others_run_during_a_glance(glance: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        thread = threading.Thread(target=theirs.send, args=(b"x",))
        thread.start()
        assert glance(ours, bytearray(64), 60_000_000_000)[0] == 1
        thread.join()


def test_who_never_sleeps_sees_its_deadline_and_its_answer() -> None:
    done = pending()
    in_flight: Any = type("InFlight", (), {"count": 1, "take": lambda self, message: done.finish()})()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    completions = Completions(ours, threading.Lock(), in_flight, spins=True)
    with pytest.raises(DeadlineExceeded):
        completions.wait(pending(), time.monotonic_ns() + 5_000_000)
    theirs.send(b"x")
    completions.wait(done)
    assert done.is_done
    completions.close()
    theirs.close()
