"""The scheduler process: sockets around :class:`SchedulerCore`. ``python -m forebay.engine.scheduler.loop``.

One thread, one epoll: read whatever has arrived, then let the core decide, then sleep until something happens or an
alarm goes off.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket
import sys
import time
import traceback

import msgspec
import zmq

from forebay.engine.scheduler.core import SchedulerCore
from forebay.engine.scheduler.timer import Timer
from forebay.ipc.channel import SubmitReceiver
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.messages import Started
from forebay.ipc.process import ignore_terminal_signals, set_name
from forebay.ipc.scheduler_messages import InstanceDown, SchedulerStart, SupervisorToScheduler
from forebay.ipc.time_slices import ask_for_short_slices

#: Doorbell messages from workers are a header, times and the requests that are not answered yet.
_DONE_BYTES_MAX = 192 * 1024

#: How often to try again to ring producers whose doorbells are full, s.
_LAGGING_RETRY_S = 0.05


class Scheduler:
    """The loop. ``run`` returns when the supervisor says stop."""

    def __init__(self, lifeline: Lifeline[SupervisorToScheduler]) -> None:
        self._lifeline = lifeline
        self._timer = Timer()
        self._epoll = select.epoll()
        self.core = SchedulerCore(lifeline.send, self._epoll)
        self._done: socket.socket | None = None
        self._submit: SubmitReceiver | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            PeerClosed: the supervisor is gone.
        """
        message, fds = self._lifeline.receive()
        if not isinstance(message, SchedulerStart):
            raise PeerClosed("the first message must be SchedulerStart")
        self._start(message, fds[0])
        assert self._done is not None
        assert self._submit is not None
        lifeline_fd, done_fd = self._lifeline.fileno(), self._done.fileno()
        submit_fd, timer_fd = self._submit.fileno(), self._timer.fileno()
        for fd in (lifeline_fd, done_fd, submit_fd, timer_fd):
            self._epoll.register(fd, select.EPOLLIN)
        self._lifeline.send(Started())
        core, poll = self.core, self._epoll.poll
        while not core.is_stopping:
            for fd, _events in poll(_LAGGING_RETRY_S if core.has_lagging else -1):
                if fd == done_fd:
                    self._read_done()
                elif fd == lifeline_fd:
                    self._read_lifeline()
                elif fd == timer_fd:
                    self._timer.acknowledge()
                    core.wake(time.monotonic_ns())
                elif fd == submit_fd:
                    self._read_submissions()
                else:
                    core.clients.read(fd)
            while core.has_to_decide:
                self._timer.set(core.decide(time.monotonic_ns()))
            if core.has_lagging:
                core.flush_lagging()

    def _start(self, start: SchedulerStart, done_fd: int) -> None:
        self._done = socket.socket(fileno=done_fd)
        self._done.setblocking(False)
        self._submit = SubmitReceiver(self._context, start.runtime_directory)
        self.core.start(start)

    def _read_lifeline(self) -> None:
        for message, fds in self._lifeline.receive_nowait():
            if isinstance(message, InstanceDown):
                # What the dead worker had finished is in the done doorbell, and must not be taken for lost.
                self._read_done()
            self.core.handle(message, fds, time.monotonic_ns())

    def _read_submissions(self) -> None:
        assert self._submit is not None
        # The descriptor does not signal again for what is left unread.
        has_more = True
        while has_more:
            try:
                message = self._submit.receive_nowait()
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                print(f"forebay scheduler: dropped a malformed submission: {error}", file=sys.stderr)
            else:
                if message is None:
                    return
                self.core.accept(message)
            has_more = self._submit.has_more

    def _read_done(self) -> None:
        assert self._done is not None
        receive = self._done.recv
        now_ns = time.monotonic_ns()
        while True:
            try:
                message = receive(_DONE_BYTES_MAX)
            except BlockingIOError:
                return
            if not message:
                return
            self.core.take_done(message, now_ns)

    def close(self) -> None:
        self.core.close()
        self._timer.close()
        if self._submit is not None:
            self._submit.close()
        self._context.term()


def main() -> int:
    """Entry of the scheduler process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline-fd", type=int, required=True)
    arguments = parser.parse_args()
    set_name("scheduler")
    ignore_terminal_signals()
    ask_for_short_slices()
    lifeline: Lifeline[SupervisorToScheduler] = Lifeline(
        socket.socket(fileno=arguments.lifeline_fd), SupervisorToScheduler
    )
    scheduler = Scheduler(lifeline)
    try:
        scheduler.run()
    except PeerClosed:
        return 1
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return 1
    with contextlib.suppress(zmq.ZMQError):
        scheduler.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
