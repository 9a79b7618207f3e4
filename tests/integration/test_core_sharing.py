"""Workers run on the core of the one client that waits for them, and anywhere again after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from forebay_server import ForebayServer
from http_models import write_identity

import forebay.client.shm

HOME = os.sched_getaffinity(0)
CORE = max(HOME)
VALUE = np.arange(4, dtype=np.float32)[np.newaxis]

pytestmark = pytest.mark.skipif(len(HOME) < 2, reason="needs two cores")


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    repository = tmp_path_factory.mktemp("shared")
    write_identity(repository, "m", [("TYPE_FP32", "4")], batch=8)
    with ForebayServer(repository) as running:
        yield running


def test_worker_comes_to_the_core_of_a_client_that_is_pinned_and_leaves_with_it(server: ForebayServer) -> None:
    worker = server.pid_of("worker m:1 m_0")

    def ask_until_shared() -> None:
        os.sched_setaffinity(0, {CORE})
        with forebay.client.shm.connect(server.runtime_base) as engine:
            model = engine.model("m")
            tensor = model.input("INPUT0", rows=1)

            def ask() -> bool:
                tensor[:] = VALUE
                np.testing.assert_array_equal(model.infer(), VALUE)
                return os.sched_getaffinity(worker) == {CORE}

            server.wait_for(ask, "the worker shares the client's core")

    with ThreadPoolExecutor(1) as thread:
        thread.submit(ask_until_shared).result()
    server.wait_for(lambda: os.sched_getaffinity(worker) == HOME, "the worker may run anywhere")
