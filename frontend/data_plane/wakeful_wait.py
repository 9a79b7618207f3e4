"""Waits for a lone client's next request without sleeping, where that costs hardly more than to be woken.

A client that asks one thing after the other comes back some tens of microseconds after its answer. A frontend that
sleeps meanwhile lets its core fall asleep too, and the client its own: each then pays for an interrupt and for the
core's way out of its sleep, and on a virtual machine both pay for it with CPU time. There are two ways not to:

- The frontend looks for the request instead of sleeping, and lets whoever else wants the core have it in between.
- Nobody's core sleeps: the kernel is asked to let idle ones look for work (:mod:`forebay.ipc.wakeup_latency`), for as
  long as requests come at once. That spares the client's wake-up too, and nobody needs to share a core any more. It
  concerns all cores of the machine, so it is for small ones, and for servers that may ask.

Whether they pay differs between machines. They are tried out, each for some hundred requests, and compared with sleep.

Measured on a virtual machine with two cores, one HTTP connection and a Python model, a core shared where cores sleep
(medians of rounds of ``bench/load`` against a server with and one without; no file of ``bench/`` repeats it): looking
has 0.79 of the median latency and 0.94 of the CPU time of sleep; awake cores have half of both that looking has.
"""

from __future__ import annotations

import asyncio
import enum
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from forebay.ipc.errors import Unavailable
from forebay.ipc.log import log
from forebay.ipc.wakeup_latency import WakeupLatency

#: How long the frontend, or all cores, stay awake for a request, ns.
_PATIENCE_NS = 200_000
#: One that finds cores asleep, the client's too, may take longer and would come within that time, ns.
_PATIENCE_ASLEEP_NS = 500_000
#: A request that came within its time counts for staying awake, up to so many, ...
_SCORE_MAX = 64
#: ... from so many on the frontend stays awake, ...
_SCORE_ENOUGH = 32
#: ... and one that did not counts like so many against it.
_MISS_COST = 8
#: Requests that one way is tried for.
_TRIAL = 256
#: How many of them must have been waited for in that way.
_TRIAL_AWAKE = 224
#: Requests until the next trial: sooner where it spoke for sleep, since CPU times over so few requests vary ...
_UNTIL_TRIAL, _UNTIL_TRIAL_ASLEEP = 16384, 2048
#: ... and else twice as many each time that it says the same, up to a limit: while cores sleep, requests are slower.
_UNTIL_TRIAL_MAX = 1 << 18
#: What looking may cost at most, beside sleeping: the client saves a fifth of its latency.
_LOOK_COST_MAX = 1.25
#: Cores are kept awake where all of them together are awake no longer for a request than so many would be at work for
#: one that found them asleep: the client's and ours.
_CORES_AT_WORK = 2
#: Seconds without requests until cores may sleep again.
_LULL_SECS = 0.01


def _ignore(_are_awake: bool) -> None:
    pass


class _Way(enum.Enum):
    """How a request is waited for."""

    SLEEP = 1
    LOOK = 2
    KEEP_CORES_AWAKE = 3


class _Cost(NamedTuple):
    """Of one request, ns: CPU time of this process, and how long it takes until the next one."""

    cpu_ns: int
    elapsed_ns: int


class WakefulWait:
    """Of one frontend process; must be used in the thread that runs its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        #: Keeps cores awake; None: it must not.
        self._latency: WakeupLatency | None = None
        self._core_count = 0
        #: Called with whether cores are kept awake, whenever that changes.
        self.on_change: Callable[[bool], None] = _ignore
        #: Cores have been needed since the last look at whether they may sleep.
        self._are_cores_needed = False
        #: The loop will look whether they may.
        self._is_release_due = False
        #: When the last answer was given, monotonic ns; 0: no request is expected.
        self._since_ns = 0
        #: Look until then; 0: sleep.
        self._until_ns = 0
        #: A look is under way in the loop.
        self._is_looking = False
        #: How reliably requests have come in time.
        self._score = 0
        #: What the last trial spoke for, and for how many requests that counts.
        self._verdict: _Way | None = None
        self._until_trial = 0
        #: Requests until the next phase.
        self._left = 0
        self._begin_trial()

    def allow_awake_cores(self, latency: WakeupLatency, core_count: int) -> None:
        """Try that too from now on.

        Args:
            latency: not held; ours.
            core_count: of the machine.
        """
        self._latency, self._core_count = latency, core_count
        self._begin_trial()

    def begin(self, now_ns: int) -> None:
        """An answer has been given at ``now_ns``, monotonic; a request is expected."""
        self._since_ns = now_ns
        if self._way is _Way.SLEEP or self._score < _SCORE_ENOUGH:
            return
        self._awake_count += 1
        if self._way is _Way.KEEP_CORES_AWAKE:
            self._are_cores_needed = True
            if self._latency is not None and not self._latency.is_held:
                self._hold(self._latency)
            return
        self._until_ns = now_ns + _PATIENCE_NS
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def end(self) -> None:
        """A request has come."""
        if not self._since_ns:
            return
        patience_ns = _PATIENCE_NS if self._way is _Way.KEEP_CORES_AWAKE else _PATIENCE_ASLEEP_NS
        if time.monotonic_ns() - self._since_ns < patience_ns:
            self._score = min(self._score + 1, _SCORE_MAX)
        else:
            self._score = max(self._score - _MISS_COST, 0)
        self._since_ns = self._until_ns = 0
        self._left -= 1
        if not self._left:
            self._next_phase()

    def break_off(self) -> None:
        """The client is not alone any more, or is so only now: a trial that is under way says nothing."""
        self._since_ns = self._until_ns = 0
        if self._way in self._tried:
            # Whoever comes next may be another client.
            self._left = min(self._left, _UNTIL_TRIAL)
            self._let_cores_sleep()
        else:
            self._begin_trial()

    def _look(self) -> None:
        # Whatever the event loop finds between two looks, it does.
        if time.monotonic_ns() < self._until_ns:
            os.sched_yield()
            self._loop.call_soon(self._look)
        else:
            self._is_looking = False

    def _hold(self, latency: WakeupLatency) -> None:
        try:
            latency.hold()
        except Unavailable as error:
            log.verbose(1, error.text)
            self._latency = None
            self._begin_trial()
            return
        self.on_change(True)
        if not self._is_release_due:
            self._is_release_due = True
            self._loop.call_later(_LULL_SECS, self._release_unless_needed, latency)

    def _release_unless_needed(self, latency: WakeupLatency) -> None:
        if self._are_cores_needed:
            self._are_cores_needed = False
            self._loop.call_later(_LULL_SECS, self._release_unless_needed, latency)
        else:
            self._is_release_due = False
            self._release(latency)

    def _release(self, latency: WakeupLatency) -> None:
        if latency.is_held:
            latency.release()
            self.on_change(False)

    def _let_cores_sleep(self) -> None:
        """Do not wait for a lull."""
        if self._latency is not None:
            self._release(self._latency)
            self._are_cores_needed = False

    # --- which way

    def _begin_trial(self) -> None:
        self._tried: dict[_Way, _Cost] = {}
        self._to_try = [_Way.SLEEP, _Way.LOOK]
        if self._latency is not None:
            self._to_try.append(_Way.KEEP_CORES_AWAKE)
        # What sleep costs cannot be seen while nobody sleeps.
        self._let_cores_sleep()
        self._begin_phase(self._to_try.pop(0), _TRIAL)

    def _begin_phase(self, way: _Way, requests: int) -> None:
        self._way = way
        #: Requests of this phase that were waited for in its way.
        self._awake_count = 0
        self._left = requests
        self._cpu_ns, self._began_ns = time.process_time_ns(), time.monotonic_ns()

    def _next_phase(self) -> None:
        way = self._way
        if way in self._tried:
            self._begin_trial()
            return
        if way is _Way.SLEEP or self._awake_count >= _TRIAL_AWAKE:
            cpu_ns, elapsed_ns = time.process_time_ns() - self._cpu_ns, time.monotonic_ns() - self._began_ns
            self._tried[way] = _Cost(cpu_ns // _TRIAL, elapsed_ns // _TRIAL)
        elif not self._to_try:
            # The client took its time.
            self._begin_trial()
            return
        if self._to_try:
            self._begin_phase(self._to_try.pop(0), _TRIAL)
        else:
            self._begin_phase(self._judge(), self._until_trial)

    def _judge(self) -> _Way:
        """Return the way to go, until the next trial."""
        best = self._best()
        if best is _Way.SLEEP:
            self._until_trial = _UNTIL_TRIAL_ASLEEP
        elif best is self._verdict:
            self._until_trial = min(2 * self._until_trial, _UNTIL_TRIAL_MAX)
        else:
            self._until_trial = _UNTIL_TRIAL
        self._verdict = best
        return best

    def _best(self) -> _Way:
        tried = self._tried
        sleeping = tried[_Way.SLEEP]
        looking = tried.get(_Way.LOOK)
        keeping = tried.get(_Way.KEEP_CORES_AWAKE)
        if (
            keeping is not None
            and keeping.cpu_ns <= sleeping.cpu_ns
            and keeping.elapsed_ns * self._core_count <= sleeping.elapsed_ns * _CORES_AT_WORK
        ):
            return _Way.KEEP_CORES_AWAKE
        if looking is not None and looking.cpu_ns <= sleeping.cpu_ns * _LOOK_COST_MAX:
            return _Way.LOOK
        return _Way.SLEEP
