"""A worker as a process: its instances, each a loop, from the fork to the end.

Runs in a process forked from a zygote. One loop is the main thread's; with ``--instances-per-process`` there may be
more, each in a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from typing import NoReturn

from forebay.engine.worker.loop import Worker
from forebay.engine.worker.loop_threads import LoopThreads
from forebay.ipc.counters import CountersFile
from forebay.ipc.doorbell import Bell
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.worker_messages import SupervisorToWorker


def run_worker(lifeline: socket.socket, doorbell: socket.socket, done: socket.socket, counters_fd: int) -> NoReturn:
    """Run one worker in this (forked) process; never returns. Takes ownership of all four."""
    status = 1
    try:
        siblings = LoopThreads(_run_sibling)
        status = _run_loop(lifeline, doorbell, done, counters_fd, siblings)
        # Instances that were adopted may outlive the first.
        siblings.join()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        status = 1
    finally:
        _end_process(status)


def _run_sibling(siblings: LoopThreads, fds: list[int]) -> None:
    try:
        doorbell_fd, done_fd, lifeline_fd, counters_fd = fds
        lifeline, doorbell, done = (socket.socket(fileno=fd) for fd in (lifeline_fd, doorbell_fd, done_fd))
        _run_loop(lifeline, doorbell, done, counters_fd, siblings)
    except BaseException:
        # What broke one loop may have broken what all of them share.
        traceback.print_exc(file=sys.stderr)
        _end_process(1)


def _run_loop(
    lifeline: socket.socket, doorbell: socket.socket, done: socket.socket, counters_fd: int, siblings: LoopThreads
) -> int:
    """Run one instance until its end. Takes ownership of all descriptors; returns the exit code of its process."""
    status = 0
    with lifeline, doorbell, done:
        counters = CountersFile(counters_fd)
        os.close(counters_fd)
        worker = Worker(Lifeline(lifeline, SupervisorToWorker), doorbell, Bell(done), counters, siblings)
        try:
            if worker.prepare():
                worker.serve()
        except PeerClosed:
            status = 1
        worker.close()
        os.close(counters.fd)
    return status


def _end_process(status: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    # The frameworks' exit handlers are not needed here, and some crash in a forked process.
    os._exit(status)
