"""A zygote: a process that imported a family of backends once and forks every worker of that family.

A forked worker shares the zygote's pages (interpreter, numpy, ONNX Runtime or PyTorch) and is up in milliseconds. The
zygote has no threads and no CUDA context, so that forking is safe. It waits for its workers and tells the supervisor
how each ended.

    python -m forebay.engine.zygote --lifeline-fd N --family onnxruntime --parent-pid P
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from forebay.engine.backend_families import FAMILIES
from forebay.ipc.errors import Code
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.log import log
from forebay.ipc.messages import Failed, Started, Stop
from forebay.ipc.process import die_with_parent, ignore_terminal_signals, set_name
from forebay.ipc.worker_messages import Fork, Forked, SupervisorToZygote, WorkerExited


class NewWorker(NamedTuple):
    """What a forked child continues with; it owns the descriptors."""

    name: str
    doorbell_fd: int
    done_fd: int
    lifeline_fd: int
    counters_fd: int


class Zygote:
    """The loop: fork on request, report workers that ended."""

    def __init__(self, lifeline: Lifeline[SupervisorToZygote]) -> None:
        self._lifeline = lifeline
        self._poll = select.poll()
        self._poll.register(lifeline.fileno(), select.POLLIN)
        #: pidfd -> (pid, instance)
        self._workers: dict[int, tuple[int, int]] = {}

    def run(self) -> NewWorker | None:
        """Serve until told to stop (None), or, in a forked child, return what to do as a worker.

        Raises:
            PeerClosed: the supervisor is gone.
        """
        while True:
            for fd, _events in self._poll.poll():
                if fd != self._lifeline.fileno():
                    self._reap(fd)
                    continue
                for message, fds in self._lifeline.receive_nowait():
                    if isinstance(message, Stop):
                        return None
                    worker = self._fork(message, fds)
                    if worker is not None:
                        return worker

    def _fork(self, request: Fork, fds: list[int]) -> NewWorker | None:
        parent = os.getpid()
        try:
            pid, pidfd = self._fork_process()
        except OSError as error:
            # Too many processes, or too little memory: that worker cannot be, and all others go on.
            log.error(f"worker {request.name} cannot be forked: {error.strerror}")
            for fd in fds:
                os.close(fd)
            self._lifeline.send(WorkerExited(instance=request.instance, pid=0, exit_code=os.EX_OSERR))
            return None
        if pid == 0:
            die_with_parent(parent)
            # The descriptors below belong to the zygote's objects, which must not close a number that was reused.
            self._lifeline.sock.detach()
            close_descriptors_except(fds)
            return NewWorker(request.name, *fds)
        for fd in fds:
            os.close(fd)
        self._workers[pidfd] = (pid, request.instance)
        self._poll.register(pidfd, select.POLLIN)
        self._lifeline.send(Forked(instance=request.instance, pid=pid))
        return None

    @staticmethod
    def _fork_process() -> tuple[int, int]:
        """Fork; return the child's process id and pidfd, or zeros in the child.

        Raises:
            OSError: there is no child.
        """
        pid = os.fork()
        if pid == 0:
            return 0, 0
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _reap(self, pidfd: int) -> None:
        pid, instance = self._workers.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._lifeline.send(WorkerExited(instance=instance, pid=pid, exit_code=os.waitstatus_to_exitcode(status)))


def close_descriptors_except(kept: Sequence[int]) -> None:
    """Close everything that was open in the zygote but its standard streams and ``kept``."""
    wanted = {0, 1, 2, *kept}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in wanted:
            try:
                os.close(int(name))
            except OSError:
                # The descriptor of the listing itself.
                pass


def import_family(family: str) -> None:
    """Import what the workers of a family need.

    Raises:
        ImportError: a library is missing or broken.
    """
    for module in ("forebay.engine.worker.worker_process", *FAMILIES[family].modules):
        importlib.import_module(module)


def thread_count() -> int:
    """Return how many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def has_opened_gpu() -> bool:
    """Whether a library has opened CUDA in this process, which then cannot be used in any process forked from it."""
    links: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone by now.
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return any(link.startswith(("/dev/nvidia", "/dev/dxg")) for link in links)


def become_worker(worker: NewWorker) -> NoReturn:
    """Turn this freshly forked process into a worker. Does not return."""
    from forebay.engine.worker.worker_process import run_worker

    set_name(f"worker {worker.name}")
    try:
        run_worker(
            socket.socket(fileno=worker.lifeline_fd),
            socket.socket(fileno=worker.doorbell_fd),
            socket.socket(fileno=worker.done_fd),
            worker.counters_fd,
        )
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the zygote's exit handlers.
        os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a zygote; in forked children, run a worker."""
    parser = argparse.ArgumentParser(prog="forebay.engine.zygote")
    parser.add_argument("--lifeline-fd", type=int, required=True)
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args(arguments)

    die_with_parent(options.parent_pid)
    ignore_terminal_signals()
    set_name(f"zygote {options.family}")
    lifeline: Lifeline[SupervisorToZygote] = Lifeline(socket.socket(fileno=options.lifeline_fd), SupervisorToZygote)
    try:
        try:
            import_family(options.family)
        except ImportError as error:
            lifeline.send(Failed(code=Code.UNAVAILABLE, text=f"cannot import {error.name or 'a library'}: {error}"))
            return 1
        if (threads := thread_count()) > 1:
            log.warning(f"zygote {options.family} has {threads} threads; forking such a process is not safe")
        if has_opened_gpu():
            log.warning(f"zygote {options.family}: a library opened CUDA on import; its workers cannot use a GPU")
        # Collected before and frozen now, the imported objects' pages stay shared with every worker.
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        lifeline.send(Started())
        worker = Zygote(lifeline).run()
    except PeerClosed:
        return 1
    if worker is None:
        return 0
    become_worker(worker)


if __name__ == "__main__":
    sys.exit(main())
