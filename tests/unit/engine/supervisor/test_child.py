"""One child process of the supervisor."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any, NoReturn

import pytest

from forebay.engine.supervisor.child import Child
from forebay.ipc.scheduler_messages import SchedulerToSupervisor


def test_of_a_child_whose_end_could_not_be_noticed_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whoever started it may try again."""
    pids: list[int] = []

    def refuse(pid: int) -> NoReturn:
        pids.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def ignore(*_news: Any) -> None:
        pass

    async def start() -> None:
        fds = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="Too many open files"):
            Child("scheduler", "asyncio", SchedulerToSupervisor, on_message=ignore, on_exit=ignore)
        assert os.listdir("/proc/self/fd") == fds

    monkeypatch.setattr(os, "pidfd_open", refuse)
    asyncio.run(start())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
