"""Several instances of a model in one worker process (``--instances-per-process``), with real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as httpclient
from forebay_server import ForebayServer, wait_until
from scheduling_models import add_fault_model

POISON = -10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    root: Path = tmp_path_factory.mktemp("models")
    add_fault_model(root, "fault", "", count=3, max_batch=1, delay_ms=300)
    with ForebayServer(
        root, "--instances-per-process=2", "--model-control-mode=explicit", "--load-model=fault",
        environment={"FOREBAY_TEST_BACKENDS": "1"},
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[httpclient.InferenceServerClient]:
    with httpclient.InferenceServerClient(server.http_url, concurrency=8) as opened:
        yield opened


def worker_pids(server: ForebayServer) -> set[int]:
    return {pid for role, pid in server.pids().items() if role.startswith("worker ")}


def infer(client: httpclient.InferenceServerClient, *values: float) -> list[float]:
    """Send one request for each value, all at once; return their answers."""
    sent = []
    for value in values:
        tensor = httpclient.InferInput("X", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.array([[value]], np.float32))
        sent.append(client.async_infer("fault", [tensor]))
    return [float(each.get_result().as_numpy("Y")[0, 0]) for each in sent]


def thread_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_three_instances_live_in_two_processes_and_all_of_them_work(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    pids = worker_pids(server)
    assert len(pids) == 2
    assert sorted(map(thread_count, pids)) == [1, 2]
    # Each takes 300 ms: more at a time than one instance does.
    assert infer(client, *[-1.0] * 6) == [-1.0] * 6

    def counts() -> tuple[int, int]:
        stats = client.get_inference_statistics("fault")["model_stats"][0]
        return stats["inference_stats"]["success"]["count"], stats["execution_count"]

    # Workers count behind their answers.
    wait_until(lambda: counts() == (6, 6), "six executions to be counted")


def test_a_killed_process_comes_back_with_all_its_instances(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    victim = max(worker_pids(server), key=thread_count)
    os.kill(victim, signal.SIGKILL)
    server.wait_logged("worker fault:1 #0 is back")
    server.wait_logged("worker fault:1 #1 is back")
    server.wait_for(lambda: sorted(map(thread_count, worker_pids(server))) == [1, 2], "three instances again")
    server.wait_ready("fault")
    assert infer(client, 1.0, 2.0, 3.0, 4.0) == [1.0, 2.0, 3.0, 4.0]


def test_a_poisoned_context_replaces_its_process_and_the_batch_is_tried_once_elsewhere(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    """Issue 8, 6: the poison is in the request, so that the second try fails too."""
    with pytest.raises(Exception, match="ended"):
        infer(client, POISON)
    assert server.stderr.count("the CUDA context is poisoned, the worker ends: injected illegal address") == 2
    server.wait_logged("ended with exit code 70")
    server.wait_for(lambda: sorted(map(thread_count, worker_pids(server))) == [1, 2], "three instances again")
    assert infer(client, 5.0) == [5.0]


def test_unloading_ends_every_process(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    client.unload_model("fault")
    server.wait_for(lambda: not worker_pids(server), "the workers to end")
    client.load_model("fault")
    assert len(worker_pids(server)) == 2
    assert infer(client, 7.0) == [7.0]
