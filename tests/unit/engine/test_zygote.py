"""A zygote that cannot fork goes on: its other workers live from it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import Any, NoReturn

import pytest

from forebay.engine.zygote import Zygote, has_opened_gpu
from forebay.ipc.lifeline import Lifeline
from forebay.ipc.messages import Message, Stop
from forebay.ipc.worker_messages import Fork, SupervisorToZygote, WorkerExited, ZygoteToSupervisor


def refuse(*_arguments: Any) -> NoReturn:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def replies_to(request: Message, fds: tuple[int, ...]) -> list[Any]:
    """Return what a zygote says to a request, and that it ends when it is told to."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        supervisor: Lifeline[ZygoteToSupervisor] = Lifeline(theirs, ZygoteToSupervisor)
        supervisor.send(request, fds)
        supervisor.send(Stop())
        assert Zygote(Lifeline(ours, SupervisorToZygote)).run() is None
        return [message for message, _fds in supervisor.receive_nowait()]


def test_a_worker_that_cannot_be_forked_has_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fork", refuse)
    worker, supervisor = socket.socketpair()
    with worker, supervisor:
        assert replies_to(Fork(instance=7, name="m:1 #0"), (worker.fileno(),) * 4) == [
            WorkerExited(instance=7, pid=0, exit_code=os.EX_OSERR)
        ]
        worker.close()
        # Nobody else holds an end of the worker's any more.
        assert supervisor.recv(1) == b""
    assert "worker m:1 #0 cannot be forked: Resource temporarily unavailable" in capfd.readouterr().err


def test_a_worker_whose_end_could_not_be_noticed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(os, "fork", lambda: child.pid)
        monkeypatch.setattr(os, "pidfd_open", refuse)
        (message,) = replies_to(Fork(instance=7, name="m:1 #0"), ())
        assert message == WorkerExited(instance=7, pid=0, exit_code=os.EX_OSERR)
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


def test_a_gpu_that_was_opened_before_the_fork_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_opened_gpu()
    monkeypatch.setattr(os, "readlink", lambda path: "/dev/nvidiactl" if path.endswith("/2") else "pipe:[1]")
    assert has_opened_gpu()
