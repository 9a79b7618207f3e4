"""Further instances in one worker process, each with a loop of its own in a thread (``--instances-per-process``)."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable

from forebay.ipc.log import log


class LoopThreads:
    """The loops of a process besides the first. Any of the loops may start another."""

    def __init__(self, run: Callable[[LoopThreads, list[int]], None]) -> None:
        """Start nothing yet.

        Args:
            run: runs one loop until its end; takes ownership of its descriptors and raises nothing.
        """
        self._run = run
        self._lock = threading.Lock()
        self._collecting = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, fds: list[int]) -> None:
        """Start a loop; takes ownership of its descriptors, whose other ends see theirs end if it cannot be started."""
        thread = threading.Thread(target=self._run_one, args=(fds,), name=name)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            try:
                thread.start()
            except RuntimeError as error:
                # Too many threads: that instance cannot be, and those that live here go on.
                log.error(f"worker {name} cannot be started: {error}")
                for fd in fds:
                    os.close(fd)
            else:
                self._threads.append(thread)

    def _run_one(self, fds: list[int]) -> None:
        self._run(self, fds)
        # Its model, its mappings and its descriptors go now: who is idle does not collect.
        self._collect()

    def _collect(self) -> None:
        # A collection that finds another one under way does nothing.
        with self._collecting:
            gc.collect()

    def join(self) -> None:
        """Wait until every loop has ended, those included that are started meanwhile. The first one has ended."""
        while True:
            with self._lock:
                running = [thread for thread in self._threads if thread.is_alive()]
            if not running:
                return
            self._collect()
            for thread in running:
                thread.join()
