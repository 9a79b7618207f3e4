"""Nested calls end with the requests that they are made for: when nobody waits for those any more (spec L-026, S-184).

What a model calls while it executes is made for the requests of that execution: in its thread, in coroutines and tasks
that begin there, and wherever else Python carries the context (``asyncio.to_thread``).
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from forebay.ipc.errors import ServingError

if TYPE_CHECKING:
    from forebay.engine.backends.python_model.engine_access import NestedCall

#: How often calls that take longer than this are looked at, s.
LOOK_PERIOD_S = 0.02

#: Looks without any call before the thread that looks sleeps until the next one: to wake it costs a switch of threads,
#: which calls in close succession shall not pay for.
_LOOKS_IN_VAIN_MAX = 50


class OuterRequest(Protocol):
    """A request to a model that calls others: what the worker has of it."""

    @property
    def is_final(self) -> bool:
        """Whether it has its last response."""
        ...

    @property
    def is_cancelled(self) -> bool:
        """Whether its client has left or its deadline has passed."""
        ...


#: The requests of the execution that runs in this context.
executing: contextvars.ContextVar[Sequence[OuterRequest]] = contextvars.ContextVar("executing", default=())


def are_abandoned(requests: Sequence[OuterRequest]) -> bool:
    """Tell whether of those that are not answered none has a client any more, and there are such."""
    unanswered = [request for request in requests if not request.is_final]
    return bool(unanswered) and all(request.is_cancelled for request in unanswered)


class Watch:
    """Abandons nested calls whose requests are. Thread-safe.

    A call that is over before the next look costs an entry in a dictionary, and no switch of threads.
    """

    def __init__(self) -> None:
        self._calls: dict[NestedCall, Sequence[OuterRequest]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        #: Set: the thread looks.
        self._is_looking = threading.Event()
        #: There were calls since the last look.
        self._is_used = False
        #: Called at every look. Workers take in what they are told here while a model keeps them from reading it.
        self.on_look: list[Callable[[], None]] = []

    def add(self, call: NestedCall, requests: Sequence[OuterRequest]) -> None:
        """Look after a call until it is over, or forgotten; ``requests``: what it is made for, if that is known."""
        self._calls[call] = requests
        self._is_used = True
        if not self._is_looking.is_set():
            self._is_looking.set()
            self._start()

    def forget(self, call: NestedCall) -> None:
        """Its last response has been taken."""
        self._calls.pop(call, None)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bls watch", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        looks_in_vain = 0
        while True:
            self._is_looking.wait()
            time.sleep(LOOK_PERIOD_S)
            looks_in_vain = 0 if self._is_used or self._calls else looks_in_vain + 1
            self._is_used = False
            self.look()
            if looks_in_vain > _LOOKS_IN_VAIN_MAX:
                self._is_looking.clear()
                # One may have been added since, by somebody who took us for awake.
                if self._calls:
                    self._is_looking.set()

    def look(self) -> None:
        """Abandon what nobody waits for."""
        for hear in tuple(self.on_look):
            try:
                hear()
            except Exception:  # one worker's trouble; this thread looks after the calls of all in the process
                traceback.print_exc()
        # Copied in one step: calls come and go on other threads.
        for call, requests in self._calls.copy().items():
            if call.is_over:
                self.forget(call)
            elif are_abandoned(requests):
                self.forget(call)
                # A server that is gone has ended the call already.
                with contextlib.suppress(ServingError):
                    call.abandon()


#: Of this process.
watch = Watch()
