"""What every child process does first: take its name, die with its parent, ignore the terminal's signals."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

import setproctitle

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        # The parent died before prctl took effect.
        os._exit(1)


def set_name(role: str) -> None:
    """Show ``forebay: <role>`` in ps."""
    setproctitle.setproctitle(f"forebay: {role}")


def ignore_terminal_signals() -> None:
    """Leave SIGINT, SIGTERM and SIGHUP to the supervisor, which drains and then stops its children itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def allow_descriptors() -> int:
    """Take as many descriptors as the system lets us have; return how many."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
