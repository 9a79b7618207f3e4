"""Ensembles over real processes: what steps get and give, errors, counters, and other models coming and going."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as httpclient
from ensemble_models import pair, scale_onnx, step, write_ensemble, write_model, write_repository
from forebay_server import ForebayServer, wait_until
from tritonclient.utils import InferenceServerException

FloatArray = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensembles")
    write_repository(path)
    return path


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(repository, protocols=("http", "metrics")) as running:
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[httpclient.InferenceServerClient]:
    with httpclient.InferenceServerClient(server.http_url, concurrency=8) as opened:
        yield opened


def ask(
    client: httpclient.InferenceServerClient, model: str, name: str, values: FloatArray, **options: Any
) -> httpclient.InferResult:
    given = httpclient.InferInput(name, list(values.shape), "FP32")
    given.set_data_from_numpy(values)
    return client.infer(model, [given], **options)


def rows(count: int, width: int = 4, first: float = 1.0) -> FloatArray:
    return np.arange(first, first + count * width, dtype=np.float32).reshape(count, width)


def stats(server: ForebayServer, model: str) -> dict[str, Any]:
    status, body = server.get(f"/v2/models/{model}/stats")
    assert status == 200
    found: dict[str, Any] = json.loads(body)["model_stats"][0]
    return found


def metric(server: ForebayServer, name: str, *labels: str) -> float:
    """Return the sum of a metric's samples that carry all these labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as reply:
        page = reply.read().decode()
    found = [line for line in page.splitlines() if re.match(rf"{name}\{{", line)]
    return sum(float(line.rpartition(" ")[2]) for line in found if all(label in line for label in labels))


def test_two_steps_run_in_the_order_of_their_tensors(client: httpclient.InferenceServerClient) -> None:
    """S-100, S-101."""
    given = rows(3)
    result = ask(client, "two_steps", "A", given)
    np.testing.assert_array_equal(result.as_numpy("C"), (given + 1) * 2)


def test_every_answer_names_the_sequence_parameters(client: httpclient.InferenceServerClient) -> None:
    """S-111, H row 29: in this order, even without sequences; on the first and on a planned request alike."""
    for _ in range(3):
        for model in ("two_steps", "one_step"):
            reply = ask(client, model, "A", rows(1)).get_response()
            assert list(reply["parameters"].items()) == [
                ("sequence_id", 0),
                ("sequence_start", False),
                ("sequence_end", False),
            ]


def test_one_step_answers_as_its_model_does(client: httpclient.InferenceServerClient) -> None:
    given = rows(2)
    for _ in range(3):
        np.testing.assert_array_equal(ask(client, "one_step", "A", given).as_numpy("C"), given * 2)


def test_unrequested_outputs_are_not_computed(client: httpclient.InferenceServerClient, server: ForebayServer) -> None:
    """S-105: the step behind an output that nobody asked for does not run."""
    before = stats(server, "add_one")["execution_count"]
    result = ask(client, "branches", "A", rows(1), outputs=[httpclient.InferRequestedOutput("RIGHT")])
    assert [output["name"] for output in result.get_response()["outputs"]] == ["RIGHT"]
    assert stats(server, "add_one")["execution_count"] == before
    result = ask(client, "branches", "A", rows(1))
    assert [output["name"] for output in result.get_response()["outputs"]] == ["LEFT", "RIGHT"]
    # A worker counts an execution when it has ended, which is after its answers have left.
    wait_until(lambda: stats(server, "add_one")["execution_count"] == before + 1, "the execution to be counted")


def test_a_step_error_keeps_its_code_and_names_the_ensemble(client: httpclient.InferenceServerClient) -> None:
    """S-107, E-185."""
    given = rows(1)
    given[0, 0] = -1
    with pytest.raises(InferenceServerException, match=r"^\[503\] in ensemble 'two_steps', no negative numbers$"):
        ask(client, "two_steps", "A", given)
    with pytest.raises(
        InferenceServerException, match=r"^\[503\] in ensemble 'nested', in ensemble 'two_steps', no negative numbers$"
    ):
        ask(client, "nested", "P", given)


def test_an_ensemble_may_contain_ensembles(client: httpclient.InferenceServerClient) -> None:
    """S-119."""
    given = rows(2)
    np.testing.assert_array_equal(ask(client, "nested", "P", given).as_numpy("Q"), (given + 1) * 2 + 1)


def test_a_batch_dimension_of_one_comes_and_goes(client: httpclient.InferenceServerClient) -> None:
    """S-104: a batching ensemble over a model that does not batch."""
    given = rows(1)
    np.testing.assert_array_equal(ask(client, "over_plain", "A", given).as_numpy("C"), (given + 1) * 2)
    with pytest.raises(InferenceServerException, match=r"in ensemble 'over_plain', .*unexpected shape for input 'IN'"):
        ask(client, "over_plain", "A", rows(2))


def test_counts_each_request_once_and_sums_the_steps(
    client: httpclient.InferenceServerClient, server: ForebayServer
) -> None:
    """S-112, better than L-029: one failed request is one failure, under the ensemble's own version."""
    before = stats(server, "two_steps")
    ask(client, "two_steps", "A", rows(2))
    given = rows(1)
    given[0, 0] = -1
    with pytest.raises(InferenceServerException):
        ask(client, "two_steps", "A", given)
    after = stats(server, "two_steps")
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["inference_stats"]["fail"]["count"] == before["inference_stats"]["fail"]["count"] + 1
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["execution_count"] == before["execution_count"] + 1
    for name in ("compute_input", "compute_infer", "success"):
        assert after["inference_stats"][name]["ns"] > before["inference_stats"][name]["ns"]


def test_nothing_is_copied_between_steps(client: httpclient.InferenceServerClient, server: ForebayServer) -> None:
    """L-030, I-1: what comes in is placed once; between the steps and to the client nothing is copied."""
    given = rows(4)

    def copied() -> list[float]:
        return [metric(server, "forebay_copied_bytes_total", f'model="{name}"') for name in ("two_steps", "scale")]

    # A frontend writes its counters behind the answers.
    unused = copied()
    ask(client, "two_steps", "A", given)
    server.wait_for(lambda: copied()[0] > unused[0], "the first request is counted")
    before = copied()
    for _ in range(5):
        ask(client, "two_steps", "A", given)
    server.wait_for(lambda: copied()[0] - before[0] >= 5 * given.nbytes, "all requests are counted")
    after = copied()
    assert after[0] - before[0] == 5 * given.nbytes
    assert after[1] == before[1]


def test_parallel_requests_get_their_own_answers(server: ForebayServer) -> None:
    """One client object is not safe for threads, so each has its own."""

    def ask_one(given: FloatArray) -> FloatArray:
        with httpclient.InferenceServerClient(server.http_url) as own:
            found: FloatArray = ask(own, "two_steps", "A", given).as_numpy("C")
            return found

    inputs = [rows(1, first=float(index)) for index in range(1, 100)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask_one, inputs))
    for given, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result, (given + 1) * 2)


def test_models_in_a_line_answer_right_while_their_workers_are_killed(server: ForebayServer) -> None:
    """Requests keep their rows from model to model; what the only worker of a model had, or should have, is refused."""
    is_over = threading.Event()

    def ask_often(first: int) -> int:
        with httpclient.InferenceServerClient(server.http_url) as own:
            asked = 0
            while not asked or not is_over.is_set():
                given = rows(1 + asked % 3, first=float(first + asked))
                try:
                    found = ask(own, "line", "A", given).as_numpy("C")
                except InferenceServerException as error:
                    assert error.status() in ("500", "503"), error.message()  # noqa: PT017 - others must not be
                    continue
                np.testing.assert_array_equal(found, given * 4 + 1)
                asked += 1
            return asked

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_often, 1000 * number) for number in range(4)]
        for model in ("scale", "add_one"):
            killed = server.pid_of(f"worker {model}:")
            assert killed
            os.kill(killed, signal.SIGKILL)
            server.wait_for(lambda role=model, old=killed: server.pid_of(f"worker {role}:") not in (0, old), "another")
        is_over.set()
        assert all(done.result() > 0 for done in asking)


def test_each_response_of_a_decoupled_step_runs_the_rest(server: ForebayServer) -> None:
    """S-109: the ensemble is decoupled by itself, so HTTP inference refuses it and streams answer."""
    status, body = server.post("/v2/models/decoupled/generate_stream", json.dumps({"A": 3.0}).encode())
    assert status == 200
    events = [json.loads(line.removeprefix("data: ")) for line in body.decode().splitlines() if line]
    assert [event["C"] for event in events] == [1.0, 2.0, 3.0]
    status, body = server.get("/v2/models/decoupled/config")
    assert json.loads(body)["model_transaction_policy"] == {"decoupled": True}
    request = {"inputs": [{"name": "A", "datatype": "FP32", "shape": [1], "data": [3]}]}
    assert server.post("/v2/models/decoupled/infer", json.dumps(request).encode())[0] == 501


def test_metadata_and_index_of_an_ensemble(server: ForebayServer) -> None:
    """E-187."""
    status, body = server.get("/v2/models/two_steps")
    assert status == 200
    assert json.loads(body) == {
        "name": "two_steps",
        "versions": ["1"],
        "platform": "ensemble",
        "inputs": [{"name": "A", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "C", "datatype": "FP32", "shape": [-1, 4]}],
    }


# --- models that come and go


class Explicit:
    """A server in explicit mode."""

    def __init__(self, server: ForebayServer) -> None:
        self.server = server

    def load(self, name: str) -> tuple[int, str]:
        status, body = self.server.post(f"/v2/repository/models/{name}/load")
        return status, json.loads(body).get("error", "") if body else ""

    def unload(self, name: str, *, dependents: bool = False) -> None:
        body = json.dumps({"parameters": {"unload_dependents": dependents}}).encode()
        assert self.server.post(f"/v2/repository/models/{name}/unload", body)[0] == 200

    def states(self) -> dict[str, tuple[str, str]]:
        rows_ = json.loads(self.server.post("/v2/repository/index")[1])
        return {row["name"]: (row.get("state", ""), row.get("reason", "")) for row in rows_}

    def wait_state(self, name: str, state: str) -> None:
        self.server.wait_for(lambda: self.states()[name][0] == state, f"{name} to be {state}")


@pytest.fixture
def explicit(tmp_path: Path) -> Iterator[Explicit]:
    models = tmp_path / "models"
    write_repository(models)
    write_ensemble(models, "of_nothing", pair("A", "C"), step("no_such_model", {"X": "A"}, {"Y": "C"}))
    write_ensemble(models, "of_of_nothing", pair("A", "C"), step("of_nothing", {"A": "A"}, {"C": "C"}))
    write_ensemble(models, "of_unlike", pair("A", "C"), step("scale", {"Z": "A"}, {"Y": "C"}))
    write_ensemble(models, "circle", pair("A", "C"), step("circle", {"A": "A"}, {"C": "C"}))
    write_model(models, "broken", 'backend: "onnxruntime"\nmax_batch_size: 8\n' + pair("X", "Y"), {"model.onnx": b"x"})
    write_ensemble(models, "of_broken", pair("A", "C"), step("broken", {"X": "A"}, {"Y": "C"}))
    write_ensemble(models, "of_version", pair("A", "C"), step("scale", {"X": "A"}, {"Y": "C"}, version=7))
    with ForebayServer(models, settings={"repository": {"control_mode": "explicit"}}) as server:
        yield Explicit(server)


def test_what_an_ensemble_lacks_is_named(explicit: Explicit) -> None:
    """R-097, as Triton 2.51 answers: of the ensemble, and of no version."""
    missing = "ensemble of_nothing contains models that are not available or ambiguous: no_such_model"
    for name, why in (
        ("of_nothing", missing),
        (
            "of_of_nothing",
            f"ensemble 'of_of_nothing' depends on 'of_nothing' which is not valid. Model 'of_nothing' "
            f"failed with error: {missing}",
        ),
        ("circle", "circular dependency between ensembles: circle -> ... -> circle -> circle"),
        ("of_version", "ensemble 'of_version' depends on 'scale' whose required version 7 is not loaded."),
        (
            "of_unlike",
            "in ensemble of_unlike, ensemble tensor A is mapping to non-existing input Z in model scale",
        ),
    ):
        status, text = explicit.load(name)
        assert status == 400
        assert text == f"load failed for model '{name}': {why}\n"
    status, text = explicit.load("of_broken")
    assert text.startswith(
        "load failed for model 'of_broken': ensemble 'of_broken' depends on 'broken' which has no loaded version. "
        "Model 'broken' loading failed with error: version 1 is at UNAVAILABLE state: "
    )


def test_loading_and_unloading_with_dependents(explicit: Explicit) -> None:
    """H-224, R-095, R-096."""
    assert explicit.load("nested") == (200, "")
    states = explicit.states()
    assert {name for name, (state, _) in states.items() if state == "READY"} == {
        "nested",
        "two_steps",
        "add_one",
        "scale",
    }

    explicit.unload("scale")
    states = explicit.states()
    assert states["two_steps"][0] == "UNAVAILABLE"
    assert "depends on 'scale' which has no loaded version" in states["two_steps"][1]
    explicit.load("scale")
    explicit.wait_state("two_steps", "READY")

    explicit.unload("nested", dependents=True)
    for name in ("nested", "two_steps", "add_one"):
        explicit.wait_state(name, "UNAVAILABLE")
    # Somebody loaded this one by its name.
    assert explicit.states()["scale"][0] == "READY"


def test_a_new_version_of_a_step_is_used_at_once(explicit: Explicit, tmp_path: Path) -> None:
    """S-108."""
    explicit.load("two_steps")
    with httpclient.InferenceServerClient(explicit.server.http_url) as client:
        given = rows(1)
        np.testing.assert_array_equal(ask(client, "two_steps", "A", given).as_numpy("C"), (given + 1) * 2)
        version = tmp_path / "models" / "scale" / "2"
        version.mkdir()
        (version / "model.onnx").write_bytes(scale_onnx(10.0))
        explicit.load("scale")
        np.testing.assert_array_equal(ask(client, "two_steps", "A", given).as_numpy("C"), (given + 1) * 10)


def test_a_reload_under_load_fails_no_request(explicit: Explicit, tmp_path: Path) -> None:
    """A step is replaced while requests are between the steps: each runs with the versions that it began with."""
    explicit.load("two_steps")
    failures: list[str] = []
    stop = threading.Event()

    def ask_on() -> None:
        with httpclient.InferenceServerClient(explicit.server.http_url) as client:
            while not stop.is_set():
                try:
                    ask(client, "two_steps", "A", rows(1))
                except InferenceServerException as error:
                    failures.append(str(error))

    threads = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_ in range(3):
        shutil.copytree(tmp_path / "models" / "scale" / "1", tmp_path / "models" / "scale" / str(2 + round_))
        assert explicit.load("scale") == (200, "")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_full_queue_of_a_step_fails_the_request_promptly(tmp_path: Path) -> None:
    """core#466: Triton leaves such requests without an answer for ever."""
    write_repository(tmp_path)
    config = tmp_path / "add_one" / "config.pbtxt"
    config.write_text(
        config.read_text().replace(
            "dynamic_batching { }", "dynamic_batching { default_queue_policy { max_queue_size: 1 } }"
        )
    )
    slow = rows(1)
    slow[0, 0] = -2
    with ForebayServer(tmp_path) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:

        def ask_slow(_index: int) -> str:
            with httpclient.InferenceServerClient(server.http_url) as client:
                try:
                    ask(client, "two_steps", "A", slow)
                except InferenceServerException as error:
                    return str(error)
                return ""

        texts = list(pool.map(ask_slow, range(12)))
        assert "" in texts
        refused = [text for text in texts if text]
        assert refused
        assert set(refused) == {"[503] in ensemble 'two_steps', Exceeds maximum queue size"}


def test_a_client_that_leaves_stops_the_steps_behind(server: ForebayServer) -> None:
    """S-183: after the first step is done, the second does not run for nobody."""
    before = stats(server, "scale")["execution_count"]
    body = json.dumps({"inputs": [{"name": "A", "datatype": "FP32", "shape": [1, 4], "data": [-2, 0, 0, 0]}]}).encode()
    with socket.create_connection(("127.0.0.1", server.http_port)) as client:
        client.sendall(b"POST /v2/models/two_steps/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        client.sendall(body)
        server.wait_for(lambda: metric(server, "nv_inference_pending_request_count") == 0, "the request to be taken")
        time.sleep(0.2)
        # With this option, closing resets the connection: nobody will read an answer.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.wait_for(
        lambda: metric(server, "nv_inference_request_failure", 'model="two_steps"', 'reason="CANCELED"') == 1,
        "the ensemble's request to be counted as cancelled",
    )
    ask_until = time.monotonic() + 1.5
    while time.monotonic() < ask_until:
        assert stats(server, "scale")["execution_count"] == before
        time.sleep(0.1)
