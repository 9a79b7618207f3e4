"""Where a worker's thread runs: on the cores of its instance, or for a while on the one of the producer it works for.

Why frontends ask for that stands in ``frontend/data_plane/core_sharing.py``; clients do it by the same reasons.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Placement:
    """Of the thread that uses it. Every method takes some microseconds and is called when a mode changes."""

    def __init__(self, *, is_movable: bool = True) -> None:
        """Begin where the thread is.

        Args:
            is_movable: False for who does not sleep while it waits: it would keep the producer from running.
        """
        self._home = os.sched_getaffinity(0) if is_movable else set[int]()
        self._host = -1
        self._core = -1

    def join(self, producer: int, core: int) -> None:
        """Run on the core of this producer. Ignored if it is none of the instance's cores."""
        self.leave()
        if core in self._home:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {core})
                self._host, self._core = producer, core

    def leave(self, producer: int | None = None) -> None:
        """Run anywhere again.

        Args:
            producer: only if it is the one to share a core with; None: whoever it is.
        """
        if self._core < 0 or producer not in (None, self._host):
            return
        shared = {self._core}
        self._core = self._host = -1
        # A thread begins where the one that starts it may run: those that the model has started meanwhile go free too.
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                if os.sched_getaffinity(int(task.name)) == shared:
                    os.sched_setaffinity(int(task.name), self._home)
