"""Quiet models beside a crowded one: every answer is its own request's (issue 4).

Whoever reads a connection first, and whichever frontend it is with.
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from forebay_server import ForebayServer
from http_models import wait_nothing_in_use, write_identity
from http_wire import WireClient, infer

CROWD, TOGETHER, QUIET, ROUNDS = 6, 12, 4, 500


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    repository = tmp_path_factory.mktemp("crowd")
    for number in range(QUIET + 1):
        write_identity(repository, f"m{number}", [("TYPE_FP32", "4")], batch=8)
    with ForebayServer(repository) as running:
        yield running


def request(model: int, value: float) -> tuple[bytes, bytes]:
    """Return a request and the tensor that its answer ends with."""
    data = struct.pack("<4f", value, 1, 2, 3)
    return infer(f"m{model}", [("INPUT0", "FP32", (1, 4), data)]), data


def crowd(port: int, is_over: threading.Event) -> int:
    """Send several requests at once on each connection before reading from any, again and again."""
    count = 0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WireClient(port)) for _ in range(CROWD)]
        while not is_over.is_set():
            asked = [[request(0, count + index) for index in range(TOGETHER)] for _ in clients]
            for client, requests in zip(clients, asked, strict=True):
                client.send(*(message for message, _data in requests))
            for client, requests in zip(clients, asked, strict=True):
                assert [client.answer().tensors for _ in requests] == [data for _message, data in requests]
            count += CROWD * TOGETHER
    return count


def quiet(port: int, model: int) -> None:
    """Ask one or a few at a time, cut anywhere, and leave now and then with something unanswered."""
    chance = random.Random(model)
    left = ROUNDS
    while left:
        with WireClient(port) as client:
            for _ in range(min(left, chance.choice((1, 10, 60, 250)))):
                left -= 1
                asked = [request(model, chance.random()) for _ in range(chance.choice((1, 1, 1, 3)))]
                message = b"".join(part for part, _data in asked)
                cut = chance.randrange(len(message)) if chance.random() < 0.3 else 0
                client.send(message[:cut]).send(message[cut:])
                if chance.random() < 0.02:
                    break
                for _message, data in asked:
                    assert client.answer().tensors == data


def test_every_client_beside_a_crowd_gets_its_own_answers(server: ForebayServer) -> None:
    is_over = threading.Event()
    with ThreadPoolExecutor(QUIET + 1) as threads:
        busy = threads.submit(crowd, server.http_port, is_over)
        try:
            for done in [threads.submit(quiet, server.http_port, model) for model in range(1, QUIET + 1)]:
                done.result()
        finally:
            is_over.set()
        assert busy.result() > 0
    assert server.pid_of("http quiet")
    wait_nothing_in_use(server)
