"""Further loops of a worker process."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

from forebay.engine.worker.loop_threads import LoopThreads


def close_all(_threads: LoopThreads, fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_join_waits_for_loops_that_others_start() -> None:
    ended: list[str] = []

    def run(threads: LoopThreads, _fds: list[int]) -> None:
        if not ended:
            ended.append("first")
            threads.start("second", [])
        else:
            ended.append("second")

    threads = LoopThreads(run)
    threads.start("first", [])
    threads.join()
    assert ended == ["first", "second"]


class Knot:
    """What only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_what_a_loop_leaves_behind_is_freed_while_others_go_on() -> None:
    left: list[weakref.ref[Knot]] = []
    freed = threading.Event()

    def run(_threads: LoopThreads, fds: list[int]) -> None:
        if fds:
            close_all(_threads, fds)
            left.append(weakref.ref(Knot(), lambda _gone: freed.set()))
        else:
            assert freed.wait(60)

    gc.disable()
    try:
        threads = LoopThreads(run)
        threads.start("goes on", [])
        threads.start("ends", list(os.pipe()))
        threads.join()
    finally:
        gc.enable()
    assert left[0]() is None


def test_a_loop_that_cannot_be_started_is_seen_to_end_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = LoopThreads(close_all)
    ours, theirs = os.pipe()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        threads.start("m:1 #1", [theirs])
    assert os.read(ours, 1) == b""
    threads.start("m:1 #2", [ours])
    threads.join()
    assert "worker m:1 #1 cannot be started: can't start new thread" in capfd.readouterr().err
