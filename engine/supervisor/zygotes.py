"""The zygotes as the supervisor sees them: one per family of backends, started when first needed, restarted."""

from __future__ import annotations

import asyncio
import os
import time

from forebay.engine.backend_families import FAMILIES, missing_library
from forebay.engine.supervisor.backoff import Backoff
from forebay.engine.supervisor.child import Child, describe_exit
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.errors import Unavailable
from forebay.ipc.log import log
from forebay.ipc.messages import Failed, Started
from forebay.ipc.worker_messages import Fork, Forked, WorkerExited, ZygoteToSupervisor

#: How often a zygote may die while it starts before its family counts as broken.
_START_ATTEMPTS = 3


class ZygoteHandle:
    """One family's zygote."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._child: Child[ZygoteToSupervisor] | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._workers: dict[int, WorkerHandle] = {}
        self._backoff = Backoff()
        self._started_s = 0.0
        self._failed_starts = 0
        self._failure = ""
        self._stopping = False
        self._start()

    @property
    def pid(self) -> int:
        """Process id, 0 while there is none."""
        return self._child.pid if self._child is not None and self._child.is_running else 0

    async def fork(self, worker: WorkerHandle, done_fd: int, counters_fd: int) -> None:
        """Fork ``worker``; returns before the process has done anything.

        Raises:
            Unavailable: the family's libraries cannot be imported; the text says why.
        """
        if self._failure and self._child is None:
            # Perhaps somebody has installed what was missing.
            self._failure, self._failed_starts = "", 0
            self._ready = asyncio.get_running_loop().create_future()
            self._start()
        while True:
            await asyncio.shield(self._ready)
            child = self._child
            doorbell_fd, lifeline_fd = worker.child_fds
            self._workers[worker.number] = worker
            if child is not None and child.send(
                Fork(instance=worker.number, name=worker.name), (doorbell_fd, done_fd, lifeline_fd, counters_fd)
            ):
                worker.release_child_fds()
                worker.note_process(done_fd, counters_fd)
                return
            # It died just now: its exit is noticed in the next turn of the event loop.
            del self._workers[worker.number]
            await asyncio.sleep(0.01)

    async def stop(self, timeout_s: float) -> None:
        """End it; its workers must have ended."""
        self._stopping = True
        if self._child is not None:
            await self._child.stop(timeout_s)

    def kill(self) -> None:
        """End it at once, and its workers with it."""
        self._stopping = True
        if self._child is not None:
            self._child.kill()

    async def wait_ended(self) -> None:
        """Wait for the end of its process."""
        if self._child is not None:
            await self._child.exited.wait()

    def _start(self) -> None:
        self._started_s = time.monotonic()
        self._child = Child(
            f"zygote {self.family}",
            "forebay.engine.zygote",
            ZygoteToSupervisor,
            on_message=self._take,
            on_exit=self._exited,
            arguments=("--family", self.family, "--parent-pid", str(os.getpid())),
        )

    def _take(self, message: ZygoteToSupervisor, _fds: list[int]) -> None:
        match message:
            case Started():
                self._failed_starts = 0
                log.verbose(1, f"zygote {self.family} is ready")
                if not self._ready.done():
                    self._ready.set_result(None)
            case Failed():
                self._failure = message.text
            case Forked():
                if (worker := self._workers.get(message.instance)) is not None:
                    worker.note_pid(message.pid)
            case WorkerExited():
                if (worker := self._workers.pop(message.instance, None)) is not None:
                    worker.note_exit(message.exit_code)

    def _exited(self, exit_code: int) -> None:
        self._child = None
        # The kernel kills its workers with it.
        for worker in list(self._workers.values()):
            worker.note_exit(-9)
        self._workers.clear()
        if self._stopping:
            return
        now_s = time.monotonic()
        if not self._ready.done():
            self._failed_starts += 1
            if self._failure or self._failed_starts >= _START_ATTEMPTS:
                text = self._failure or f"zygote {self.family} ended while it started: {describe_exit(exit_code)}"
                self._failure = text
                self._ready.set_exception(Unavailable(missing_library(self.family) or text))
                self._ready.exception()  # Whoever forks next gets it; nobody may.
                return
        else:
            log.error(f"zygote {self.family} died ({describe_exit(exit_code)}); restarting it")
            self._ready = asyncio.get_running_loop().create_future()
        delay_s = self._backoff.died(now_s, now_s - self._started_s)
        asyncio.get_running_loop().call_later(delay_s, self._restart)

    def _restart(self) -> None:
        if self._stopping or self._child is not None:
            return
        try:
            self._start()
        except OSError as error:
            # Processes, memory or descriptors are short for the moment.
            log.error(f"zygote {self.family} cannot be started: {error.strerror}; trying again")
            delay_s = self._backoff.died(time.monotonic(), 0.0)
            asyncio.get_running_loop().call_later(delay_s, self._restart)


class Zygotes:
    """All of them."""

    def __init__(self) -> None:
        self._by_family: dict[str, ZygoteHandle] = {}

    def start(self, family: str) -> ZygoteHandle:
        """Return the family's zygote; start it if there is none yet."""
        zygote = self._by_family.get(family)
        if zygote is None:
            assert family in FAMILIES
            zygote = self._by_family[family] = ZygoteHandle(family)
        return zygote

    async def stop(self, timeout_s: float) -> None:
        await asyncio.gather(*(zygote.stop(timeout_s) for zygote in self._by_family.values()))

    def kill(self) -> None:
        """End all of them at once."""
        for zygote in self._by_family.values():
            zygote.kill()

    async def wait_ended(self) -> None:
        """Wait until all have ended."""
        await asyncio.gather(*(zygote.wait_ended() for zygote in self._by_family.values()))
