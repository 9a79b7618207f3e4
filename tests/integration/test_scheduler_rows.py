"""Rows of spec section 6 that other files do not show, with real processes."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import ForebayServer, wait_until
from scheduling_models import (
    add_accumulator,
    add_fault_model,
    add_python_model,
    add_sequence_model,
    add_stream_model,
    add_two_step_ensemble,
)
from tritonclient.utils import InferenceServerException

DYNAMIC = "dynamic_batching { }"
SLOW, FAILING = -1.0, -2.0
TEST_BACKENDS = {"FOREBAY_TEST_BACKENDS": "1"}
SHARED = 'rate_limiter { resources [ { name: "R" global: true count: 1 } ] }'
DECOUPLED = "model_transaction_policy { decoupled: true }"

WHO = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.kind = args["model_instance_kind"]

    def execute(self, requests):
        told = np.array([[self.kind, str(os.getpid()), str(len(requests))]], np.object_)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", told)]) for _ in requests]
"""
WHO_CONFIG = """
backend: "python"
max_batch_size: 4
input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "Y" data_type: TYPE_STRING dims: [ 3 ] }}
instance_group {{ count: {count} kind: {kind} }}
{more}
"""


#: Says how many requests it was given at once, to each of them.
TOGETHER = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answer = pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([[len(requests)]], np.float32))])
        for request in requests:
            request.get_response_sender().send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
#: Answers with the input, and knows of nothing else.
PLAIN = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("Y", pb_utils.get_input_tensor_by_name(request, "X").as_numpy())]
            )
            for request in requests
        ]
"""
#: Asks model ``one``.
PARENT = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceRequest(
                model_name="one", requested_output_names=["Y"],
                inputs=[pb_utils.get_input_tensor_by_name(request, "X")],
            ).exec()
            for request in requests
        ]
"""
NUMBERS = """
backend: "python"
max_batch_size: 4
input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }}
{more}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[ForebayServer]:
    add_fault_model(root, "one", "", delay_ms=400, group=SHARED)
    add_fault_model(root, "two", "", delay_ms=400, group=SHARED)
    add_fault_model(root, "failing", "")
    add_two_step_ensemble(root, "twice", ("failing", "failing"))
    add_two_step_ensemble(root, "broken", ("two", "failing"), version=3)
    add_stream_model(root, "stream")
    add_python_model(root, "who", WHO, WHO_CONFIG.format(count=2, kind="KIND_CPU", more=""))
    add_python_model(root, "model_kind", WHO, WHO_CONFIG.format(count=1, kind="KIND_MODEL", more=""))
    add_python_model(root, "parent", PARENT, NUMBERS.format(more=""))
    add_python_model(
        root,
        "stateless",
        PLAIN,
        NUMBERS.format(
            more='sequence_batching { direct { } state { input_name: "IN" output_name: "OUT" data_type: TYPE_FP32 '
            "dims: [ 1 ] } }"
        ),
    )
    add_accumulator(
        root, "grown", "direct { }", state="use_growable_memory: true use_same_buffer_for_input_output: true"
    )
    add_sequence_model(root, "adjusted", "direct { }", count=2, max_batch=1)
    with ForebayServer(
        root, "--model-control-mode=explicit", "--load-model=*", environment=TEST_BACKENDS,
        protocols=("http", "grpc", "metrics"),
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[grpcclient.InferenceServerClient]:
    with connect(server) as opened:
        yield opened


def connect(server: ForebayServer) -> grpcclient.InferenceServerClient:
    return grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")


def tensor(value: float) -> list[grpcclient.InferInput]:
    given = grpcclient.InferInput("X", (1, 1), "FP32")
    given.set_data_from_numpy(np.array([[value]], np.float32))
    return [given]


class Asked:
    """A request under way."""

    def __init__(self, client: grpcclient.InferenceServerClient, model: str, value: float) -> None:
        self._ended: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        ended = self._ended
        client.async_infer(model, tensor(value), lambda result, error: ended.put((result, error)))

    def answer(self, timeout_s: float = 60.0) -> float:
        """Return the output, or raise the error."""
        result, error = self._ended.get(timeout=timeout_s)
        if error is not None:
            raise error
        return float(result.as_numpy("Y")[0, 0])

    def is_answered(self) -> bool:
        return not self._ended.empty()


def counts(server: ForebayServer, model: str) -> tuple[int, int]:
    """Return a model's inferences and executions."""
    (statistics,) = json.loads(server.get(f"/v2/models/{model}/stats")[1])["model_stats"]
    return statistics["inference_count"], statistics["execution_count"]


def last_batch(server: ForebayServer, model: str) -> dict[str, Any]:
    batch: dict[str, Any] = json.loads(server.get(f"/forebay/explain/{model}")[1])["batches"][-1]
    return batch


# --- batches


def test_the_scheduler_can_be_told_to_wait_for_requests_that_then_run_together(tmp_path: Path) -> None:
    """Spec S-022, S-035, S-037: one execution, each its own answer; if it fails, all of them fail."""
    for name in ("held", "failing"):
        add_fault_model(tmp_path, name, DYNAMIC)
    environment = {**TEST_BACKENDS, "TRITONSERVER_DELAY_SCHEDULER": "4"}
    with (
        ForebayServer(tmp_path, environment=environment, protocols=("http", "grpc")) as held,
        connect(held) as client,
    ):
        asked = [Asked(client, "held", value) for value in (1.0, 2.0, 3.0)]
        time.sleep(0.3)
        assert not any(request.is_answered() for request in asked)
        asked.append(Asked(client, "held", 4.0))
        assert [request.answer() for request in asked] == [1.0, 2.0, 3.0, 4.0]
        wait_until(lambda: counts(held, "held") == (4, 1), "one execution of four to be counted")
        # Only the first batch is held back.
        assert Asked(client, "held", 5.0).answer() == 5.0

        first = Asked(client, "failing", FAILING)
        time.sleep(0.1)
        others = [Asked(client, "failing", 1.0) for _ in range(3)]
        for request in (first, *others):
            with pytest.raises(InferenceServerException):
                request.answer()
        assert last_batch(held, "failing")["requests"] == 4


# --- rate limits, instances


def test_without_the_rate_limiter_resources_mean_nothing(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    """Spec S-150: two models that name one resource run at the same time."""
    both = [Asked(client, name, SLOW) for name in ("one", "two")]
    for request in both:
        request.answer()
    wait_until(lambda: all(last_batch(server, name)["run_ns"] for name in ("one", "two")), "the batches to be over")
    one, two = (last_batch(server, name) for name in ("one", "two"))
    assert two["started_ns"] < one["started_ns"] + one["run_ns"]
    assert one["started_ns"] < two["started_ns"] + two["run_ns"]


def test_ensembles_take_no_resources(tmp_path: Path) -> None:
    """Spec S-155: only their steps do, one after the other; an ensemble that held one would wait for itself."""
    for name in ("one", "two"):
        add_fault_model(tmp_path, name, "", group=SHARED)
    add_two_step_ensemble(tmp_path, "both", ("one", "two"))
    with (
        ForebayServer(tmp_path, "--rate-limit=execution_count", environment=TEST_BACKENDS, protocols=("http", "grpc"))
        as limited,
        connect(limited) as client,
    ):  # fmt: skip
        asked = [Asked(client, "both", float(value)) for value in range(8)]
        assert [request.answer() for request in asked] == [float(value) for value in range(8)]


def test_every_instance_is_a_process(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    """Spec S-160, S-163: and all of them have loaded when the model is ready."""
    workers = {role: pid for role, pid in server.pids().items() if role.startswith("worker who:")}
    assert len(set(workers.values())) == 2
    _kind, pid, _count = client.infer("who", tensor(1.0)).as_numpy("Y")[0]
    assert int(pid) in workers.values()


def test_a_model_may_place_itself(client: grpcclient.InferenceServerClient) -> None:
    """Spec S-161."""
    assert client.infer("model_kind", tensor(1.0)).as_numpy("Y")[0, 0] == b"MODEL"


def test_a_batch_of_the_clients_own_is_one_execution_by_default(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    """Spec S-001: the server joins nothing, and divides nothing."""
    inferences, executions = counts(server, "failing")
    pair = grpcclient.InferInput("X", (2, 1), "FP32")
    pair.set_data_from_numpy(np.array([[1.0], [2.0]], np.float32))
    assert client.infer("failing", [pair]).as_numpy("Y").tolist() == [[1.0], [2.0]]
    wait_until(lambda: counts(server, "failing") == (inferences + 2, executions + 1), "the execution to be counted")


# --- ensembles


def test_failed_ensemble_requests_are_counted_by_the_steps_reason_under_the_ensembles_version(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    """Spec S-113, S-118 (both on purpose unlike Triton), S-120: it has no processes of its own."""
    with pytest.raises(InferenceServerException, match="in ensemble 'broken'"):
        Asked(client, "broken", FAILING).answer()

    def failures() -> list[str]:
        lines = server.metrics().splitlines()
        return [line for line in lines if line.startswith("nv_inference_request_failure{") and '"broken"' in line]

    wait_until(lambda: any(line.endswith(" 1") for line in failures()), "the failure to be counted")
    assert all('version="3"' in line for line in failures())
    assert ['reason="BACKEND"' in line for line in failures() if line.endswith(" 1")] == [True]
    assert not any("broken" in role for role in server.pids())


def test_a_model_may_be_in_several_steps(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    """Spec S-117."""
    inferences, _executions = counts(server, "failing")
    assert Asked(client, "twice", 7.0).answer() == 7.0
    wait_until(lambda: counts(server, "failing")[0] == inferences + 2, "both steps to be counted")


# --- decoupled models


def test_decoupled_models_answer_over_streams_only(server: ForebayServer) -> None:
    """Spec S-131."""
    body = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1], "data": [2.0]}]}).encode()
    assert server.post("/v2/models/stream/infer", body)[0] == 501
    status, answers = server.post("/v2/models/stream/generate_stream", json.dumps({"X": 2.0}).encode())
    assert status == 200
    assert answers.count(b"data:") == 2


def test_a_decoupled_request_is_counted_when_its_last_answer_has_come(server: ForebayServer) -> None:
    """Spec S-133."""
    before = counts(server, "stream")
    thread = threading.Thread(
        target=server.post, args=("/v2/models/stream/generate_stream", json.dumps({"X": 30.0}).encode())
    )
    thread.start()
    time.sleep(0.2)
    (running,) = json.loads(server.get("/v2/models/stream/stats")[1])["model_stats"]
    assert running["inference_stats"]["success"]["count"] == before[0]
    thread.join()
    wait_until(lambda: counts(server, "stream")[0] == before[0] + 1, "the request to be counted")


def test_requests_of_a_decoupled_model_are_batched(tmp_path: Path) -> None:
    """Spec S-132."""
    add_python_model(tmp_path, "together", TOGETHER, NUMBERS.format(more=DYNAMIC + DECOUPLED))
    environment = {"TRITONSERVER_DELAY_SCHEDULER": "3"}
    with ForebayServer(tmp_path, environment=environment) as held, ThreadPoolExecutor(3) as pool:
        path, body = "/v2/models/together/generate", json.dumps({"X": [1.0]}).encode()
        answers = [answer for _status, answer in pool.map(lambda _index: held.post(path, body), range(3))]
    assert [json.loads(answer)["Y"] for answer in answers] == [3.0] * 3


def test_a_call_of_another_model_goes_on_when_its_callers_client_leaves(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    """Spec S-184."""
    inferences, _executions = counts(server, "one")
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("parent", tensor(SLOW), client_timeout=0.15)
    wait_until(lambda: counts(server, "one")[0] == inferences + 1, "the other model's answer to be counted")


# --- sequences and their state


def ask(client: grpcclient.InferenceServerClient, model: str, value: float, flags: str) -> float:
    result = client.infer(model, tensor(value), sequence_id=77, sequence_start="S" in flags, sequence_end="E" in flags)
    name = "SUM" if model == "adjusted" else "Y"
    return float(result.as_numpy(name)[0, 0])


def test_memory_options_of_states_are_taken(client: grpcclient.InferenceServerClient) -> None:
    """Spec S-085."""
    assert [ask(client, "grown", value, flags) for value, flags in ((1.0, "S"), (2.0, ""), (3.0, "E"))] == [
        1001.0, 1003.0, 1006.0,
    ]  # fmt: skip


def test_a_state_means_nothing_to_a_python_model(client: grpcclient.InferenceServerClient) -> None:
    """Spec S-084."""
    assert [ask(client, "stateless", value, flags) for value, flags in ((1.0, "S"), (2.0, "E"))] == [1.0, 2.0]


def test_an_instance_that_is_removed_finishes_its_sequence(
    server: ForebayServer, client: grpcclient.InferenceServerClient, root: Path
) -> None:
    """Spec S-072: from two instances to one while a sequence runs on the one that goes."""
    other = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
    other.infer("adjusted", tensor(0.0), sequence_id=5, sequence_start=True)
    assert ask(client, "adjusted", 1.0, "S") == 1.0
    path = root / "adjusted" / "config.pbtxt"
    path.write_text(path.read_text().replace("count: 2", "count: 1"))
    assert server.post("/v2/repository/models/adjusted/load")[0] == 200
    assert ask(client, "adjusted", 2.0, "") == 3.0
    assert ask(client, "adjusted", 3.0, "E") == 6.0
    other.infer("adjusted", tensor(0.0), sequence_id=5, sequence_end=True)
    other.close()
    wait_until(
        lambda: len([role for role in server.pids() if role.startswith("worker adjusted:")]) == 1,
        "the second instance to be gone",
    )


# --- the end


def test_what_was_accepted_is_answered_when_the_server_stops(tmp_path: Path) -> None:
    """Spec S-036, S-071: running and waiting requests alike; afterwards nobody listens."""
    add_fault_model(tmp_path, "slow", DYNAMIC, max_batch=1, delay_ms=300)
    with ForebayServer(tmp_path, environment=TEST_BACKENDS, protocols=("http", "grpc")) as stopping:
        with connect(stopping) as client:
            asked = [Asked(client, "slow", SLOW) for _ in range(3)]
            time.sleep(0.15)
            thread = threading.Thread(target=stopping.stop)
            thread.start()
            assert [request.answer() for request in asked] == [SLOW] * 3
            thread.join()
        assert stopping.process.returncode == 0


def test_host_policies_bind_workers(tmp_path: Path) -> None:
    """Spec S-162."""
    core = min(os.sched_getaffinity(0))
    add_fault_model(tmp_path, "bound", "", group='host_policy: "mine"')
    with ForebayServer(tmp_path, f"--host-policy=mine,cpu-cores={core}-{core}", environment=TEST_BACKENDS) as server:
        assert os.sched_getaffinity(server.pid_of("worker bound:1")) == {core}
