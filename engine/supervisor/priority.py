"""Which worker goes first on the CPU: the models' own priorities, and how little loading and ending disturb others.

What an update costs is CPU time that requests would wait for. Under the kernel's idle policy a worker gets what serving
processes leave, and is interrupted by them at once. Going back to the usual policy takes CAP_SYS_NICE or a RLIMIT_NICE
of 20; where the supervisor has neither, updates are loaded at the usual priority.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping

from forebay.ipc.time_slices import LARGER_SHARE_NICE

#: How long a worker loads on what others leave, s; then with its share, so that an update gets done on a full machine.
QUIET_LOAD_S = 5.0

#: Nice value of a worker that has nothing to do but to end.
_LAST_NICE = 19

#: Nice values of models with ``optimization.priority``, against those without (spec C-051; Triton's are 0, 19 and 5).
_MODEL_NICE = {"MAX": -5, "MIN": 14}

_USUAL = os.sched_param(0)


@functools.cache
def can_go_back() -> bool:
    """Whether this process may give another, or itself, the usual policy again."""
    tried: list[bool] = []

    def try_it() -> None:
        # A thread has a policy of its own, and this one ends here.
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, _USUAL)
            os.sched_setscheduler(0, os.SCHED_OTHER, _USUAL)
        except OSError:
            tried.append(False)
        else:
            tried.append(True)

    thread = threading.Thread(target=try_it, name="priority")
    thread.start()
    thread.join()
    return tried[0]


def lower(pid: int) -> bool:
    """Give a process what others leave, until :func:`restore`; False where that could not be undone."""
    if not can_go_back():
        return False
    _set_policy(pid, os.SCHED_IDLE)
    return True


def restore(pid: int) -> None:
    """Give a process, and what it has started meanwhile, the usual policy again."""
    _set_policy(pid, os.SCHED_OTHER)


def let_others_first(pid: int) -> None:
    """A process is about to end: freeing its memory can wait."""
    _set_nice(pid, _LAST_NICE)


def follow_model(pid: int, model_priority: str) -> None:
    """Give a process the priority of its model: ``MAX``, ``MIN`` or ``DEFAULT``; MAX needs CAP_SYS_NICE."""
    if (nice := _MODEL_NICE.get(model_priority)) is not None:
        _set_nice(pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)


def enlarge_share(pid: int) -> dict[int, int]:
    """Give a process more of cores that others want, where that is allowed (CAP_SYS_NICE).

    Returns:
        By thread, its nice value until now.
    """
    before: dict[int, int] = {}
    for thread in _threads(pid):
        # Not allowed, or one that has just ended.
        with contextlib.suppress(OSError):
            before[thread] = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, before[thread] + LARGER_SHARE_NICE)
    return before


def restore_share(pid: int, before: Mapping[int, int]) -> None:
    """Undo :func:`enlarge_share`, which returned ``before``; threads started since get what the first one had."""
    for thread in _threads(pid):
        if (nice := before.get(thread, before.get(pid))) is not None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, nice)


def _set_nice(pid: int, nice: int) -> None:
    for thread in _threads(pid):
        # Not allowed, or one that has just ended.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, nice)


def _set_policy(pid: int, policy: int) -> None:
    done: set[int] = set()
    # Those that were started meanwhile have the policy of whoever started them: until there is none.
    while new := set(_threads(pid)) - done:
        for thread in new:
            # One that has just ended.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread, policy, _USUAL)
        done |= new


def _threads(pid: int) -> Iterator[int]:
    """Yield the threads of a process, and those of the processes that it has started, a Python model's for example."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/task"):
            yield int(name)
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{name}/children") as children:
                for child in children.read().split():
                    yield from _threads(int(child))
