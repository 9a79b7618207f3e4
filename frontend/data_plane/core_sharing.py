"""One core for a frontend and the worker that it waits for, while requests come one at a time.

Frontend and worker then run strictly by turns, so a second core gains nothing; but the kernel puts whoever is woken on
an idle core, and that core must be interrupted, leave its sleep and fetch what the other has in its caches. On one core
a wake-up is a context switch. The core is the one that the client's packets arrive on: that of the network card's
queue, or of a client on the same machine, which waits as we do.

Measured on a virtual machine with two cores and one client of a tiny model, against free placement (medians of 6 paired
runs of ``bench/load`` against a server with and one without; no file of ``bench/`` repeats it). With the client pinned,
so that it stays where we join it: median latency 0.63 and CPU time 0.55; with other work on the machine 0.88 and 0.87;
on an idle machine, where the kernel moves the client to the core that we leave free, 0.95 and 0.91.

While all cores are kept awake for the client (:mod:`forebay.frontend.data_plane.wakeful_wait`) nobody has to be
interrupted, and each has a core of its own: median latency 0.66 to 0.87 of that on a shared core with all awake (same
machine, four Python models, medians of 8 rounds of ``bench/load``: ``--share-cores=false`` against ``true``, both with
``--cpu-wakeup-latency-us=0``).

The steps of an ensemble run by turns like single models, whichever models they are: two in a line take 0.90 of the sum
of their own medians, and took 2.39 of it when the second one counted as company (``python -m bench.ensemble_overhead
--rounds 6 --duration 1 --warmup 0.4`` before and after, one connection).

As soon as two requests are in flight together everybody may run anywhere again, and also where requests on a shared
core become slower than is usual for their model: somebody else may need it, and no kernel moves what is pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from forebay.ipc.wire import HEADER, Kind

if TYPE_CHECKING:
    from forebay.frontend.data_plane.grants import Grant
    from forebay.frontend.data_plane.wakeful_wait import WakefulWait

#: Requests without company before a core is shared.
_STREAK = 256
#: A request is slow that takes longer in the engine than twice what is usual for its model and this, ns.
_GRACE_NS = 200_000
#: Where the usual is longer, ns, a request has more to lose to a busy core than to gain from a warm one.
_LONG_NS = 2_000_000
#: The usual is a mean over about so many requests, as a power of two; of the first ones, over fewer.
_MEMORY, _MEMORY_AT_FIRST = 6, 3
#: Requests after which what is usual is known.
_KNOWN = 128
#: What a slow one takes from the streak: a few within a short time end the sharing.
_SLOW_COST = 48
#: Until sharing is tried again that has turned out slow, ns; twice as long each time, up to a limit, ...
_PENANCE_NS, _PENANCE_NS_MAX = 500_000_000, 60_000_000_000
#: ... until it has gone well for so long, ns.
_PROBATION_NS = 5_000_000_000
#: Requests between two looks at whether the client has moved; twice as many each time that it has, up to a limit: the
#: kernel moves one that is not pinned away from us.
_FOLLOW, _FOLLOW_MAX = 1024, 1 << 17

_sched_getcpu: Callable[[], int] = ctypes.CDLL(None).sched_getcpu


class Pace:
    """How long the requests of one model usually take."""

    __slots__ = ("_count", "usual_ns")

    def __init__(self) -> None:
        self.usual_ns = _GRACE_NS
        self._count = 0

    @property
    def is_known(self) -> bool:
        return self._count >= _KNOWN

    def note(self, elapsed_ns: int) -> None:
        """Count a request in; one that was held up has little weight."""
        usual_ns = self.usual_ns
        memory = _MEMORY if self._count >= _KNOWN else _MEMORY_AT_FIRST
        self.usual_ns += (min(elapsed_ns, 4 * usual_ns) - usual_ns) >> memory
        self._count += 1


class CoreSharing:
    """Decides for one frontend process; must be used in the thread that runs its event loop."""

    def __init__(self, producer: int, wait: WakefulWait) -> None:
        """Begin with everybody running anywhere; :meth:`allow` changes that.

        Args:
            wait: told whenever a request of a lone client is expected; tells whether cores are kept awake for it.
        """
        self._producer = producer
        self._wait = wait
        wait.on_change = self._cores_changed
        #: The cores of this process; empty: nothing is ever shared.
        self._home: set[int] = set()
        #: Requests that were no slower than usual and had no company, without interruption, up to what it takes.
        self._streak = 0
        self._last: Grant | None = None
        #: A client is alone: with us it has a core that is shared, or all of them, kept awake.
        self._is_lone = False
        #: Since when it is, monotonic ns.
        self._lone_ns = 0
        #: The shared core; -1: none is.
        self._core = -1
        #: Workers that have been told, by instance.
        self._guests: dict[int, Grant] = {}
        self._penance_ns = _PENANCE_NS
        #: Nothing is shared before, monotonic ns.
        self._resume_ns = 0
        #: Requests until the next look at where the client is, and from then to the one after it.
        self._follow_left = self._follow = _FOLLOW
        #: The instance whose batch is being answered, 0: none is. It is idle, which its grant says only afterwards; the
        #: next step of an ensemble may begin meanwhile.
        self.answering = 0
        #: The connection that the last request came on.
        self.client_fd = -1

    def allow(self) -> None:
        """Share a core from now on when it pays, unless this process has only one."""
        cores = os.sched_getaffinity(0)
        self._home = cores if len(cores) > 1 else set()

    def begun(self, grant: Grant, requests: int) -> None:
        """The worker of ``grant`` was idle and has just been rung for so many requests."""
        last, self._last = self._last, grant
        if requests != 1 or not (last is None or last is grant or last.is_idle or last.instance == self.answering):
            self.crowded()
        elif self._is_lone:
            self._wait.end()
            if self._core >= 0 and grant.instance not in self._guests:
                self._invite(grant)

    def ended(self, pace: Pace, elapsed_ns: int, now_ns: int) -> None:
        """Requests have been answered, the last of them after so long in the engine.

        Args:
            pace: of their model.
            now_ns: monotonic.
        """
        usual_ns = pace.usual_ns
        is_lone = self._is_lone
        if not is_lone or not pace.is_known:
            pace.note(elapsed_ns)
        elif self._core >= 0 and elapsed_ns > 2 * usual_ns + _GRACE_NS:
            self._streak = max(self._streak - _SLOW_COST, 0)
            if not self._streak:
                self._part()
                self._resume_ns = now_ns + self._penance_ns
                self._penance_ns = min(2 * self._penance_ns, _PENANCE_NS_MAX)
            return
        if usual_ns > _LONG_NS:
            if is_lone and pace.is_known:
                self.crowded()
            return
        self._streak = min(self._streak + 1, _STREAK)
        if is_lone:
            if self._last is not None and self._last.is_idle:
                self._wait.begin(now_ns)
            self._follow_left -= 1
            if not self._follow_left:
                self._follow_client(now_ns)
        elif self._streak == _STREAK and now_ns >= self._resume_ns and self._home:
            self._join(now_ns)

    def crowded(self) -> None:
        """There is more than one request in flight."""
        self._streak = 0
        if self._is_lone:
            self._part()

    def _join(self, now_ns: int) -> None:
        """A client has turned out to be alone."""
        self._is_lone = self._share(self._client_core())
        self._wait.break_off()
        self._lone_ns = now_ns
        self._follow_left = self._follow = _FOLLOW

    def _cores_changed(self, are_awake: bool) -> None:
        """All cores are kept awake for the lone client, or may sleep again."""
        if not self._is_lone:
            return
        if are_awake:
            self._spread()
        else:
            self._share(self._client_core())

    def _follow_client(self, now_ns: int) -> None:
        if now_ns - self._lone_ns > _PROBATION_NS:
            self._penance_ns = _PENANCE_NS
        core = self._client_core()
        if self._core >= 0 and core != self._core:
            self._share(core)
            self._follow = min(2 * self._follow, _FOLLOW_MAX)
        else:
            self._follow = _FOLLOW
        self._follow_left = self._follow

    def _share(self, core: int) -> bool:
        if not self._run_on({core}):
            return False
        self._core = core
        if self._last is not None:
            self._guests[self._last.instance] = self._last
        for grant in self._guests.values():
            self._tell(grant, core + 1)
        return True

    def _client_core(self) -> int:
        """Return the core that handled the client's last packet; ours if it is none that we may use."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.client_fd)) as client:
            core = client.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
            if core in self._home:
                return core
        return _sched_getcpu()

    def _invite(self, grant: Grant) -> None:
        self._guests[grant.instance] = grant
        self._tell(grant, self._core + 1)

    def _part(self) -> None:
        self._is_lone = False
        self._wait.break_off()
        if self._core >= 0:
            self._spread()

    def _spread(self) -> None:
        """Let everybody run anywhere."""
        self._core = -1
        for grant in self._guests.values():
            self._tell(grant, 0)
        self._guests.clear()
        self._run_on(self._home)

    def _run_on(self, cores: set[int]) -> bool:
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            self._home = set()  # Somebody has taken these cores from us: the kernel's choice is better than ours.
            return False
        return True

    def _tell(self, grant: Grant, place: int) -> None:
        grant.bell.ring(HEADER.pack(Kind.PLACE, 0, 0, self._producer, place))
