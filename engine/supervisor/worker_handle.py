"""The supervisor's side of one worker process: its lifeline, the sending end of its doorbell, its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from forebay.engine.supervisor import priority
from forebay.engine.supervisor.child import describe_exit
from forebay.ipc.doorbell import LoopBell, create_doorbell
from forebay.ipc.errors import Internal, WorkerDied, from_wire
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.log import log
from forebay.ipc.messages import DeviceMemory, Failed, Message, Stop
from forebay.ipc.wire import HEADER, Kind
from forebay.ipc.worker_messages import (
    Adopt,
    AskReady,
    CheckMemory,
    Describe,
    Described,
    InstanceSpec,
    Load,
    Loaded,
    MakeMemory,
    MemoryChecked,
    MemoryClosed,
    MemoryDown,
    MemoryMade,
    ModelMetrics,
    Phase,
    ReadyAnswer,
    WorkerToSupervisor,
)

#: How long to wait for the zygote's word on how a worker ended, once its lifeline has closed, s.
_EXIT_CODE_WAIT_S = 1.0

#: How often to try a doorbell that was full, s.
_FLUSH_INTERVAL_S = 0.05

_WAKE = HEADER.pack(Kind.WAKE, 0, 0, 0, 0)

_Reply: TypeAlias = Described | Loaded | MemoryChecked | MemoryMade


class WorkerHandle:
    """One worker, from before its fork until after its end. Its number is never used again."""

    def __init__(self, number: int, name: str, on_end: Callable[[WorkerHandle], None]) -> None:
        """Create the sockets; the zygote gets the other ends from :meth:`take_child_fds`.

        Args:
            number: the instance number in messages.
            name: for ps and log lines, as ``alpha_model:2 #0``.
            on_end: called in the event loop as soon as the process is gone. What it had sent into doorbells is then
                already in them.
        """
        self.number = number
        self.name = name
        self.pid = 0
        self.exit_code: int | None = None
        self.ended = asyncio.Event()
        self.is_stopping = False
        #: Device in whose memory tensors of its requests may lie, once it has loaded; -1: there is none.
        self.device_id = -1
        #: Whether it is to load on what others leave of the CPU; set before it is forked.
        self.loads_quietly = False
        #: It was ended because an execution took too long.
        self.is_hung = False
        self.on_phase: Callable[[str], None] | None = None
        #: Takes the metrics that the model defines itself.
        self.on_metrics: Callable[[ModelMetrics], None] | None = None

        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        #: Its process is to end as soon as it is known.
        self._is_killed = False
        self._exit_known = asyncio.Event()
        #: One question at a time.
        self._checking = asyncio.Lock()
        #: Those that live in this one's process.
        self._guests: list[WorkerHandle] = []
        #: What every worker gets besides its own sockets: done doorbell, counters; empty: there is no process yet.
        self._fds_for_process: tuple[int, int] | tuple[()] = ()
        self._reply: asyncio.Future[_Reply] | None = None
        #: By owner and number, what waits for it to close a device memory.
        self._closing: dict[tuple[int, int], asyncio.Future[None]] = {}
        #: Questions to the model whether it is ready.
        self._next_request = itertools.count(1)
        self._asked: dict[int, asyncio.Future[ReadyAnswer | None]] = {}
        sender, self._child_doorbell = create_doorbell()
        self.bell = LoopBell(sender)
        ours, self._child_lifeline = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._lifeline: Lifeline[WorkerToSupervisor] = Lifeline(ours, WorkerToSupervisor)
        self._loop.add_reader(ours.fileno(), self._read)

    @property
    def child_fds(self) -> tuple[int, int]:
        """The worker's ends: doorbell, lifeline. Ours until :meth:`release_child_fds`."""
        return self._child_doorbell.fileno(), self._child_lifeline.fileno()

    def adopt(self, guest: WorkerHandle) -> bool:
        """Have this worker's process run another one as well; False if it is about to end."""
        if self.is_stopping or not self._fds_for_process:
            return False
        doorbell_fd, lifeline_fd = guest.child_fds
        done_fd, counters_fd = self._fds_for_process
        if not self.tell(Adopt(name=guest.name), (doorbell_fd, done_fd, lifeline_fd, counters_fd)):
            return False
        guest.release_child_fds()
        self._guests.append(guest)
        guest._fds_for_process = self._fds_for_process
        guest.pid = self.pid
        return True

    def note_process(self, done_fd: int, counters_fd: int) -> None:
        """A process is being forked for it; the descriptors are those that every worker gets, and stay the caller's."""
        self._fds_for_process = (done_fd, counters_fd)

    def note_pid(self, pid: int) -> None:
        """The zygote says who it is."""
        for worker in (self, *self._guests):
            worker.pid = pid
            if worker._is_killed:
                worker.kill()
        if self.loads_quietly:
            priority.lower(pid)
            self._loop.call_later(priority.QUIET_LOAD_S, self.end_quiet)

    def end_quiet(self) -> None:
        """Go on at the usual priority; called before it serves, and when loading takes long."""
        if self.loads_quietly and self.pid and not self.ended.is_set():
            priority.restore(self.pid)
        self.loads_quietly = False

    def follow_model(self, model_priority: str) -> None:
        """Run at the priority that its model is configured with."""
        if self.pid and not self.ended.is_set():
            priority.follow_model(self.pid, model_priority)

    def let_others_first(self) -> None:
        """It is about to be stopped, with all others of its process: that need not be soon."""
        if self.pid and not self.ended.is_set():
            priority.let_others_first(self.pid)

    def release_child_fds(self) -> None:
        """Close our copies of the worker's ends, so that its end is noticed."""
        self._child_doorbell.close()
        self._child_lifeline.close()

    # --- talking ---

    async def describe(self, spec: InstanceSpec, limit_s: float = 0.0) -> Described:
        """Ask what the model file holds; ``limit_s``: how long that may take, 0: any time.

        Raises:
            ServingError: the backend's reason, or WorkerDied.
        """
        reply = await self._call(Describe(spec=spec), limit_s)
        assert isinstance(reply, Described)
        return reply

    async def load(self, spec: InstanceSpec, limit_s: float = 0.0) -> Loaded:
        """Have it load the model; it takes batches from then on. ``limit_s``: how long that may take, 0: any time.

        Raises:
            ServingError: the backend's reason, or WorkerDied.
        """
        reply = await self._call(Load(spec=spec), limit_s)
        assert isinstance(reply, Loaded)
        self.device_id = reply.device_id
        return reply

    async def check_memory(self, memory: DeviceMemory) -> str:
        """Have it open a device memory; return why it cannot, or nothing.

        Raises:
            WorkerDied: its process ended.
        """
        async with self._checking:
            reply = await self._call(CheckMemory(memory=memory))
        assert isinstance(reply, MemoryChecked)
        return reply.text

    async def make_memory(self, owner: int, number: int, byte_size: int) -> bytes:
        """Have it allocate device memory until :meth:`close_memory`; return the handle.

        Raises:
            Internal: why there is none.
            WorkerDied: its process ended.
        """
        async with self._checking:
            reply = await self._call(MakeMemory(owner=owner, number=number, byte_size=byte_size))
        assert isinstance(reply, MemoryMade)
        if reply.text:
            raise Internal(reply.text)
        return reply.handle

    async def ask_ready(self) -> ReadyAnswer | None:
        """Have the model say whether it is ready; None: the worker is gone. May be given up at any time."""
        request = next(self._next_request)
        future = self._asked[request] = self._loop.create_future()
        try:
            return await future if self.tell(AskReady(request=request)) else None
        finally:
            del self._asked[request]

    async def close_memory(self, owner: int, number: int) -> None:
        """Have it close a device memory; returns when it has, or is gone. Whoever gives up waiting may ask again."""
        future = self._closing.setdefault((owner, number), self._loop.create_future())
        if self.tell(MemoryDown(owner=owner, number=number)):
            await asyncio.shield(future)
        elif self.ended.is_set():
            self._closing.pop((owner, number), None)

    async def _call(self, message: Message, limit_s: float = 0.0) -> _Reply:
        self._reply = self._loop.create_future()
        try:
            if self.ended.is_set():
                raise WorkerDied(f"the process of {self.name} ended")
            self.tell(message)
            return await asyncio.wait_for(self._reply, limit_s or None)
        except TimeoutError:
            self.kill()
            raise Internal(
                f"loading took longer than {limit_s:g} s (--load-timeout-secs); the process of {self.name} was ended"
            ) from None
        except WorkerDied:
            exit_code = await self.wait_exit_code()
            how = "" if exit_code is None else f" with {describe_exit(exit_code)}"
            raise WorkerDied(f"the process of {self.name} ended{how} while it looked at the model") from None
        finally:
            self._reply = None

    def tell(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        """Send something that needs no answer; the caller keeps ``fds``. The worker looks when its doorbell rings.

        Returns:
            False if it is gone.
        """
        if not self._send(message, fds):
            return False
        self.bell.ring(_WAKE)
        self._flush_bell()
        return True

    def _flush_bell(self) -> None:
        # A full doorbell: the worker has much to do, and is told as soon as there is room.
        if not self.ended.is_set() and self.bell.backlog_count:
            self.bell.flush()
            self._loop.call_later(_FLUSH_INTERVAL_S, self._flush_bell)

    def _send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        if self.ended.is_set():
            return False
        try:
            self._lifeline.send(message, fds)
        except PeerClosed:
            return False  # The reader notices, and tells everybody.
        return True

    # --- the end ---

    async def stop(self, timeout_s: float) -> None:
        """Have it finish what it runs and exit; kill it after ``timeout_s``."""
        self.is_stopping = True
        self.tell(Stop())
        try:
            await asyncio.wait_for(self.ended.wait(), timeout_s)
        except TimeoutError:
            log.warning(f"worker {self.name} did not stop within {timeout_s:g} s and was killed")
            self.kill()
            await self.ended.wait()

    def give_up(self) -> None:
        """Have it end by itself, however long that takes; others that live in its process go on."""
        if not self._fds_for_process:
            self.kill()
            return
        self.is_stopping = True
        self.tell(Stop())

    def kill(self) -> None:
        """End it at once, with all others of its process."""
        self.is_stopping = self._is_killed = True
        if self.pid and self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        elif not self.pid:
            # Not forked yet, as far as we know: the zygote's Forked will kill it.
            self._end()

    def note_exit(self, exit_code: int) -> None:
        """The zygote says how its process ended."""
        self.exit_code = exit_code
        self._exit_known.set()
        if not self.ended.is_set():
            self._read()  # What it said last may be why; the zygote can be heard before it.
        self._end()
        for guest in self._guests:
            guest.note_exit(exit_code)

    async def wait_exit_code(self) -> int | None:
        """Return how it ended, as ``os.waitstatus_to_exitcode`` gives it; None if nobody knows."""
        await self.ended.wait()
        try:
            await asyncio.wait_for(self._exit_known.wait(), _EXIT_CODE_WAIT_S)
        except TimeoutError:
            pass
        return self.exit_code

    def _read(self) -> None:
        try:
            messages = self._lifeline.receive_nowait()
        except PeerClosed:
            self._end()
            return
        except msgspec.MsgspecError as error:
            # A worker runs its users' code; whatever it did to itself, it is not to be trusted any more.
            log.error(f"worker {self.name} sent a message that cannot be read: {error}")
            self.kill()
            return
        for message, fds in messages:
            for fd in fds:
                os.close(fd)
            self._take(message)

    def _take(self, message: WorkerToSupervisor) -> None:
        if isinstance(message, Phase):
            if self.on_phase is not None:
                self.on_phase(message.text)
        elif isinstance(message, ModelMetrics):
            if self.on_metrics is not None:
                self.on_metrics(message)
        elif isinstance(message, MemoryClosed):
            closing = self._closing.pop((message.owner, message.number), None)
            if closing is not None and not closing.done():
                closing.set_result(None)
        elif isinstance(message, ReadyAnswer):
            asked = self._asked.get(message.request)
            if asked is not None and not asked.done():
                asked.set_result(message)
        elif self._reply is not None and not self._reply.done():
            if isinstance(message, Failed):
                self._reply.set_exception(from_wire(message.code, message.text))
            else:
                self._reply.set_result(message)
        elif isinstance(message, Failed):
            log.error(f"worker {self.name}: {message.text}")

    def _end(self) -> None:
        if self.ended.is_set():
            return
        self._loop.remove_reader(self._lifeline.fileno())
        self._lifeline.close()
        self.ended.set()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(WorkerDied(f"the process of {self.name} ended"))
        waiting: list[asyncio.Future[Any]] = [*self._closing.values(), *self._asked.values()]
        for future in waiting:
            if not future.done():
                future.set_result(None)
        self._on_end(self)
        self.bell.close()
        self.release_child_fds()
