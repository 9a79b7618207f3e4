"""Processes killed under load: nothing is lost that the design does not allow, nothing hangs, no row leaks.

A request whose worker dies is tried once more; a request whose scheduler dies is handed in again; only a frontend
takes its own connections along.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from forebay_server import ForebayServer, wait_until
from scheduling_models import add_fault_model, add_stream_model

CLIENTS = 12
EXIT, DELAY = -3.0, -1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    """Rows with and without grants, parcels."""
    root: Path = tmp_path_factory.mktemp("models")
    add_fault_model(root, "granted", "dynamic_batching { }", count=2, delay_ms=3)
    add_fault_model(root, "delayed", "dynamic_batching { max_queue_delay_microseconds: 2000 }", count=2, delay_ms=3)
    add_fault_model(
        root, "parcels", "dynamic_batching { default_queue_policy { max_queue_size: 1000 } }", count=2, delay_ms=3
    )
    add_stream_model(root, "stream")
    # A request may kill two.
    add_fault_model(root, "poisoned", "dynamic_batching { max_queue_delay_microseconds: 2000 }", count=3, delay_ms=3)
    with ForebayServer(root, environment={"FOREBAY_TEST_BACKENDS": "1"}) as running:
        yield running


def infer(connection: http.client.HTTPConnection, model: str, value: float) -> tuple[int, str]:
    """Send one request; return the status, and the error or nothing."""
    body = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 1], "data": [value]}]})
    connection.request("POST", f"/v2/models/{model}/infer", body)
    reply = connection.getresponse()
    answer = json.loads(reply.read() or b"{}")
    if reply.status == 200:
        data = answer["outputs"][0]["data"]
        return 200, "" if data == [np.float32(value)] else f"answered {data} to {value}"
    return reply.status, str(answer.get("error", ""))


class Load:
    """Clients that ask one thing after the other, each with numbers of its own."""

    def __init__(self, server: ForebayServer, model: str, clients: int) -> None:
        self.outcomes: Counter[tuple[int, str]] = Counter()
        self._server, self._model = server, model
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def _run(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.http_port, timeout=30)
        step = 0
        while not self._stop.is_set():
            step += 1
            # Every fourth takes a while, so that there is always something running.
            value = DELAY if step % 4 == 0 else float(number * 10_000 + step % 10_000)
            try:
                outcome = infer(connection, self._model, value)
            except (http.client.HTTPException, OSError) as error:
                outcome = (0, type(error).__name__)
                connection.close()
                time.sleep(0.05)
            with self._lock:
                self.outcomes[outcome] += 1
        connection.close()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in self._threads), "a client waits for ever"


@contextmanager
def load(server: ForebayServer, model: str, clients: int = CLIENTS) -> Iterator[Load]:
    running = Load(server, model, clients)
    running.start()
    try:
        wait_until(lambda: running.outcomes[200, ""] > 20, "the first answers")
        yield running
        # It goes on after what happened.
        answered = running.outcomes[200, ""]
        wait_until(lambda: running.outcomes[200, ""] > answered + 50, "further answers")
    finally:
        running.stop()


def kill(server: ForebayServer, role: str) -> None:
    """Kill a process and wait for the one in its place."""
    killed = server.pid_of(role)
    os.kill(killed, signal.SIGKILL)
    server.wait_for(lambda: server.pid_of(role) not in (0, killed), f"a new {role}")


def rows_in_use(server: ForebayServer, model: str) -> float:
    """Return rows of slabs and bytes of blocks that hold requests of the model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=20) as reply:
        lines = reply.read().decode().splitlines()
    names = ("forebay_slab_rows_in_use{", "forebay_block_bytes")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names) and f'"{model}"' in line)


def assert_nothing_left(server: ForebayServer, *models: str) -> None:
    for model in models:
        wait_until(lambda model=model: rows_in_use(server, model) == 0, f"all room of {model} to be free")  # type: ignore[misc]


MODELS = ["granted", "delayed", "parcels"]


@pytest.mark.parametrize("clients", [1, CLIENTS])
@pytest.mark.parametrize("model", MODELS)
def test_killed_workers_lose_no_request(server: ForebayServer, model: str, clients: int) -> None:
    with load(server, model, clients) as running:
        for number in (0, 1):
            kill(server, f"worker {model}:1 {model}_0_{number}")
            answered = running.outcomes[200, ""]
            wait_until(lambda answered=answered: running.outcomes[200, ""] > answered + 20, "answers")  # type: ignore[misc]
    assert set(running.outcomes) == {(200, "")}
    assert_nothing_left(server, model)


@pytest.mark.parametrize("clients", [1, CLIENTS])
@pytest.mark.parametrize("model", MODELS)
def test_killed_scheduler_loses_no_request(server: ForebayServer, model: str, clients: int) -> None:
    with load(server, model, clients) as running:
        for _ in range(2):
            kill(server, "scheduler")
            answered = running.outcomes[200, ""]
            wait_until(lambda answered=answered: running.outcomes[200, ""] > answered + 20, "answers")  # type: ignore[misc]
    assert set(running.outcomes) == {(200, "")}
    assert_nothing_left(server, model)


def test_scheduler_and_worker_killed_together(server: ForebayServer) -> None:
    with load(server, "delayed") as running:
        os.kill(server.pid_of("worker delayed:1 delayed_0_0"), signal.SIGKILL)
        kill(server, "scheduler")
    # A batch that the dead scheduler had given to the dead worker is handed in again like all others.
    assert set(running.outcomes) == {(200, "")}
    assert_nothing_left(server, "delayed")


def test_killed_frontend_takes_only_its_connections_along(server: ForebayServer) -> None:
    with load(server, "granted") as running:
        kill(server, "http 0")
    failures = {outcome for outcome in running.outcomes if outcome != (200, "")}
    assert {status for status, _text in failures} <= {0}
    assert sum(running.outcomes[outcome] for outcome in failures if outcome[1] != "ConnectionRefusedError") <= CLIENTS
    assert_nothing_left(server, *MODELS)


def stream(server: ForebayServer, count: int, events: list[dict[str, object]]) -> threading.Thread:
    """Ask the decoupled model for ``count`` answers; they are put into ``events`` as they come."""

    def run() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
        connection.request("POST", "/v2/models/stream/generate_stream", json.dumps({"X": count}))
        reply = connection.getresponse()
        while line := reply.readline():
            if line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
        connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: len(events) > 3, "the first answers")
    return thread


def test_stream_outlives_the_scheduler(server: ForebayServer) -> None:
    """The model answers long after its batch: the new scheduler learns of it and does not have it run again."""
    events: list[dict[str, object]] = []
    thread = stream(server, 100, events)
    kill(server, "scheduler")
    thread.join(40)
    assert [event.get("Y") for event in events] == list(range(100))
    assert_nothing_left(server, "stream")


def test_stream_ends_with_its_worker(server: ForebayServer) -> None:
    """No answer may come twice, so the request cannot be tried again."""
    events: list[dict[str, object]] = []
    thread = stream(server, 1000, events)
    kill(server, "worker stream")
    thread.join(40)
    assert not thread.is_alive()
    *answers, last = events
    assert [event.get("Y") for event in answers] == list(range(len(answers)))
    assert "ended unexpectedly before its last response" in str(last.get("error"))
    assert_nothing_left(server, "stream")


def test_request_that_kills_workers_fails_alone(server: ForebayServer) -> None:
    """It was in a batch with others; tried again each by itself, they succeed."""
    with load(server, "poisoned") as running:
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
        status, text = 200, ""
        while status == 200:
            # It bites only as the first of its batch.
            status, text = infer(connection, "poisoned", EXIT)
        connection.close()
    assert status == 500
    assert "ended unexpectedly while it ran the request, and so did the one that tried it again" in text
    assert set(running.outcomes) == {(200, "")}
    assert_nothing_left(server, "poisoned")
