"""Where a worker's thread runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from forebay_server import wait_until
from worker_harness import PRODUCER, WorkerHarness, spec_from_config

from forebay.engine.worker.placement import Placement
from forebay.ipc.wire import HEADER, Kind

HOME = os.sched_getaffinity(0)
CORE = min(HOME)
HOST = 3
CONFIG = {
    "backend": "identity",
    "max_batch_size": 8,
    "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [4]}],
    "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [4]}],
}

pytestmark = pytest.mark.skipif(len(HOME) < 2, reason="needs two cores")


def in_thread(scenario: Callable[[Placement], None]) -> None:
    """The cores of pytest's own thread stay."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: scenario(Placement())).result()


def test_joins_a_frontend_until_that_one_lets_it_go() -> None:
    def scenario(placement: Placement) -> None:
        placement.join(HOST, CORE)
        assert os.sched_getaffinity(0) == {CORE}
        placement.leave(HOST + 1)
        assert os.sched_getaffinity(0) == {CORE}
        placement.leave(HOST)
        assert os.sched_getaffinity(0) == HOME

    in_thread(scenario)


def test_core_that_is_not_the_instances_is_not_taken() -> None:
    def scenario(placement: Placement) -> None:
        placement.join(HOST, max(HOME) + 1)
        assert os.sched_getaffinity(0) == HOME

    in_thread(scenario)


def test_who_does_not_sleep_while_it_waits_stays() -> None:
    def scenario(_placement: Placement) -> None:
        Placement(is_movable=False).join(HOST, CORE)
        assert os.sched_getaffinity(0) == HOME

    in_thread(scenario)


def test_threads_that_the_model_started_meanwhile_go_free_too() -> None:
    def scenario(placement: Placement) -> None:
        placement.join(HOST, CORE)
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        assert thread.native_id is not None
        try:
            assert os.sched_getaffinity(thread.native_id) == {CORE}
            placement.leave()
            assert os.sched_getaffinity(thread.native_id) == HOME
        finally:
            done.set()
            thread.join()

    in_thread(scenario)


@pytest.mark.parametrize("end", ["let go", "its frontend dies"])
def test_worker_does_what_a_frontend_asks_and_is_free_after_it(end: str) -> None:
    with WorkerHarness(spec_from_config(CONFIG, model="m", model_path="")) as worker:

        def cores() -> set[int]:
            return os.sched_getaffinity(worker.process.pid)

        worker.send_raw(HEADER.pack(Kind.PLACE, 0, 0, PRODUCER, CORE + 1))
        wait_until(lambda: cores() == {CORE}, "the worker shares the core")
        if end == "let go":
            worker.send_raw(HEADER.pack(Kind.PLACE, 0, 0, PRODUCER, 0))
        else:
            worker.drop_producer()
        wait_until(lambda: cores() == HOME, "the worker is free")
