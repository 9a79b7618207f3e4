"""Batches for a latency objective, with real processes: ``--batching slo=`` and the parameter ``forebay_slo_ms``."""

from __future__ import annotations

import json
import queue
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import ForebayServer, wait_until
from scheduling_models import add_fault_model
from tritonclient.utils import InferenceServerException

DYNAMIC = "dynamic_batching { }"
#: One batch of any size takes so long, ms.
DELAY_MS = 30
OBJECTIVE = 'parameters {{ key: "forebay_slo_ms" value {{ string_value: "{}" }} }}'
ALWAYS_SLOW = 'parameters { key: "fault" value { string_value: "delay" } }'
REASONS = {"objective", "deadline", "full", "instance idle", "late", "message full"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    root: Path = tmp_path_factory.mktemp("models")
    for name, scheduling in {
        "by_flag": DYNAMIC,
        "own": DYNAMIC + OBJECTIVE.format("400"),
        "exempt": DYNAMIC + OBJECTIVE.format("0"),
        "plain": "",
        "wrong": OBJECTIVE.format("100"),
        "nonsense": DYNAMIC + OBJECTIVE.format("soon"),
    }.items():
        add_fault_model(root, name, scheduling + ALWAYS_SLOW, count=1, max_batch=4, delay_ms=DELAY_MS)
    with ForebayServer(
        root,
        "--batching=slo=200ms",
        "--exit-on-error=false",
        environment={"FOREBAY_TEST_BACKENDS": "1"},
        protocols=("http", "grpc", "metrics"),
    ) as running:
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}") as opened:
        yield opened


def flood(client: grpcclient.InferenceServerClient, model: str, count: int, **options: Any) -> list[str]:
    """Ask many times at once, after the model has shown what it costs; return the texts of the refusals."""
    given = grpcclient.InferInput("X", (1, 1), "FP32")
    given.set_data_from_numpy(np.array([[1.0]], np.float32))
    for _ in range(4):
        client.infer(model, [given])
    ended: queue.SimpleQueue[InferenceServerException | None] = queue.SimpleQueue()
    for _ in range(count):
        client.async_infer(model, [given], lambda result, error: ended.put(error), **options)
    errors = [error for _ in range(count) if (error := ended.get(timeout=60)) is not None]
    assert {str(error.status()) for error in errors} <= {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"}
    return [str(error.message()) for error in errors]


def rejected(server: ForebayServer, model: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=20) as reply:
        lines = reply.read().decode().splitlines()
    wanted = ("nv_inference_request_failure{", f'model="{model}"', 'reason="REJECTED"')
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if all(text in line for text in wanted))


@pytest.mark.parametrize(("model", "objective"), [("by_flag", "200 ms"), ("own", "400 ms")])
def test_what_cannot_be_in_time_is_refused_at_once_and_the_rest_is_answered(
    server: ForebayServer, client: grpcclient.InferenceServerClient, model: str, objective: str
) -> None:
    """64 requests take 16 batches of 30 ms: more than there is time for."""
    refusals = flood(client, model, 64)
    assert 0 < len(refusals) < 64
    assert all(text.startswith("Exceeds latency objective: the answer would take ") for text in refusals)
    assert all(f"the objective of model '{model}' is {objective}; try again later" in text for text in refusals)
    wait_until(lambda: rejected(server, model) == len(refusals), "the refusals counted")
    batches = json.loads(server.get(f"/forebay/explain/{model}")[1])["batches"]
    assert {batch["reason"] for batch in batches} <= REASONS
    assert max(batch["rows"] for batch in batches) == 4


def test_a_clients_own_timeout_takes_the_objectives_place(client: grpcclient.InferenceServerClient) -> None:
    assert flood(client, "by_flag", 48, timeout=30_000_000) == []
    refusals = flood(client, "by_flag", 48, timeout=100_000)
    assert refusals
    assert all(text.startswith("Exceeds request timeout: the answer would take ") for text in refusals)
    assert all("100 ms are given" in text for text in refusals)


def test_a_deadline_counts_where_it_comes_before_the_objective(client: grpcclient.InferenceServerClient) -> None:
    refusals = [text for text in flood(client, "by_flag", 48, client_timeout=0.15) if text != "Deadline Exceeded"]
    assert refusals
    assert all(text.startswith("Exceeds request timeout: the answer would take ") for text in refusals)
    refusals = flood(client, "by_flag", 64, client_timeout=30)
    assert refusals
    assert all(text.startswith("Exceeds latency objective: ") for text in refusals)


@pytest.mark.parametrize("model", ["exempt", "plain"])
def test_models_that_are_left_out_answer_everything(client: grpcclient.InferenceServerClient, model: str) -> None:
    assert flood(client, model, 32) == []


def test_objectives_that_cannot_be_kept_are_refused_when_the_model_is_loaded(server: ForebayServer) -> None:
    reasons = {row["name"]: row.get("reason", "") for row in json.loads(server.post("/v2/repository/index")[1])}
    assert "parameter 'forebay_slo_ms' of model 'wrong' needs dynamic_batching" in reasons["wrong"]
    assert "parameter 'forebay_slo_ms' of model 'nonsense' must be a number of milliseconds" in reasons["nonsense"]
