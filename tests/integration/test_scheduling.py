"""Schedulers with real processes and an unmodified tritonclient (spec section 6)."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient
from forebay_server import ForebayServer, wait_until
from scheduling_models import add_accumulator, add_fault_model, add_iterative_model, add_sequence_model
from tritonclient.utils import InferenceServerException

DYNAMIC = "dynamic_batching {{ {} }}"
SLOW = -1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    """Every scheduler, one model each."""
    root: Path = tmp_path_factory.mktemp("models")
    add_fault_model(root, "plain", "", count=1)
    add_fault_model(root, "dynamic", DYNAMIC.format(""), count=1)
    add_fault_model(root, "limited", DYNAMIC.format("default_queue_policy { max_queue_size: 2 }"), max_batch=1)
    add_fault_model(
        root,
        "impatient",
        DYNAMIC.format("default_queue_policy { default_timeout_microseconds: 50000 allow_timeout_override: true }"),
        max_batch=1,
        delay_ms=600,
    )
    add_fault_model(
        root, "override", DYNAMIC.format("default_queue_policy { allow_timeout_override: true }"), max_batch=1
    )
    add_fault_model(
        root, "urgent", DYNAMIC.format("priority_levels: 3 default_priority_level: 2"), max_batch=1, delay_ms=500
    )
    add_fault_model(root, "ordered", DYNAMIC.format("preserve_ordering: true"), max_batch=1, count=2, delay_ms=400)
    add_fault_model(
        root, "spared", 'instance_group { name: "spare" count: 1 kind: KIND_CPU passive: true }', delay_ms=100
    )
    add_sequence_model(root, "direct", "direct { }", count=2, max_batch=2)
    add_sequence_model(root, "oldest", "oldest { max_candidate_sequences: 4 }", corrid="TYPE_STRING")
    add_sequence_model(root, "lost", "direct { }", max_batch=1)
    add_sequence_model(root, "reaped", "direct { }", max_batch=1, idle_us=300_000)
    add_iterative_model(root, "iterative")
    add_accumulator(root, "state_direct", "direct { }")
    add_accumulator(root, "state_oldest", "oldest { max_candidate_sequences: 4 }", initial=5.0)
    add_accumulator(root, "state_single", "direct { }", max_batch=0)
    with ForebayServer(root, environment={"FOREBAY_TEST_BACKENDS": "1"}) as running:
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[httpclient.InferenceServerClient]:
    with httpclient.InferenceServerClient(server.http_url, concurrency=16) as opened:
        yield opened


def tensor(value: float, batched: bool = True) -> list[httpclient.InferInput]:
    data = np.array([[value]] if batched else [value], np.float32)
    given = httpclient.InferInput("X", data.shape, "FP32")
    given.set_data_from_numpy(data)
    return [given]


def metric(server: ForebayServer, name: str, model: str, **labels: str) -> float:
    """Return a sample of the metrics page; 0 if it is not there."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=20) as reply:
        lines = reply.read().decode().splitlines()
    wanted = [f'model="{model}"', *(f'{key}="{value}"' for key, value in labels.items())]
    values = [line for line in lines if line.startswith(name + "{") and all(text in line for text in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in values)


class Busy:
    """Keeps a model's instance busy with one slow request."""

    def __init__(self, server: ForebayServer, model: str) -> None:
        self._server, self._model = server, model
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with httpclient.InferenceServerClient(self._server.http_url) as client:
            client.infer(self._model, tensor(SLOW))

    def __enter__(self) -> None:
        self._thread.start()
        time.sleep(0.1)

    def __exit__(self, *_error: object) -> None:
        self._thread.join()


# --- queue policies


def test_full_queue_is_503_with_the_request_id(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    """Spec S-025."""
    with Busy(server, "limited"):
        waiting = [client.async_infer("limited", tensor(1.0)) for _ in range(2)]
        time.sleep(0.05)
        with pytest.raises(InferenceServerException) as refused:
            client.infer("limited", tensor(1.0), request_id="mine")
        for request in waiting:
            request.get_result()
    assert "503" in str(refused.value.status())
    assert refused.value.message() == "[request id: mine] Exceeds maximum queue size"
    wait_until(
        lambda: metric(server, "nv_inference_request_failure", "limited", reason="REJECTED") == 1, "the refusal counted"
    )


def test_queue_timeout_is_answered_at_its_time(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    """Spec S-026, S-027, L-005: long before the instance is free."""
    with Busy(server, "impatient"):
        start = time.monotonic()
        with pytest.raises(InferenceServerException, match="Request timeout expired") as refused:
            client.infer("impatient", tensor(1.0))
        elapsed_s = time.monotonic() - start
    assert "503" in str(refused.value.status())
    assert 0.05 <= elapsed_s < 0.4


def test_request_timeout_shortens_the_default_and_works_without_one(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    """Spec S-029, S-030, L-006."""
    for model in ("impatient", "override"):
        with Busy(server, model), pytest.raises(InferenceServerException, match="Request timeout expired"):
            client.infer(model, tensor(1.0), timeout=5_000)
        # The timeout covers waiting only.
        client.infer(model, tensor(SLOW), timeout=20_000)


def test_queue_timeouts_hold_after_a_quiet_time_too(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    """L-005: no frontend may keep requests back for an instance that it was granted while it was alone."""
    for model in ("impatient", "override"):
        for _ in range(12):
            client.infer(model, tensor(1.0), timeout=1_000_000)
        with Busy(server, model):
            start = time.monotonic()
            with pytest.raises(InferenceServerException, match="Request timeout expired"):
                client.infer(model, tensor(1.0), timeout=50_000)
            assert time.monotonic() - start < 0.4


def test_default_scheduler_ignores_timeouts(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    """Spec S-004."""
    with Busy(server, "plain"):
        client.infer("plain", tensor(1.0), timeout=1)


def test_priority_1_overtakes(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    """Spec S-031; 0 is the default level."""
    finished: list[str] = []

    def ask(label: str, priority: int) -> Callable[[], None]:
        def run() -> None:
            with httpclient.InferenceServerClient(server.http_url) as own:
                own.infer("urgent", tensor(SLOW), priority=priority)
                finished.append(label)

        return run

    with Busy(server, "urgent"):
        threads: list[threading.Thread] = []
        for label, priority in (("low", 3), ("default", 0), ("high", 1)):
            threads.append(threading.Thread(target=ask(label, priority)))
            threads[-1].start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert finished == ["high", "default", "low"]


def test_answers_keep_their_order(server: ForebayServer) -> None:
    """Spec S-024: two instances, the slow request first. The answers leave together; two threads take them."""
    finished_s: dict[str, float] = {}

    def ask(label: str, value: float) -> None:
        with httpclient.InferenceServerClient(server.http_url) as own:
            own.infer("ordered", tensor(value))
            finished_s[label] = time.monotonic()

    slow = threading.Thread(target=ask, args=("slow", SLOW))
    slow.start()
    time.sleep(0.1)
    fast = threading.Thread(target=ask, args=("fast", 1.0))
    fast.start()
    fast.join()
    slow.join()
    assert finished_s["fast"] > finished_s["slow"] - 0.05


def test_passive_instances_are_loaded_and_get_no_requests(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    """Spec C-098."""
    waiting = [client.async_infer("spared", tensor(SLOW)) for _ in range(4)]
    for request in waiting:
        request.get_result()
    batches = json.loads(server.get("/forebay/explain/spared")[1])["batches"]
    assert {batch["instance"] for batch in batches} == {"spared_0_0"}
    assert len([role for role in server.pids() if role.startswith("worker spared:1")]) == 2


def test_a_model_of_passive_instances_only_is_not_loaded(tmp_path: Path) -> None:
    """Spec C-098."""
    add_fault_model(tmp_path, "nobody", "", group="passive: true")
    with ForebayServer(tmp_path, "--exit-on-error=false", environment={"FOREBAY_TEST_BACKENDS": "1"}) as server:
        (row,) = json.loads(server.post("/v2/repository/index")[1])
        assert "model 'nobody' has passive instances only, which get no requests" in row["reason"]


# --- clients that leave


def raw_request(model: str, value: float) -> bytes:
    body = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 1], "data": [value]}]}).encode()
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("model", ["plain", "dynamic", "limited"])
def test_client_that_leaves_takes_its_waiting_request_along(
    server: ForebayServer, client: httpclient.InferenceServerClient, model: str
) -> None:
    """Spec S-005, S-033, S-180, S-181, S-185: it never runs, its rows are free, and it is counted."""
    before = client.get_inference_statistics(model)["model_stats"][0]["inference_count"]
    cancelled = metric(server, "nv_inference_request_failure", model, reason="CANCELED")
    with Busy(server, model):
        with socket.create_connection(("127.0.0.1", server.http_port)) as left:
            left.sendall(raw_request(model, 1.0))
            time.sleep(0.1)
            # A reset, not an orderly end of sending, after which an answer might still be read.
            left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(
            lambda: metric(server, "nv_inference_request_failure", model, reason="CANCELED") == cancelled + 1,
            "the cancellation counted",
        )

    def ran() -> int:
        return int(client.get_inference_statistics(model)["model_stats"][0]["inference_count"]) - before

    # The slow one is answered a moment before it is counted.
    wait_until(lambda: ran() > 0, "the slow request to be counted")
    assert ran() == 1
    wait_until(lambda: metric(server, "forebay_slab_rows_in_use", model) == 0, "all rows to be free")


# --- sequences


class SequenceClient:
    """One sequence of a client."""

    def __init__(self, client: httpclient.InferenceServerClient, model: str, correlation_id: int | str) -> None:
        self._client, self._model, self._id = client, model, correlation_id

    def ask(self, value: float, flags: str = "") -> dict[str, Any]:
        """Send one request; ``flags``: S start, E end."""
        result = self._client.infer(
            self._model, tensor(value), sequence_id=self._id, sequence_start="S" in flags, sequence_end="E" in flags
        )
        start, end, ready, position, batch = result.as_numpy("CONTROLS")[0].tolist()
        return {
            "sum": float(result.as_numpy("SUM")[0, 0]),
            "flags": "S" * start + "E" * end + "R" * ready,
            "position": position,
            "batch": batch,
            "id": result.as_numpy("ID")[0, 0].decode(),
            "instance": result.as_numpy("INSTANCE")[0, 0].decode(),
        }


@pytest.mark.parametrize("model", ["direct", "oldest"])
def test_sequences_stay_with_their_instance_and_see_their_controls(
    client: httpclient.InferenceServerClient, model: str
) -> None:
    """Spec S-053, S-058, S-061, S-062."""
    sequences = {number: SequenceClient(client, model, number) for number in (11, 12, 13)}
    first = {number: sequence.ask(number, "S") for number, sequence in sequences.items()}
    assert {number: seen["flags"] for number, seen in first.items()} == dict.fromkeys(sequences, "SR")
    for number, sequence in sequences.items():
        seen = sequence.ask(1.0)
        assert (seen["sum"], seen["flags"], seen["id"]) == (number + 1.0, "R", str(number))
        assert (seen["instance"], seen["position"]) == (first[number]["instance"], first[number]["position"]) or (
            model == "oldest"
        )
    for number, sequence in sequences.items():
        assert sequence.ask(1.0, "E")["sum"] == number + 2.0
    assert sequences[11].ask(3.0, "SE")["flags"] == "SER"
    with pytest.raises(InferenceServerException, match="must specify the START flag on the first request"):
        sequences[12].ask(1.0)


def test_gaps_of_a_direct_batch_are_filled(client: httpclient.InferenceServerClient) -> None:
    """Spec S-064: the third sequence stands in slot 1 of the first instance."""
    sequences = [SequenceClient(client, "direct", number) for number in (21, 22, 23)]
    places = [sequence.ask(1.0, "S")["position"] for sequence in sequences]
    assert sorted(places) == [0, 0, 1]
    seen = sequences[places.index(1)].ask(1.0)
    assert (seen["position"], seen["batch"], seen["flags"]) == (1, 2, "R")
    for sequence in sequences:
        sequence.ask(1.0, "E")


def test_string_ids(client: httpclient.InferenceServerClient) -> None:
    """Spec S-059, S-062."""
    named = SequenceClient(client, "oldest", "a sequence")
    assert named.ask(1.0, "S")["id"] == "a sequence"
    assert named.ask(2.0, "E")["sum"] == 3.0
    with pytest.raises(
        InferenceServerException,
        match=re.escape("[request id: <id_unknown>] correlation ID in request is not an unsigned int"),
    ):
        SequenceClient(client, "direct", "a sequence").ask(1.0, "SE")


def test_sequence_errors(client: httpclient.InferenceServerClient) -> None:
    """Spec S-050, S-051."""
    with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
        client.infer("direct", tensor(1.0))
    pair = httpclient.InferInput("X", [2, 1], "FP32")
    pair.set_data_from_numpy(np.zeros((2, 1), np.float32))
    with pytest.raises(InferenceServerException, match="must specify batch-size 1 due to requirements of sequence"):
        client.infer("direct", [pair], sequence_id=1, sequence_start=True)


def test_waiting_sequence_moves_up(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    """Spec S-055, S-057: at an END, or when the other has been idle for too long."""
    for flags in ("E", ""):
        first = SequenceClient(client, "reaped", 1)
        first.ask(1.0, "S")
        answers: list[dict[str, Any]] = []

        def run(answers: list[dict[str, Any]] = answers) -> None:
            with httpclient.InferenceServerClient(server.http_url) as own:
                answers.append(SequenceClient(own, "reaped", 2).ask(5.0, "SE"))

        second = threading.Thread(target=run)
        second.start()
        time.sleep(0.1)
        assert answers == []
        if flags:
            first.ask(1.0, flags)
        second.join()
        assert answers[0]["sum"] == 5.0
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        first.ask(1.0)


def test_killed_worker_ends_its_sequences_with_a_clear_error(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    sequence = SequenceClient(client, "lost", 7)
    sequence.ask(1.0, "S")
    role = "worker lost:1"
    killed = server.pid_of(role)
    os.kill(killed, signal.SIGKILL)
    server.wait_for(lambda: server.pid_of(role) not in (0, killed), "a new worker")

    def is_ready() -> bool:
        return bool(client.is_model_ready("lost"))

    server.wait_for(is_ready, "the model to be ready again")
    with pytest.raises(InferenceServerException, match="start the sequence again"):
        sequence.ask(1.0)
    assert sequence.ask(2.0, "S")["sum"] == 2.0


def test_iterative_requests_come_again_until_they_are_done(
    server: ForebayServer, client: httpclient.InferenceServerClient
) -> None:
    """Spec S-060: no id of their own, and several at a time in one batch."""
    waiting = {times: client.async_infer("iterative", tensor(times)) for times in (1.0, 5.0, 300.0, 301.0, 302.0)}
    assert {times: float(request.get_result().as_numpy("Y")[0, 0]) for times, request in waiting.items()} == {
        times: times for times in waiting
    }
    batches = json.loads(server.get("/forebay/explain/iterative")[1])["batches"]
    assert max(batch["requests"] for batch in batches) > 1


# --- implicit state


def accumulate(client: httpclient.InferenceServerClient, model: str, number: int, value: float, flags: str) -> float:
    result = client.infer(
        model, tensor(value, model != "state_single"), sequence_id=number, sequence_start="S" in flags,
        sequence_end="E" in flags,
    )  # fmt: skip
    return float(result.as_numpy("Y").reshape(-1)[0])


@pytest.mark.parametrize(("model", "initial"), [("state_direct", 0.0), ("state_oldest", 5.0), ("state_single", 0.0)])
def test_state_is_kept_between_requests_and_reset_by_start(
    client: httpclient.InferenceServerClient, model: str, initial: float
) -> None:
    """Spec S-080..S-082."""
    if model != "state_single":
        assert accumulate(client, model, 2, 100.0, "S") == 1100.0 + initial
    assert accumulate(client, model, 1, 1.0, "S") == 1001.0 + initial
    assert accumulate(client, model, 1, 2.0, "") == 1003.0 + initial
    assert accumulate(client, model, 1, 4.0, "S") == 1004.0 + initial
    assert accumulate(client, model, 1, 1.0, "E") == 1005.0 + initial
    if model != "state_single":
        assert accumulate(client, model, 2, 1.0, "E") == 1101.0 + initial


def test_many_sequences_at_once_keep_their_sums(server: ForebayServer) -> None:
    """Batches of several sequences, more sequences than slots, each with its own sum."""
    failures: list[str] = []
    numbers = itertools.count(100)

    def run(model: str, initial: float) -> None:
        with httpclient.InferenceServerClient(server.http_url) as own:
            for _ in range(5):
                number, expected = next(numbers), 1000.0 + initial
                for step in range(6):
                    expected += step
                    flags = "S" * (step == 0) + "E" * (step == 5)
                    got = accumulate(own, model, number, float(step), flags)
                    if got != expected:
                        failures.append(f"{model} sequence {number} step {step}: {got}, not {expected}")

    threads = [
        threading.Thread(target=run, args=arguments)
        for arguments in [("state_direct", 0.0), ("state_oldest", 5.0)]
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- explain


def test_explain_tells_of_the_last_batches(server: ForebayServer, client: httpclient.InferenceServerClient) -> None:
    client.infer("dynamic", tensor(1.0))

    def last() -> dict[str, Any]:
        status, body = server.get("/forebay/explain/dynamic")
        assert status == 200
        batch: dict[str, Any] = json.loads(body)["batches"][-1]
        return batch

    assert (last()["rows"], last()["segments"], last()["reason"]) == (1, 1, "instance idle")
    # The client has its answer before the scheduler hears of the end.
    server.wait_for(lambda: last()["run_ns"] > 0, "the batch to have run")
    assert server.get("/forebay/explain/nobody")[0] == 404
    command = [sys.executable, "-P", "-m", "forebay.engine.main", "explain", f"--http-port={server.http_port}"]
    printed = subprocess.run([*command, "dynamic:1"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "dynamic version 1" in printed
    assert "instance idle: 1.0 rows" in printed


def test_rate_limiter_keeps_models_with_one_resource_apart(tmp_path: Path) -> None:
    """Spec S-151, S-152, S-154."""
    group = 'rate_limiter { resources [ { name: "R" global: true count: 1 } ] }'
    for name in ("one", "two"):
        add_fault_model(tmp_path, name, "", delay_ms=300, group=group)
    with ForebayServer(tmp_path, "--rate-limit=execution_count", environment={"FOREBAY_TEST_BACKENDS": "1"}) as limited:
        start = time.monotonic()
        with Busy(limited, "one"), httpclient.InferenceServerClient(limited.http_url) as client:
            client.infer("two", tensor(1.0))
            assert time.monotonic() - start >= 0.25


def test_model_that_could_never_run_is_not_loaded(tmp_path: Path) -> None:
    """Spec S-153."""
    group = 'rate_limiter { resources [ { name: "R" count: 3 } ] }'
    add_fault_model(tmp_path, "greedy", "", group=group)
    with ForebayServer(
        tmp_path, "--rate-limit=execution_count", "--rate-limit-resource=R:2", "--exit-on-error=false",
        environment={"FOREBAY_TEST_BACKENDS": "1"},
    ) as limited:  # fmt: skip
        (row,) = json.loads(limited.post("/v2/repository/index")[1])
        assert row["reason"].endswith(
            'Resource count for "R" is limited to 2 which will prevent scheduling of one or more model instances, the '
            "minimum required count is 3"
        )
