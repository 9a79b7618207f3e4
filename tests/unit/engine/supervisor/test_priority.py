"""Processes that load or end without disturbing others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from forebay.engine.supervisor import priority

#: Starts a thread whenever it reads a line, and says so.
_CHILD = """
import sys, threading
for line in sys.stdin:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    print(flush=True)
"""

#: Starts a process that ends when its own standard input does, and says which.
_PARENT = """
import subprocess, sys
with subprocess.Popen([sys.executable, "-c", "input()"]) as process:
    print(process.pid, flush=True)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        start_thread(process)
        yield process
        process.kill()


def start_thread(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "\n"


def threads(process: subprocess.Popen[str]) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]


def policies(process: subprocess.Popen[str]) -> set[int]:
    return {os.sched_getscheduler(thread) for thread in threads(process)}


def test_every_thread_goes_back_to_the_usual_policy(child: subprocess.Popen[str]) -> None:
    if not priority.can_go_back():
        assert not priority.lower(child.pid)
        assert policies(child) == {os.SCHED_OTHER}
        pytest.skip("the system lets nobody undo it here, and so it is not done")
    assert priority.lower(child.pid)
    start_thread(child)
    assert len(threads(child)) == 3
    assert policies(child) == {os.SCHED_IDLE}
    priority.restore(child.pid)
    assert policies(child) == {os.SCHED_OTHER}


def test_a_thread_that_is_started_meanwhile_is_not_forgotten(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not priority.can_go_back():
        pytest.skip("the system lets nobody undo it here")
    priority.lower(child.pid)
    set_scheduler, started = os.sched_setscheduler, iter([True])

    def set_and_start(thread: int, policy: int, parameters: os.sched_param) -> None:
        if next(started, False):
            start_thread(child)
        set_scheduler(thread, policy, parameters)

    monkeypatch.setattr(os, "sched_setscheduler", set_and_start)
    priority.restore(child.pid)
    assert len(threads(child)) == 3
    assert policies(child) == {os.SCHED_OTHER}


def test_a_process_that_was_started_meanwhile_is_not_forgotten() -> None:
    """A Python model may start some when it is loaded, and a copy with shared weights is made by one."""
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        priority.let_others_first(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, grandchild) == 19


def test_trying_changes_nothing_for_this_process() -> None:
    priority.can_go_back()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_process_that_ends_lets_others_first(child: subprocess.Popen[str]) -> None:
    priority.let_others_first(child.pid)
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)} == {19}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_larger_share_is_given_back_by_every_thread(child: subprocess.Popen[str]) -> None:
    first, second = threads(child)
    os.setpriority(os.PRIO_PROCESS, first, 1)
    os.setpriority(os.PRIO_PROCESS, second, 7)
    before = priority.enlarge_share(child.pid)
    start_thread(child)
    assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)] == [-4, 2, -4]
    priority.restore_share(child.pid, before)
    assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)] == [1, 7, 1]


def test_a_larger_share_that_is_not_allowed_changes_nothing(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_priority = os.setpriority

    def set_unless_raised(which: int, who: int, nice: int) -> None:
        if nice < os.getpriority(which, who):
            raise PermissionError
        set_priority(which, who, nice)

    monkeypatch.setattr(os, "setpriority", set_unless_raised)
    usual = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)]
    priority.restore_share(child.pid, priority.enlarge_share(child.pid))
    assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads(child)] == usual


def test_a_process_that_is_gone_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    priority.restore(process.pid)
    priority.let_others_first(process.pid)
    priority.restore_share(process.pid, priority.enlarge_share(process.pid))
