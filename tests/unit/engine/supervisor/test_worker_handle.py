"""The supervisor's side of a worker: how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Generator

import pytest
from worker_harness import spec_from_config

from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.errors import Code, InvalidArgument
from forebay.ipc.lifeline import Lifeline
from forebay.ipc.messages import Failed, Stop
from forebay.ipc.worker_messages import MemoryClosed, MemoryDown, SupervisorToWorker

SPEC = spec_from_config({}, model="m", model_path="")


@contextlib.contextmanager
def process() -> Generator[subprocess.Popen[bytes]]:
    """A process that ends by itself when nobody needs it any more."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as running:
        yield running


def run(scenario: Callable[[WorkerHandle, WorkerHandle, int], None]) -> None:
    """Run with a worker that is just being forked, another one that it has adopted, and the process to be."""

    async def running() -> None:
        host, guest = (WorkerHandle(number, f"worker {number}", lambda _worker: None) for number in (1, 2))
        fds = os.memfd_create("done"), os.memfd_create("counters")
        host.note_process(*fds)
        assert host.adopt(guest)
        with process() as child:
            scenario(host, guest, child.pid)
        for worker in (host, guest):
            worker.note_exit(child.returncode)
        for fd in fds:
            os.close(fd)

    asyncio.run(running())


def is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def test_a_guest_that_is_given_up_before_the_fork_is_known_leaves_its_host_alone() -> None:
    def scenario(host: WorkerHandle, guest: WorkerHandle, pid: int) -> None:
        guest.give_up()
        host.note_pid(pid)
        assert is_running(pid)
        assert (guest.is_stopping, guest.pid) == (True, pid)

    run(scenario)


def test_a_guest_that_is_killed_before_the_fork_is_known_ends_the_process() -> None:
    def scenario(host: WorkerHandle, guest: WorkerHandle, pid: int) -> None:
        guest.kill()
        host.note_pid(pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    run(scenario)


def test_who_has_no_process_yet_is_gone_at_once() -> None:
    async def scenario() -> None:
        ended: list[int] = []
        worker = WorkerHandle(7, "worker 7", lambda gone: ended.append(gone.number))
        worker.give_up()
        assert ended == [7]

    asyncio.run(scenario())


def theirs(worker: WorkerHandle) -> Lifeline[SupervisorToWorker]:
    """Return a worker's own end of its lifeline; it has a process from now on."""
    _doorbell_fd, lifeline_fd = worker.child_fds
    end: Lifeline[SupervisorToWorker] = Lifeline(worker._child_lifeline.dup(), SupervisorToWorker)
    worker.note_process(lifeline_fd, lifeline_fd)
    return end


def test_whoever_gives_up_waiting_for_a_memory_to_be_closed_may_ask_again() -> None:
    async def scenario() -> None:
        worker = WorkerHandle(7, "worker 7", lambda _worker: None)
        lifeline = theirs(worker)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.close_memory(3, 1), 0.01)
        again = asyncio.create_task(worker.close_memory(3, 1))
        await asyncio.sleep(0)
        assert [message for message, _fds in lifeline.receive_nowait()] == 2 * [MemoryDown(owner=3, number=1)]
        lifeline.send(MemoryClosed(owner=3, number=1))
        await again
        lifeline.close()
        worker.note_exit(0)
        # Nobody has it open any more.
        await worker.close_memory(3, 1)

    asyncio.run(scenario())


def test_whoever_is_given_up_is_told_to_stop() -> None:
    async def scenario() -> None:
        worker = WorkerHandle(7, "worker 7", lambda _worker: None)
        lifeline = theirs(worker)
        worker.give_up()
        assert [type(message) for message, _fds in lifeline.receive_nowait()] == [Stop]
        lifeline.close()
        worker.note_exit(0)

    asyncio.run(scenario())


def test_reason_for_which_a_process_ended_is_heard_although_its_end_is_known_first() -> None:
    async def scenario() -> None:
        worker = WorkerHandle(7, "worker 7", lambda _worker: None)
        lifeline = theirs(worker)
        described = asyncio.create_task(worker.describe(SPEC))
        await asyncio.sleep(0)
        lifeline.send(Failed(code=int(Code.INVALID_ARG), text="input and output do not match"))
        lifeline.close()
        worker.note_exit(0)
        with pytest.raises(InvalidArgument, match="input and output do not match"):
            await described

    asyncio.run(scenario())
