"""One child process of the supervisor: start it, talk to it over its lifeline, notice its end, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import msgspec

from forebay.ipc.lifeline import DescriptorsLost, Lifeline, PeerClosed
from forebay.ipc.log import log
from forebay.ipc.messages import Message, Stop

Received = TypeVar("Received")

#: Libraries read these when they are imported, before anybody can call them: no thread may exist when a zygote forks,
#: and a worker's threads are a choice of its instance, not of the machine's size.
CHILD_ENVIRONMENT = {
    # From 1.29 on, ONNX Runtime sends usage data to its maker, from threads that it starts when it is imported.
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    # glibc gives each thread an arena of its own otherwise, which small processes pay for.
    "MALLOC_ARENA_MAX": "2",
}


class Child(Generic[Received]):
    """A process started as ``python -m <module> --lifeline-fd N``. Lives from construction until ``on_exit``."""

    def __init__(
        self,
        name: str,
        module: str,
        union: object,
        *,
        on_message: Callable[[Received, list[int]], None],
        on_exit: Callable[[int], None],
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process; must run in the main thread of a running event loop.

        Args:
            name: its role, for log lines.
            union: the type of the messages that it sends.
            on_message: called in the event loop with each message and its descriptors, which it then owns.
            on_exit: called once with the exit code (negative: signal), after everything it had sent.

        Raises:
            OSError: there is no room for it; nothing of it is left.
        """
        self.name = name
        self.exit_code: int | None = None
        self.exited = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_exit = on_exit
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            command = [sys.executable, "-P", "-m", module, "--lifeline-fd", str(theirs.fileno()), *arguments]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=dict(os.environ, **CHILD_ENVIRONMENT, **(environment or {})),
            )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.pop_all()
        ours.setblocking(False)
        self.lifeline: Lifeline[Received] = Lifeline(ours, union)
        self._reading = True
        self._loop.add_reader(ours.fileno(), self._readable)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        """Send over the lifeline; the caller keeps ``fds``. False if the process is gone: ``on_exit`` follows."""
        try:
            self.lifeline.send(message, fds)
        except PeerClosed:
            return False
        return True

    def send_nowait(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        """Send over the lifeline if that needs no waiting; the caller keeps ``fds``. False: it is not sent."""
        try:
            return self.lifeline.send_nowait(message, fds)
        except PeerClosed:
            return False

    def kill(self) -> None:
        """End it at once."""
        if self.exit_code is None:
            self._process.kill()

    async def stop(self, timeout_s: float) -> bool:
        """Ask it to finish and wait for its end; kill it after ``timeout_s``. Return whether it ended by itself."""
        if self.exit_code is not None:
            return True
        self.send(Stop())
        try:
            await asyncio.wait_for(self.exited.wait(), timeout_s)
        except TimeoutError:
            log.warning(f"{self.name} did not stop within {timeout_s:g} s and was killed")
            self.kill()
            await self.exited.wait()
            return False
        return True

    def _readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        """Take what has arrived; False if there was nothing."""
        try:
            messages = self.lifeline.receive_nowait()
        except DescriptorsLost:
            # We have none left: what it sent cannot be had any more, and nothing is certain without it.
            log.error(f"{self.name} sent descriptors for which this process has no room; raise `ulimit -n`")
            self._stop_reading()
            self.kill()
            return False
        except PeerClosed:
            self._stop_reading()
            return False
        except msgspec.MsgspecError as error:
            # Only a defect of ours can get here; a child that talks nonsense is not to be kept.
            log.error(f"{self.name} sent a message that cannot be read: {error}")
            self._stop_reading()
            self.kill()
            return False
        for message, fds in messages:
            self._on_message(message, fds)
        return bool(messages)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.lifeline.fileno())

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exit_code = self._process.wait()
        # What it sent just before it ended still counts; end of file may never come, if a grandchild holds the socket.
        while self._reading and self._read():
            pass
        self._stop_reading()
        self.lifeline.close()
        self.exited.set()
        self._on_exit(self.exit_code)


def describe_exit(exit_code: int) -> str:
    """Return how a process ended, in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"signal {-exit_code} ({signal.Signals(-exit_code).name})"
    return f"signal {-exit_code}"
