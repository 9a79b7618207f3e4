"""What every serving frontend process does alike: start from the lifeline, connect to engine and supervisor, stop.

A protocol gives :func:`run_frontend` a function that opens its servers; the rest is here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import uvloop
import zmq

from forebay.frontend.control_client import ControlClient
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.regions import RegionTable, open_region
from forebay.frontend.response_cache import ResponseCache
from forebay.frontend.tracing import Tracer
from forebay.ipc.arena import Arena
from forebay.ipc.channel import SubmitSender
from forebay.ipc.counters import CACHE_WORDS, CountersFile
from forebay.ipc.errors import Code, ServingError
from forebay.ipc.frontend_messages import (
    ConnectionMoved,
    Crowded,
    DoorbellDown,
    DoorbellUp,
    FrontendStart,
    PoolDown,
    PoolEmpty,
    PoolUp,
    QuietOpen,
    QuietWanted,
    RegionDown,
    RegionsSeen,
    RegionUnused,
    RegionUp,
    Serve,
    SupervisorToFrontend,
)
from forebay.ipc.lifeline import DescriptorsLost, Lifeline, PeerClosed
from forebay.ipc.log import log
from forebay.ipc.messages import Failed, LogChanged, Message, Started, Stop
from forebay.ipc.process import die_with_parent, ignore_terminal_signals, set_name
from forebay.ipc.time_slices import ask_for_larger_share, ask_for_short_slices
from forebay.ipc.trace import TraceRules
from forebay.ipc.wakeup_latency import WakeupLatency, may_ask
from forebay.ipc.worker_messages import ModelMetrics

#: Cores of the largest machine that is kept awake for a lone client unless somebody has said how fast they must wake
#: up: on larger ones too many others would pay for it.
_AWAKE_CORES_MAX = 4

#: Seconds between looks at whether the last request has been answered while stopping.
_DRAIN_POLL_SECS = 0.02

#: Seconds from the announcement that connections end to the end of idle ones: time for requests on their way.
_DRAIN_GRACE_SECS = 0.1


class Served(Protocol):
    """A protocol's servers."""

    def stop_accepting(self) -> None:
        """Take no new connections."""
        ...

    def drain(self) -> None:
        """Tell clients that connections end, with the next reply."""
        ...

    def close_idle(self) -> None:
        """Close connections on which nothing is asked."""
        ...

    @property
    def connection_count(self) -> int:
        """Connections still open."""
        ...

    @property
    def pending_count(self) -> int:
        """Connections with requests that the engine does not know: incomplete ones, and such as it is not asked."""
        ...

    def abort(self) -> None:
        """Close everything now."""
        ...


class FrontendProcess:
    """One frontend: engine, control connection, settings, sockets."""

    def __init__(self, lifeline: Lifeline[SupervisorToFrontend], start: FrontendStart, fds: Sequence[int]) -> None:
        """Take ownership of ``lifeline`` and ``fds``; call in the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.start = start
        self._lifeline = lifeline
        arena_fd, completion_fd, counters_fd, *listener_fds = fds
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.counters = CountersFile(counters_fd)
        self.arena = Arena(arena_fd, start.arena_bytes, keeps_pages=start.keeps_pages)
        os.close(counters_fd)
        os.close(arena_fd)
        self.sockets = [socket.socket(fileno=fd) for fd in listener_fds]
        self.engine = EngineClient(
            self.loop,
            producer=start.producer,
            epoch=start.scheduler_epoch,
            arena=self.arena,
            completions=socket.socket(fileno=completion_fd),
            counters=self.counters,
            submit=SubmitSender(self._context, start.runtime_directory),
        )
        process = start.settings["process"]
        # A worker that looks for work without sleeping needs a core of its own.
        if process["share_cores"] and process["wait"] == "park":
            self.engine.cores.allow()
            core_count = os.cpu_count() or 1
            if process["cpu_wakeup_latency_us"] < 0 and core_count <= _AWAKE_CORES_MAX and may_ask():
                self.engine.wakeful_wait.allow_awake_cores(WakeupLatency(0), core_count)
        if process["cpu_wakeup_latency_us"] >= 0:
            self.engine.awake_cores.allow(process["cpu_wakeup_latency_us"])
        if start.cache_bytes:
            counters = self.counters.block(start.cache_counter_offset, CACHE_WORDS)
            self.engine.response_cache = ResponseCache(self.engine, start.cache_bytes, counters)
        pools = start.settings["gpu"]["memory_pool_byte_sizes"]
        self.engine.device_pools.excluded = {pool["device"] for pool in pools if not pool["byte_size"]}
        self.engine.device_pools.on_empty = self._tell_pool_empty
        self.control = ControlClient(self.loop, start.runtime_directory, start.producer, context=self._context)
        self._tracer = Tracer(self.loop, self.control.report_traces)
        self.control.on_trace_rules = self._take_trace_rules
        #: Shared memory that clients have registered.
        self.regions = RegionTable()
        #: There is a quiet frontend, to which connections may be handed over.
        self.is_quiet_open = False
        #: It has been asked for.
        self.is_quiet_wanted = False
        self._take_connection: Callable[[socket.socket], None] | None = None
        #: Connections that came before anybody took them.
        self._moved: list[socket.socket] = []
        #: Set when clients may be accepted.
        self.may_serve = asyncio.Event()
        #: Set when the process shall end.
        self.stopping = asyncio.Event()
        self.exit_code = 0
        self.loop.add_reader(lifeline.fileno(), self._on_lifeline)

    def _on_lifeline(self) -> None:
        try:
            messages = self._lifeline.receive_nowait()
        except PeerClosed as error:
            if isinstance(error, DescriptorsLost):
                log.error(f"{self.start.name}: {error}; raise `ulimit -n`")
            self.exit_code = 1
            self.stopping.set()
            return
        for message, fds in messages:
            match message:
                case DoorbellUp():
                    self.engine.grants.add_doorbell(message.instance, socket.socket(fileno=fds[0]))
                case DoorbellDown():
                    self.engine.grants.remove_doorbell(message.instance)
                case Serve():
                    self.may_serve.set()
                case Stop():
                    self.stopping.set()
                case LogChanged():
                    log.follow(message.options)
                case RegionUp():
                    self.regions.add(open_region(message, fds, self._tell_region_unused))
                    self._confirm_regions(message.generation)
                case RegionDown():
                    for name in message.names:
                        self.regions.remove(name)
                    self._confirm_regions(message.generation)
                case PoolUp():
                    self.engine.device_pools.add(message.memory)
                case PoolDown():
                    self.engine.device_pools.remove(message.number)
                case QuietOpen():
                    self.is_quiet_open = message.is_open
                case ConnectionMoved():
                    for fd in fds:
                        self._take_moved(socket.socket(fileno=fd))
                case FrontendStart() | ModelMetrics():
                    pass

    def _take_moved(self, sock: socket.socket) -> None:
        if self._take_connection is not None:
            self._take_connection(sock)
        else:
            self._moved.append(sock)

    def take_connections(self, take: Callable[[socket.socket], None]) -> None:
        """Have ``take`` called with each connection that comes from another frontend; it owns it then."""
        self._take_connection = take
        moved, self._moved = self._moved, []
        for sock in moved:
            take(sock)

    def hand_over(self, fd: int) -> bool:
        """Hand a connection over to the quiet frontend, or by that to another one; the caller keeps ``fd``.

        Returns:
            whether it is on its way; False: not now.
        """
        try:
            return self._lifeline.send_nowait(ConnectionMoved(), (fd,))
        except PeerClosed:
            return False

    def want_quiet(self) -> None:
        """Ask, once, for a quiet frontend."""
        if not self.is_quiet_wanted:
            self.is_quiet_wanted = True
            self._tell(QuietWanted())

    def tell_crowds(self, routes: tuple[int, ...]) -> None:
        """Say that these are crowded just now, so that others get their share of the cores.

        It is said again soon: a supervisor that does not read keeps nobody waiting.
        """
        with contextlib.suppress(PeerClosed):
            self._lifeline.send_nowait(Crowded(routes=routes))

    def _take_trace_rules(self, rules: TraceRules) -> None:
        self._tracer.take_rules(rules)
        self.engine.trace_by(self._tracer.sampler, is_tracing=self._tracer.is_tracing)

    def _confirm_regions(self, generation: int) -> None:
        self._tell(RegionsSeen(generation=generation))

    def _tell_region_unused(self, number: int) -> None:
        self._tell(RegionUnused(number=number))

    def _tell_pool_empty(self, number: int) -> None:
        self._tell(PoolEmpty(number=number))

    def _tell(self, message: Message) -> None:
        # Without a supervisor, the end of file that follows ends us.
        with contextlib.suppress(PeerClosed):
            self._lifeline.send(message)

    async def run(self, open_servers: Callable[[FrontendProcess], Awaitable[Served]]) -> int:
        """Serve from ``Serve`` to ``Stop``; return the exit code."""
        self._lifeline.send(Started())
        # Everything imported so far stays for good: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        await self._either(self.may_serve)
        if not self.stopping.is_set():
            await self.control.wait_catalog()
            served = await open_servers(self)
            await self.stopping.wait()
            await self._drain(served)
        self.loop.remove_reader(self._lifeline.fileno())
        self.engine.close()
        self.control.close()
        return self.exit_code

    async def _either(self, event: asyncio.Event) -> None:
        tasks = [asyncio.ensure_future(waiting.wait()) for waiting in (event, self.stopping)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _drain(self, served: Served) -> None:
        # The supervisor bounds the time (--exit-timeout-secs) and kills us after it.
        # In this order: a client that is told to leave comes back at once, and is refused instead of cut off.
        served.stop_accepting()
        served.drain()
        if self.exit_code == 0:
            await asyncio.sleep(_DRAIN_GRACE_SECS)
        served.close_idle()
        if self.exit_code == 0:
            # Once in a process's life; an event would cost something on every answer.
            while served.connection_count and (self.engine.in_flight_count or served.pending_count):
                await asyncio.sleep(_DRAIN_POLL_SECS)
                # Sequences may have ended, and with them what their connections were kept for.
                served.close_idle()
            # Answers are with the kernel or in the transports; let those be written.
            await asyncio.sleep(_DRAIN_POLL_SECS)
        served.abort()


def run_frontend(
    role: str,
    open_servers: Callable[[FrontendProcess], Awaitable[Served]],
    *,
    check: Callable[[FrontendStart], None] = lambda _start: None,
) -> int:
    """Run a frontend process: ``python -m <module> --lifeline-fd N``.

    Args:
        check: raises a ServingError if it could never serve with these settings; the server does not start then.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline-fd", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(os.getppid())
    ignore_terminal_signals()
    ask_for_short_slices()
    set_name(role)
    lifeline: Lifeline[SupervisorToFrontend] = Lifeline(socket.socket(fileno=options.lifeline_fd), SupervisorToFrontend)

    async def serve(start: FrontendStart, fds: list[int]) -> int:
        return await FrontendProcess(lifeline, start, fds).run(open_servers)

    try:
        message, fds = lifeline.receive()
        if not isinstance(message, FrontendStart):
            return 0 if isinstance(message, Stop) else 1
        set_name(message.name or role)
        if message.is_quiet:
            # Those that it was started to keep apart from are busy all the time.
            ask_for_larger_share()
        check(message)
        return uvloop.run(serve(message, fds))
    except PeerClosed:
        return 1
    except (ServingError, OSError) as error:
        with contextlib.suppress(PeerClosed):
            lifeline.send(Failed(code=int(Code.INTERNAL), text=f"{role} frontend failed to start: {error}"))
        print(f"forebay {role}: {error}", file=sys.stderr)
        return 1
