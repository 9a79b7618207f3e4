"""The process that outlives the supervisor just long enough to remove its runtime directory.

It waits for the end of a pipe that only the supervisor holds, and so notices every way in which that may end. The first
one is forked while the supervisor is small and has no threads; one that dies is replaced by a program of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

from forebay.engine.supervisor.backoff import Backoff
from forebay.ipc.log import log
from forebay.ipc.process import ignore_terminal_signals, set_name

#: How long the end of a server waits for its janitor, ms; a stopped process would never come to its end.
_PATIENCE_MS = 3000


class Janitor:
    """The supervisor's side: there is always one, from construction to :meth:`end`."""

    def __init__(self, path: str) -> None:
        """Fork the first; call before the process has threads or anything large in memory.

        Args:
            path: the directory to remove.
        """
        self._path = path
        self._watched_fd, self._held_fd = os.pipe2(os.O_CLOEXEC)
        self._pidfd = -1
        self._since_s = time.monotonic()
        self._backoff = Backoff()
        self._restart: asyncio.TimerHandle | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_forked(self._watched_fd, path)

    def watch(self) -> None:
        """Replace it whenever it dies; call in the running event loop."""
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._died)

    def unwatch(self) -> None:
        """Let it be; call in the event loop."""
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _died(self) -> None:
        self.unwatch()
        self._reap()
        log.error("the janitor died; restarting it")
        self._replace_later(time.monotonic() - self._since_s)

    def _replace_later(self, lived_s: float) -> None:
        delay_s = self._backoff.died(time.monotonic(), lived_s)
        self._restart = asyncio.get_running_loop().call_later(delay_s, self._replace)

    def _replace(self) -> None:
        # Not forked: by now there are threads, whose locks a child would find taken for ever.
        self._since_s = time.monotonic()
        command = [sys.executable, "-P", "-m", __name__, self._path]
        try:
            process = subprocess.Popen(command, stdin=self._watched_fd, start_new_session=True)
        except OSError as error:
            log.error(f"the janitor cannot be started: {error.strerror}; trying again")
            self._replace_later(0.0)
            return
        self.pid = process.pid
        # It is reaped here, by number, as the first one.
        process.returncode = 0
        self.watch()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def end(self) -> None:
        """Have it remove what is left of the directory and end."""
        os.close(self._held_fd)
        os.close(self._watched_fd)
        with contextlib.suppress(ProcessLookupError):
            self._wait_or_kill()
        self._reap()

    def _wait_or_kill(self) -> None:
        pidfd = os.pidfd_open(self.pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            if not ended.poll(_PATIENCE_MS):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _run_forked(watched_fd: int, path: str) -> None:
    """Become the janitor in a forked child. Does not return."""
    try:
        # Its own session, so that what a terminal or a service manager sends to the group does not end it early.
        os.setsid()
        os.dup2(watched_fd, 0)
        _clean_up_later(path)
    finally:
        os._exit(0)


def _clean_up_later(path: str) -> None:
    """Remove a directory when standard input ends."""
    ignore_terminal_signals()
    set_name("janitor")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 2)
    # The other end of the pipe is among them.
    os.closerange(3, 1024)
    os.chdir("/")
    os.read(0, 1)
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.exists(path):
            break
        # A child of the dead supervisor was still creating something; the kernel is about to kill it.
        time.sleep(0.05)


if __name__ == "__main__":
    _clean_up_later(sys.argv[1])
