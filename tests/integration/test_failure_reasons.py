"""Failed requests by reason, from every cause to the metrics page (spec M-021, S-185)."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from forebay_server import ForebayServer, wait_until
from http_models import metrics_page, write_identity

_FAILING = """
class TritonPythonModel:
    def execute(self, requests):
        raise ValueError("no")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("models")
    queue = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }"
    write_identity(models, "busy", [("TYPE_FP32", "1")], batch=1, delay_ms=400, extra=queue)
    late = "dynamic_batching { default_queue_policy { default_timeout_microseconds: 50000 } }"
    write_identity(models, "late", [("TYPE_FP32", "1")], batch=1, delay_ms=400, extra=late)
    write_identity(models, "left", [("TYPE_FP32", "1")], batch=1, delay_ms=400, extra="dynamic_batching { }")
    directory = models / "failing"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(_FAILING)
    (directory / "config.pbtxt").write_text(
        'backend: "python"\nmax_batch_size: 1\ninput { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] }\n'
    )
    with ForebayServer(models) as server:
        yield server


def _open(server: ForebayServer, model: str) -> http.client.HTTPConnection:
    body: dict[str, Any] = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
    return connection


def _status(connection: http.client.HTTPConnection) -> int:
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def _reasons(server: ForebayServer, model: str) -> dict[str, int]:
    found = re.findall(
        rf'^nv_inference_request_failure{{model="{model}",reason="(\w+)",version="1"}} (\d+)$',
        metrics_page(server),
        re.MULTILINE,
    )
    return {reason: int(count) for reason, count in found}


NONE = {"OTHER": 0, "BACKEND": 0, "REJECTED": 0, "CANCELED": 0}


def test_a_model_that_raises_is_the_backend(server: ForebayServer) -> None:
    assert _reasons(server, "failing") == NONE
    assert _status(_open(server, "failing")) == 500
    assert _reasons(server, "failing") == {**NONE, "BACKEND": 1}


def test_a_full_queue_rejects(server: ForebayServer) -> None:
    """S-025: one runs, one waits, the third finds no place."""
    statuses: list[int] = []
    threads = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: statuses.append(_status(_open(server, "busy"))))
        thread.start()
        threads.append(thread)
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 200, 503, 503]
    assert _reasons(server, "busy") == {**NONE, "REJECTED": 2}


def test_a_timeout_in_the_queue_rejects(server: ForebayServer) -> None:
    """S-026."""
    first = _open(server, "late")
    time.sleep(0.1)
    assert _status(_open(server, "late")) == 503
    assert _status(first) == 200
    assert _reasons(server, "late") == {**NONE, "REJECTED": 1}


def test_a_client_that_leaves_cancels(server: ForebayServer) -> None:
    """H-016, S-033: its request waits behind another, and is dropped."""
    first = _open(server, "left")
    time.sleep(0.1)
    leaving = _open(server, "left")
    # Reset: who only ends its sending is still answered for a moment.
    leaving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.05)
    leaving.close()
    assert _status(first) == 200
    wait_until(lambda: _reasons(server, "left") == {**NONE, "CANCELED": 1}, "the cancelled request to be counted")


def test_what_never_was_a_request_is_counted_nowhere(server: ForebayServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    connection.request("POST", "/v2/models/failing/infer", "{}")
    before = _reasons(server, "failing")
    assert _status(connection) == 500
    assert _reasons(server, "failing") == before
