"""Responses that come later: the thread that decoupled test backends answer from."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Generator

from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.ipc.errors import Internal, ServingError

#: What sends the responses of one request; yields how long to wait before it goes on, s.
Script = Generator[float, None, None]


class TimedResponses:
    """Runs any number of scripts in one thread, however long each waits.

    A request whose script ends is finished; one whose script raises fails with the error.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._order = itertools.count()
        #: (when to go on, order of arrival, request, script)
        self._waiting: list[tuple[float, int, ParcelRequest, Script]] = []
        self._is_running = False

    def start(self, request: ParcelRequest, script: Script) -> None:
        """Begin a script; returns at once."""
        with self._lock:
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="responses", daemon=True).start()
            self._put(time.monotonic(), request, script)

    def wait_done(self) -> None:
        """Return when every script has ended."""
        with self._lock:
            self._lock.wait_for(lambda: not self._is_running)

    def _put(self, due_s: float, request: ParcelRequest, script: Script) -> None:
        heapq.heappush(self._waiting, (due_s, next(self._order), request, script))
        self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    # The next script gets a thread of its own: nothing is left behind in a worker that is idle.
                    self._is_running = False
                    self._lock.notify_all()
                    return
                due_s, _order, request, script = self._waiting[0]
                delay_s = due_s - time.monotonic()
                if delay_s > 0:
                    self._lock.wait(delay_s)
                    continue
                heapq.heappop(self._waiting)
            self._step(due_s, request, script)

    def _step(self, due_s: float, request: ParcelRequest, script: Script) -> None:
        """Let a script go on until it waits again or ends."""
        try:
            if not request.is_cancelled:
                delay_s = next(script)
                with self._lock:
                    self._put(due_s + delay_s, request, script)
                return
        except StopIteration:
            pass
        except ServingError as error:
            request.fail(error)
        except Exception as error:
            request.fail(Internal(f"{type(error).__name__}: {error}"))
        request.finish()
