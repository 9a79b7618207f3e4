"""Who reads the completion doorbell while several wait."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from forebay.client.completions import Completions
from forebay.client.errors import DeadlineExceeded
from forebay.client.pending import Pending


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
