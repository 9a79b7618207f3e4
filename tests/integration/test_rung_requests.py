"""What shared-memory clients ring workers for themselves (docs/shm-protocol.md, Rings): cancelled, revoked and lost."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forebay_server import ForebayServer, wait_until

from forebay.client.shm import Engine, Future, Model, connect
from forebay.ipc.errors import Internal

#: Answers 0 at once, and runs for others: until they are cancelled, or a file of that number appears.
MODEL = """
import os
import threading
import time
import triton_python_backend_utils as pb_utils

def said_of(request):
    return pb_utils.get_input_tensor_by_name(request, "X").as_numpy().copy()

def answer_to(number):
    return pb_utils.InferenceResponse([pb_utils.Tensor("Y", number)])

def run(request, number):
    if number:
        print(f"{number} began", flush=True)
        while not os.path.exists(f"{pb_utils.get_model_dir()}/{number}"):
            if request.is_cancelled():
                print(f"{number} was cancelled", flush=True)
                break
            time.sleep(0.01)
"""

AT_ONCE = (
    MODEL
    + """
class TritonPythonModel:
    def execute(self, requests):
        numbers = [said_of(request) for request in requests]
        for request, number in zip(requests, numbers):
            run(request, int(number[0]))
        return [answer_to(number) for number in numbers]
"""
)

#: Its executions return before their requests are answered.
LATER = (
    MODEL
    + """
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            number, sender = said_of(request), request.get_response_sender()
            if number[0]:
                threading.Thread(target=self.answer, args=(request, number, sender)).start()
            else:
                sender.send(answer_to(number), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return [None] * len(requests)

    def answer(self, request, number, sender):
        run(request, int(number[0]))
        sender.send(answer_to(number), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
)

CONFIG = """
backend: "python"
input [ {{ name: "X" data_type: TYPE_FP32 dims: [ {dim} ] }} ]
output [ {{ name: "Y" data_type: TYPE_FP32 dims: [ {dim} ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""


def write_model(repository: Path, name: str, source: str, dim: int) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(textwrap.dedent(source))
    (repository / name / "config.pbtxt").write_text(CONFIG.format(dim=dim))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("rung")
    write_model(repository, "rows", AT_ONCE, 1)
    write_model(repository, "parcels", AT_ONCE, -1)
    write_model(repository, "later", LATER, 1)
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(repository, protocols=("http",)) as running:
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[Engine]:
    with connect(server.runtime_base) as engine:
        yield engine


@pytest.fixture
def other(server: ForebayServer) -> Iterator[Engine]:
    with connect(server.runtime_base) as engine:
        yield engine


def earn_grant(engine: Engine, name: str) -> Model:
    """Ask until the worker may be rung."""
    model = engine.model(name)

    def is_granted() -> bool:
        model.put("X", np.zeros(1, np.float32))
        model.infer()
        time.sleep(0.01)  # What is granted is told after the answer.
        engine.connection.completions.read_nowait()
        return engine.connection.grant_count > 0

    wait_until(is_granted, "a grant")
    return model


def printed(server: ForebayServer, line: str) -> None:
    wait_until(lambda: f"{line}\n" in server.stdout, f"'{line}'")


def _let_it_arrive() -> None:
    """Give a message time to reach the worker, where nobody can see it; tests pass whether it does or not."""
    time.sleep(0.2)


def rung_with_another_behind(
    server: ForebayServer, client: Engine, other: Engine, name: str, number: int
) -> tuple[Future, Future]:
    """Return a request that its client has rung a worker for, which runs, and one of another that ends the grant."""
    model = earn_grant(client, name)
    model.put("X", np.full(1, number, np.float32))
    asked = model.submit()
    printed(server, f"{number} began")
    behind = other.model(name)
    behind.put("X", np.zeros(1, np.float32))
    waiting = behind.submit()
    _let_it_arrive()
    return asked, waiting


@pytest.mark.parametrize(("name", "number"), [("rows", 10), ("parcels", 11), ("later", 12)])
def test_model_hears_that_what_it_was_rung_for_is_cancelled(
    server: ForebayServer, client: Engine, name: str, number: int
) -> None:
    model = earn_grant(client, name)
    model.put("X", np.full(1, number, np.float32))
    asked = model.submit()
    printed(server, f"{number} began")
    asked.cancel()
    printed(server, f"{number} was cancelled")
    # Nobody else is: not who comes after in the same rows either.
    earn_grant(client, name)
    assert server.stdout.count("was cancelled\n") == server.stdout.count("began\n")


@pytest.mark.parametrize(("name", "number"), [("rows", 20), ("parcels", 21), ("later", 22)])
def test_model_hears_of_it_after_the_grant_has_ended(
    server: ForebayServer, client: Engine, other: Engine, name: str, number: int
) -> None:
    asked, waiting = rung_with_another_behind(server, client, other, name, number)
    asked.cancel()
    printed(server, f"{number} was cancelled")
    waiting.result(timeout_s=60)


def test_request_that_waits_behind_a_rung_one_hears_of_its_own_cancellation(
    server: ForebayServer, client: Engine, other: Engine, repository: Path
) -> None:
    model = earn_grant(client, "parcels")
    model.put("X", np.full(1, 30, np.float32))
    asked = model.submit()
    printed(server, "30 began")
    behind = other.model("parcels")
    behind.put("X", np.full(1, 31, np.float32))
    waiting = behind.submit()
    _let_it_arrive()
    waiting.cancel()
    _let_it_arrive()
    (repository / "parcels" / "1" / "30").touch()
    asked.result(timeout_s=60)
    printed(server, "31 began")
    printed(server, "31 was cancelled")


def test_request_that_is_answered_later_runs_once_although_its_grant_ends(
    server: ForebayServer, client: Engine, other: Engine, repository: Path
) -> None:
    model = earn_grant(client, "later")
    model.put("X", np.full(1, 40, np.float32))
    asked = model.submit()
    printed(server, "40 began")
    behind = other.model("later")
    behind.put("X", np.zeros(1, np.float32))
    behind.infer(timeout_s=60)
    client.connection.completions.read_nowait()
    assert client.connection.grant_count == 0
    (repository / "later" / "1" / "40").touch()
    assert asked.result(timeout_s=60) == 40
    assert server.stdout.count("40 began\n") == 1


@pytest.mark.parametrize(("name", "number"), [("rows", 50), ("parcels", 51), ("later", 52)])
def test_request_that_was_rung_for_ends_when_the_worker_dies_after_the_grant(
    server: ForebayServer, client: Engine, other: Engine, name: str, number: int
) -> None:
    asked, waiting = rung_with_another_behind(server, client, other, name, number)
    os.kill(server.pid_of(f"worker {name}:1 {name}_0_0"), signal.SIGKILL)
    # Another instance would try them again; there is none.
    for each in (asked, waiting):
        with contextlib.suppress(Internal):
            each.result(timeout_s=60)
