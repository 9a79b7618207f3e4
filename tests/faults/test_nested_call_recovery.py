"""The scheduler is killed while a model waits for another (BLS): the nested call is handed in again like any other."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from forebay_server import ForebayServer, wait_until

#: Answers when it is let: its file ``open`` appears.
GATE = """
import os
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        while not os.path.exists(f"{pb_utils.get_model_dir()}/open"):
            time.sleep(0.01)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("Y", pb_utils.get_input_tensor_by_name(request, "X").as_numpy().copy())]
            )
            for request in requests
        ]
"""

#: Asks it, in the thread of the execution or in another one.
CALLER = """
from concurrent.futures import ThreadPoolExecutor
import triton_python_backend_utils as pb_utils

def call(request):
    asked = pb_utils.InferenceRequest(
        model_name="gate", requested_output_names=["Y"], inputs=[pb_utils.get_input_tensor_by_name(request, "X")]
    )
    answer = asked.exec()
    if answer.has_error():
        return pb_utils.InferenceResponse(error=answer.error())
    return pb_utils.InferenceResponse([pb_utils.get_output_tensor_by_name(answer, "Y")])

class TritonPythonModel:
    def execute(self, requests):
        if IN_THREADS:
            with ThreadPoolExecutor() as pool:
                return list(pool.map(call, requests))
        return [call(request) for request in requests]
"""

CALLERS = ("rows", "parcels", "threads")


def write_model(repository: Path, name: str, source: str, *, dims: int = 1) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(source)
    (repository / name / "config.pbtxt").write_text(
        'backend: "python"\ninstance_group [ { count: 1 kind: KIND_CPU } ]\n'
        f'input [ {{ name: "X" data_type: TYPE_FP32 dims: [ {dims} ] }} ]\n'
        f'output [ {{ name: "Y" data_type: TYPE_FP32 dims: [ {dims} ] }} ]\n'
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForebayServer]:
    write_model(tmp_path, "gate", GATE)
    for name in CALLERS:
        source = f"IN_THREADS = {name == 'threads'}\n{CALLER}"
        write_model(tmp_path, name, source, dims=-1 if name == "parcels" else 1)
    with ForebayServer(tmp_path) as running:
        yield running


def infer(server: ForebayServer, model: str, value: float, answers: dict[float, list[float]]) -> None:
    body = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1], "data": [value]}]}).encode()
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/infer", body, timeout=30) as reply:
        answers[value] = json.loads(reply.read())["outputs"][0]["data"]


def wait_queued(server: ForebayServer, count: int) -> None:
    """Wait until so many requests wait with the scheduler."""
    wait_until(lambda: server.counter("nv_inference_pending_request_count", model="gate") == count, f"{count} to wait")


def test_nested_calls_that_were_lost_with_the_scheduler_are_handed_in_again(
    server: ForebayServer, tmp_path: Path
) -> None:
    answers: dict[float, list[float]] = {}
    threads: list[threading.Thread] = []

    def start(model: str) -> None:
        thread = threading.Thread(target=infer, args=(server, model, float(len(threads)), answers))
        thread.start()
        threads.append(thread)

    # One of them runs in the gate; the others wait with the scheduler.
    for waiting, model in enumerate(CALLERS):
        start(model)
        wait_queued(server, waiting)
    start("gate")
    wait_queued(server, len(CALLERS))
    killed = server.pid_of("scheduler")
    os.kill(killed, signal.SIGKILL)
    server.wait_for(lambda: server.pid_of("scheduler") not in (0, killed), "a new scheduler")
    (tmp_path / "gate" / "1" / "open").touch()
    for thread in threads:
        thread.join(40)
    assert answers == {value: [value] for value in map(float, range(len(threads)))}
