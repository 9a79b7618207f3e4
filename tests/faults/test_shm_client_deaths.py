"""Processes of the server that die while clients use them: requests are run again, or fail once, cleanly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer, wait_until
from shm_models import serve, write_models

import forebay.client.shm
from forebay.client.shm import Engine

ALPHA = "worker alpha_model:2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    with serve(write_models(tmp_path_factory.mktemp("shm") / "models", instances=1)) as running:
        yield running


@pytest.fixture
def engine(server: ForebayServer) -> Iterator[Engine]:
    with forebay.client.shm.connect(server.runtime_base) as connected:
        yield connected


def kill(server: ForebayServer, role: str) -> int:
    """Kill a process; return its pid."""
    pid = server.pid_of(role)
    assert pid
    os.kill(pid, signal.SIGKILL)
    return pid


def wait_replaced(server: ForebayServer, role: str, pid: int) -> None:
    server.wait_for(lambda: server.pid_of(role) not in (0, pid), f"a new {role}")


def answer_of(engine: Engine, value: float) -> float:
    model = engine.model("alpha_model")
    model.input("features", rows=1)[:] = value
    return float(model.infer(timeout_s=PATIENCE_S)[0, 0])


def test_a_killed_worker_is_replaced_and_may_be_rung_again(server: ForebayServer, engine: Engine) -> None:
    model = engine.model("alpha_model")
    model.input("features", rows=1)[:] = 0.5
    wait_until(lambda: model.infer() is not None and engine.connection.grant_count > 0, "a grant")
    before = float(model.infer()[0, 0])
    pid = kill(server, ALPHA)
    wait_replaced(server, ALPHA, pid)

    def answers() -> bool:
        try:
            return float(model.infer(timeout_s=PATIENCE_S)[0, 0]) == before
        except forebay.client.shm.ServingError:
            return False  # Nobody has taken its place yet.

    wait_until(answers, "an answer of the new worker")
    wait_until(lambda: answers() and engine.connection.grant_count > 0, "a grant of the new worker")


@pytest.mark.parametrize("role", [ALPHA, "scheduler"])
def test_requests_in_flight_survive(server: ForebayServer, engine: Engine, role: str) -> None:
    """What was lost is handed in again; nothing is answered twice, or with another request's answer."""
    server.wait_for(lambda: server.pid_of(ALPHA) != 0, "a worker")
    model = engine.model("alpha_model")
    values = np.linspace(0, 1, 20)
    wanted = [answer_of(engine, value) for value in values]
    futures = []
    for index in range(400):
        model.input("features", rows=1)[:] = values[index % 20]
        futures.append(model.submit())
        if index == 200:
            pid = kill(server, role)
    wrong = failed = 0
    for index, future in enumerate(futures):
        try:
            wrong += abs(float(future.result(timeout_s=PATIENCE_S)[0, 0]) - wanted[index % 20]) > 1e-6
        except forebay.client.shm.ServingError:
            failed += 1
    assert wrong == 0
    # Without any worker there is nobody to hand a request to; without a scheduler, it waits.
    assert failed == 0 or role == ALPHA
    wait_replaced(server, role, pid)
    server.wait_for(lambda: server.pid_of(ALPHA) != 0, "a worker")


def test_a_parcel_in_flight_survives_the_scheduler(server: ForebayServer, engine: Engine) -> None:
    model = engine.model("slow")
    futures = []
    for value in range(3):
        model.input("INPUT0")[:] = value
        futures.append(model.submit())
    pid = kill(server, "scheduler")
    assert [future.result(timeout_s=PATIENCE_S).tolist() for future in futures] == [[v] * 4 for v in range(3)]
    wait_replaced(server, "scheduler", pid)


def test_a_grant_does_not_outlive_its_scheduler(server: ForebayServer, engine: Engine) -> None:
    model = engine.model("alpha_model")
    model.input("features", rows=1)[:] = 0.5
    wait_until(lambda: model.infer() is not None and engine.connection.grant_count > 0, "a grant")
    before = float(model.infer()[0, 0])
    pid = kill(server, "scheduler")
    for _ in range(200):
        assert float(model.infer(timeout_s=PATIENCE_S)[0, 0]) == before
    wait_replaced(server, "scheduler", pid)
    with forebay.client.shm.connect(server.runtime_base) as other:
        assert answer_of(other, 0.5) == pytest.approx(before)


def test_a_stopping_server_says_so(server: ForebayServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve(write_models(tmp_path_factory.mktemp("stopping") / "models")) as stopping:
        engine = forebay.client.shm.connect(stopping.runtime_base)
        model = engine.model("alpha_model")
        model.input("features", rows=1)[:] = 0.5
        model.infer()
        assert stopping.stop() == 0
        with pytest.raises(forebay.client.shm.Unavailable):
            model.infer(timeout_s=PATIENCE_S)
        engine.close()
