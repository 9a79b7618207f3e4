"""The threads in which the supervisor reads files, so that its event loop waits for no disk."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class FileThreads(ThreadPoolExecutor):
    """An event loop's default executor whose end waits for nothing that is under way.

    A look at a very large repository, a download from a cloud or a file system that does not answer may take minutes,
    and a thread cannot be cancelled. The threads are daemons, and so end with the process.
    """

    def __init__(self, count: int) -> None:
        """Start no thread yet.

        Args:
            count: threads at most; each costs memory that does not come back.
        """
        super().__init__(count)
        self._count = count
        self._started = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(0)

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function as soon as a thread is free; call from one thread only."""
        future: Future[_T] = Future()
        self._jobs.put(functools.partial(_run, future, functools.partial(function, *args, **kwargs)))
        if not self._free.acquire(blocking=False) and self._started < self._count:
            threading.Thread(target=self._work, name=f"files_{self._started}", daemon=True).start()
            self._started += 1
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Have idle threads end; wait for none."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._free.release()


def _run(future: Future[_T], function: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
