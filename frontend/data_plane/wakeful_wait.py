"""Waits for a lone client's next request without sleeping, where that costs hardly more CPU time than to be woken.

A client that asks one thing after the other comes back some tens of microseconds after its answer. A frontend that
sleeps meanwhile lets its core fall asleep too: the client then pays for an interrupt and for the core's way out of its
sleep, and on a virtual machine both processes pay for it with CPU time. So the frontend looks for the request instead,
and lets whoever else wants the core have it between two looks.

Whether that is the cheaper way differs between machines. It is tried out: for some hundred requests the frontend
sleeps, for some hundred it stays awake, and its own CPU time decides.

Measured on a virtual machine with two cores, one HTTP connection and a Python model, the core shared with the worker
(medians of 12 paired rounds of ``bench/load`` against a server with and one without; no file of ``bench/`` repeats
it): median latency 0.79, the server's CPU time 0.94.
"""

from __future__ import annotations

import asyncio
import enum
import os
import time

#: How long the frontend stays awake for a request, ns.
_PATIENCE_NS = 200_000
#: A request that came within that time counts for it, up to so many, ...
_SCORE_MAX = 64
#: ... from so many on the frontend stays awake, ...
_SCORE_ENOUGH = 32
#: ... and one that did not counts like so many against it.
_MISS_COST = 8
#: Requests of each half of a trial.
_TRIAL = 256
#: How many of the second half must have been waited for awake.
_TRIAL_AWAKE = 224
#: Requests until the next one: sooner where it spoke for sleep, since CPU times over so few requests vary.
_UNTIL_TRIAL, _UNTIL_TRIAL_ASLEEP = 16384, 2048
#: What staying awake may cost at most, beside sleeping: the client saves a fifth of its latency.
_COST_MAX = 1.25


class _Phase(enum.Enum):
    TRY_ASLEEP = 1
    TRY_AWAKE = 2
    DECIDED = 3


class WakefulWait:
    """Of one frontend process; must be used in the thread that runs its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        #: When the last answer was given, monotonic ns; 0: no request is expected.
        self._since_ns = 0
        #: Look until then; 0: sleep.
        self._until_ns = 0
        #: A look is under way in the loop.
        self._is_looking = False
        #: How reliably requests have come in time.
        self._score = 0
        #: CPU time per request of the half of the last trial that was spent asleep, ns.
        self._asleep_ns = 0
        self._begin_phase(_Phase.TRY_ASLEEP, is_wakeful=False, requests=_TRIAL)

    def begin(self, now_ns: int) -> None:
        """An answer has been given at ``now_ns``, monotonic; a request is expected."""
        self._since_ns = now_ns
        if self._is_wakeful and self._score >= _SCORE_ENOUGH:
            self._until_ns = now_ns + _PATIENCE_NS
            self._awake_count += 1
            if not self._is_looking:
                self._is_looking = True
                self._loop.call_soon(self._look)

    def end(self) -> None:
        """A request has come."""
        if not self._since_ns:
            return
        if time.monotonic_ns() - self._since_ns < _PATIENCE_NS:
            self._score = min(self._score + 1, _SCORE_MAX)
        else:
            self._score = max(self._score - _MISS_COST, 0)
        self._since_ns = self._until_ns = 0
        self._left -= 1
        if not self._left:
            self._next_phase()

    def break_off(self) -> None:
        """The client is not alone any more, or has no core with us: what was measured says nothing."""
        self._since_ns = self._until_ns = 0
        self._begin_phase(_Phase.TRY_ASLEEP, is_wakeful=False, requests=_TRIAL)

    def _look(self) -> None:
        # Whatever the event loop finds between two looks, it does.
        if time.monotonic_ns() < self._until_ns:
            os.sched_yield()
            self._loop.call_soon(self._look)
        else:
            self._is_looking = False

    def _next_phase(self) -> None:
        per_request_ns = (time.process_time_ns() - self._cpu_ns) // _TRIAL
        is_tried = self._awake_count >= _TRIAL_AWAKE
        if self._phase is _Phase.TRY_ASLEEP:
            self._asleep_ns = per_request_ns
            self._begin_phase(_Phase.TRY_AWAKE, is_wakeful=True, requests=_TRIAL)
        elif self._phase is _Phase.TRY_AWAKE and is_tried:
            is_cheap = per_request_ns <= self._asleep_ns * _COST_MAX
            requests = _UNTIL_TRIAL if is_cheap else _UNTIL_TRIAL_ASLEEP
            self._begin_phase(_Phase.DECIDED, is_wakeful=is_cheap, requests=requests)
        else:
            # It is time for another trial, or the client took its time in this one.
            self._begin_phase(_Phase.TRY_ASLEEP, is_wakeful=False, requests=_TRIAL)

    def _begin_phase(self, phase: _Phase, *, is_wakeful: bool, requests: int) -> None:
        self._phase = phase
        #: The frontend is to stay awake, as far as the trial says.
        self._is_wakeful = is_wakeful
        #: Requests of this phase that were waited for awake.
        self._awake_count = 0
        #: Requests until the next phase.
        self._left = requests
        self._cpu_ns = time.process_time_ns()
