"""Clients of all kinds at random, who cancel and leave at random, while workers and the scheduler are killed.

Afterwards every request has been answered, with its own answer, or has failed with an error that the protocol knows;
nothing is held any more; and nobody is busy. Runs some seconds, or as many as ``FOREBAY_STORM_SECS`` says.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import textwrap
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import PATIENCE_S, ForebayServer, wait_until
from http_models import wait_nothing_in_use, write_identity
from tritonclient.utils import InferenceServerException

import forebay.client.shm
from forebay.client.errors import DeadlineExceeded
from forebay.client.shm import Engine, ServingError
from forebay.engine.supervisor.backoff import LOOP_COUNT, LOOP_WINDOW_S

STORM_SECS = float(os.environ.get("FOREBAY_STORM_SECS", "4"))
SEED = int(os.environ.get("FOREBAY_STORM_SEED", "0")) or random.SystemRandom().randrange(1 << 32)

#: Seconds between kills, at most.
KILL_PAUSE_S = 1.5
#: How often one process is killed within the window in which more would be a crash loop.
DEATHS_MAX = LOOP_COUNT - 2
#: HTTP statuses of requests that failed for want of a worker, a place, or somebody who waits.
STATUSES = (200, 499, 500, 503)
GRPC_CODES = ("CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE")

#: Answer what they are asked, a moment later; those of ``late`` from threads of the model's own.
ECHO = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        asked = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
        end_s = time.monotonic() + abs(float(asked[0])) % 7 / 1000
        while time.monotonic() < end_s and not request.is_cancelled():
            time.sleep(0.001)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", asked)])
"""

LATE = (
    ECHO
    + """
    def execute(self, requests):
        import threading
        for request in requests:
            threading.Thread(target=self.send, args=(request, request.get_response_sender())).start()
        return [None] * len(requests)

    def send(self, request, sender):
        sender.send(self.answer(request), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
)

#: Asks others for what it is asked.
CALLER = """
import asyncio
import triton_python_backend_utils as pb_utils

MODELS = ["rows", "parcels", "late", "identity"]

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        asked = pb_utils.get_input_tensor_by_name(request, "INPUT0")
        number = int(abs(asked.as_numpy()[0]))
        names = [MODELS[(number + i) % 4] for i in range(1 + number % 3)]
        calls = [
            pb_utils.InferenceRequest(model_name=name, requested_output_names=["OUTPUT0"], inputs=[asked])
            for name in names
        ]
        if number % 2:
            responses = [call.exec() for call in calls]
        else:
            responses = asyncio.run(self.ask(calls))
        for response in responses:
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
        output = pb_utils.get_output_tensor_by_name(responses[-1], "OUTPUT0").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", output.copy())])

    async def ask(self, calls):
        return await asyncio.gather(*[call.async_exec() for call in calls])
"""

MODELS = ("rows", "parcels", "late", "identity", "caller")


def write_python(repository: Path, name: str, source: str, dims: int) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(textwrap.dedent(source))
    (repository / name / "config.pbtxt").write_text(
        f'backend: "python"\ninput [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ {dims} ] }} ]\n'
        f'output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ {dims} ] }} ]\n'
        "instance_group [ { count: 2 kind: KIND_CPU } ]\n"
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForebayServer]:
    repository = tmp_path / "models"
    write_python(repository, "rows", ECHO, 2)
    write_python(repository, "parcels", ECHO, -1)
    write_python(repository, "late", LATE, 2)
    write_python(repository, "caller", CALLER, 2)
    write_identity(repository, "identity", [("TYPE_FP32", "2")])
    with ForebayServer(repository, protocols=("http", "grpc", "metrics")) as running:
        yield running


class Storm:
    """Who asks until the end, and what they got."""

    def __init__(self, server: ForebayServer) -> None:
        self.server = server
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._errors: list[BaseException] = []

    def count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def run(self, *roles: Callable[[Storm, random.Random], None]) -> None:
        """Have all of them act at once for the time of the storm."""
        threads = [threading.Thread(target=self._act, args=(role, number)) for number, role in enumerate(roles)]
        for thread in threads:
            thread.start()
        self._is_over.wait(STORM_SECS)
        self._is_over.set()
        for thread in threads:
            thread.join(2 * PATIENCE_S)
            assert not thread.is_alive(), f"{thread.name} waits for ever"
        if self._errors:
            raise self._errors[0]

    def _act(self, role: Callable[[Storm, random.Random], None], number: int) -> None:
        try:
            role(self, random.Random(SEED + number))
        except BaseException as error:
            self._errors.append(error)
            self._is_over.set()

    @property
    def goes_on(self) -> bool:
        return not self._is_over.is_set()

    def pause(self, time_s: float) -> None:
        self._is_over.wait(time_s)


def question(chance: random.Random) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a tensor that no other request has, most likely: its answer is it."""
    return np.array([chance.randrange(1, 1 << 20), chance.randrange(1 << 20)], np.float32)


def ask_http(storm: Storm, chance: random.Random) -> None:
    while storm.goes_on:
        asked = question(chance)
        connection = http.client.HTTPConnection("127.0.0.1", storm.server.http_port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            for _ in range(chance.randrange(1, 6)):
                tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [2], "data": asked.tolist()}
                body = json.dumps({"inputs": [tensor]})
                connection.request("POST", f"/v2/models/{chance.choice(MODELS)}/infer", body)
                if chance.random() < 0.2:
                    storm.pause(chance.random() * 0.01)
                    storm.count("http left")
                    break
                reply = connection.getresponse()
                said = json.loads(reply.read())
                assert reply.status in STATUSES, (reply.status, said)
                assert reply.status != 200 or said["outputs"][0]["data"] == asked.tolist()
                storm.count(f"http {reply.status}")


def ask_grpc(storm: Storm, chance: random.Random) -> None:
    port = storm.server.ports()["GRPCInferenceService"]
    with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        while storm.goes_on:
            asked = question(chance)
            tensor = grpcclient.InferInput("INPUT0", [2], "FP32")
            tensor.set_data_from_numpy(asked)
            timeout_s = chance.choice((0.003, 0.02, PATIENCE_S))
            ended = threading.Event()
            found: list[Any] = []

            def end(result: Any, error: Any, found: list[Any] = found, ended: threading.Event = ended) -> None:
                found[:] = result, error
                ended.set()

            call: Any = client.async_infer(chance.choice(MODELS), [tensor], end, client_timeout=timeout_s)
            if chance.random() < 0.3:
                storm.pause(chance.random() * 0.01)
                call.cancel()
            assert ended.wait(2 * PATIENCE_S), "no answer"
            result, error = found
            if error is None:
                np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), asked)
                storm.count("grpc OK")
            else:
                assert isinstance(error, InferenceServerException)
                code = str(error.status()).removeprefix("StatusCode.")
                assert code in GRPC_CODES, error
                storm.count(f"grpc {code}")


def ask_shm(storm: Storm, chance: random.Random) -> None:
    with forebay.client.shm.connect(storm.server.runtime_base) as engine:
        while storm.goes_on:
            ask_model(storm, chance, engine, chance.choice(MODELS))
        # What was cancelled ends, too, although nobody is made to wait for it.
        connection = engine.connection
        wait_until(lambda: connection.completions.read_nowait() or connection.in_flight == 0, "the last answers")


def ask_model(storm: Storm, chance: random.Random, engine: Engine, name: str) -> None:
    """Ask a few times in a row, so that grants are earned."""
    model = engine.model(name)
    for _ in range(chance.randrange(1, 30)):
        asked = question(chance)
        model.put("INPUT0", asked)
        future = model.submit()
        if chance.random() < 0.1:
            storm.pause(chance.random() * 0.005)
            future.cancel()
        try:
            answer = future.result(timeout_s=chance.choice((0.005, PATIENCE_S)))
        except DeadlineExceeded:
            future.cancel()
            storm.count("shm late")
        except ServingError as error:
            storm.count(f"shm {type(error).__name__}")
        else:
            np.testing.assert_array_equal(answer, asked)
            storm.count("shm OK")


def kill(storm: Storm, chance: random.Random) -> None:
    deaths: dict[str, deque[float]] = defaultdict(lambda: deque([-LOOP_WINDOW_S] * DEATHS_MAX, DEATHS_MAX))
    while storm.goes_on:
        storm.pause(0.2 + chance.random() * KILL_PAUSE_S)
        roles = [role for role in storm.server.pids() if role.startswith("worker")] + ["scheduler"]
        role = chance.choice(roles)
        pid, now_s = storm.server.pid_of(role), time.monotonic()
        if pid and now_s - deaths[role][0] > LOOP_WINDOW_S:
            deaths[role].append(now_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                storm.count("killed")


def cpu_ticks(server: ForebayServer) -> dict[int, int]:
    """Return what every process of the server has used of the CPU, ticks."""
    used: dict[int, int] = {}
    for pid in server.pids().values():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[pid] = int(fields[11]) + int(fields[12])
    return used


def wait_idle(server: ForebayServer) -> None:
    """Wait until no process uses more than a twentieth of a core."""
    allowed = os.sysconf("SC_CLK_TCK") // 20

    def is_idle() -> bool:
        before = cpu_ticks(server)
        time.sleep(1)
        return all(ticks - before.get(pid, 0) <= allowed for pid, ticks in cpu_ticks(server).items())

    wait_until(is_idle, "all processes to be idle")


@pytest.mark.timeout(STORM_SECS + 6 * PATIENCE_S)
def test_nothing_is_lost_in_a_storm(server: ForebayServer) -> None:
    print(f"FOREBAY_STORM_SEED={SEED}")
    storm = Storm(server)
    storm.run(ask_http, ask_http, ask_grpc, ask_grpc, ask_shm, ask_shm, kill)
    print(dict(storm.outcomes))
    assert all(storm.outcomes[f"{kind} OK"] for kind in ("grpc", "shm"))
    # What was killed last comes back; then every model serves as at the beginning.
    with forebay.client.shm.connect(server.runtime_base) as engine:
        for name in MODELS:
            wait_until(lambda name=name: serves(engine, name), f"{name} to serve")
    wait_nothing_in_use(server)
    wait_idle(server)


def serves(engine: Engine, name: str) -> bool:
    try:
        model = engine.model(name)
        model.put("INPUT0", np.ones(2, np.float32))
        return model.infer(timeout_s=PATIENCE_S)[0] == 1
    except ServingError:
        return False
