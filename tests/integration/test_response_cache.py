"""The response cache over real processes (spec 6.10, L-008, L-009)."""

from __future__ import annotations

import concurrent.futures
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ensemble_models import step, write_ensemble, write_model
from forebay_server import ForebayServer, wait_until

#: Answers with its input, the count of its executions, and what a client said in its parameters.
_COUNTING = """
import json
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    executions = 0

    def execute(self, requests):
        responses = []
        for request in requests:
            self.executions += 1
            given = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            time.sleep(float(json.loads(request.parameters()).get("sleep", 0)))
            if given.ravel()[0] < 0:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("negative")))
                continue
            tensors = [
                pb_utils.Tensor("OUT", given),
                pb_utils.Tensor("COUNT", np.array([[self.executions]] * len(given), np.int32)),
            ]
            responses.append(pb_utils.InferenceResponse(tensors, parameters={"executions": self.executions}))
        return responses
"""

_CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ -1 ] }, { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""

_CACHED = "response_cache { enable: true }\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    write_model(models, "cached", _CONFIG + _CACHED, {"model.py": _COUNTING})
    write_model(models, "plain", _CONFIG, {"model.py": _COUNTING})
    tensors = (
        'input [ { name: "A" data_type: TYPE_INT32 dims: [ -1 ] } ]'
        'output [ { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } ]'
    )
    write_ensemble(models, "all_of_it", tensors, step("plain", {"IN": "A"}, {"COUNT": "N"}), more=_CACHED)
    write_ensemble(
        models,
        "its_step",
        tensors,
        step("cached", {"IN": "A"}, {"OUT": "b"}),
        step("plain", {"IN": "b"}, {"COUNT": "N"}),
    )
    return models


@pytest.fixture
def server(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(
        repository, "--cache-config", "local,size=1048576", settings={"repository": {"control_mode": "explicit"}}
    ) as running:
        for name in ("cached", "plain", "all_of_it", "its_step"):
            assert running.post(f"/v2/repository/models/{name}/load")[0] == 200
        yield running


def ask(
    server: ForebayServer, model: str, data: list[int], shape: tuple[int, ...] | None = None, **more: Any
) -> dict[str, Any]:
    """Return the reply's outputs by name, and ``parameters``."""
    name = "IN" if model in ("cached", "plain") else "A"
    tensor = {"name": name, "datatype": "INT32", "shape": shape or (1, len(data)), "data": data}
    status, body = server.post(f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor], **more}).encode())
    reply = json.loads(body)
    if status != 200:
        return {"error": reply["error"]}
    found: dict[str, Any] = {output["name"]: output["data"] for output in reply["outputs"]}
    found["shape"] = reply["outputs"][0]["shape"]
    found["parameters"] = reply.get("parameters")
    found["id"] = reply.get("id")
    return found


def statistics(server: ForebayServer, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.get(f"/v2/models/{model}/stats")[1])["model_stats"][0]
    return found


def metrics(server: ForebayServer) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[:1] != "#" and name
    }


def test_an_equal_request_is_not_executed_again(server: ForebayServer) -> None:
    """S-006, S-170, S-174, S-175, H-238, M-029, M-054; response parameters are kept (better than S-172)."""
    first = ask(server, "cached", [1, 2], id="one")
    again = ask(server, "cached", [1, 2], id="two")
    assert first["COUNT"] == again["COUNT"] == [1]
    assert again["OUT"] == [1, 2]
    assert again["parameters"] == {"executions": 1}
    assert again["id"] == "two"
    found = statistics(server, "cached")
    assert (found["inference_count"], found["execution_count"]) == (1, 1)
    counts = {name: value["count"] for name, value in found["inference_stats"].items()}
    assert counts == {
        "success": 2, "fail": 0, "queue": 2, "compute_input": 1, "compute_infer": 1, "compute_output": 1,
        "cache_hit": 1, "cache_miss": 1,
    }  # fmt: skip
    assert found["inference_stats"]["cache_hit"]["ns"] > 0
    page = metrics(server)
    assert page['nv_cache_num_hits_per_model{model="cached",version="1"}'] == 1
    assert page['nv_cache_num_misses_per_model{model="cached",version="1"}'] == 1
    assert 'nv_cache_num_hits_per_model{model="plain",version="1"}' not in page
    assert (page["nv_cache_num_lookups"], page["nv_cache_num_hits"], page["nv_cache_num_misses"]) == (2, 1, 1)
    assert page["nv_cache_num_entries"] == 1
    assert 0 < page["nv_cache_util"] < 1


def test_what_a_model_can_see_is_part_of_the_key(server: ForebayServer) -> None:
    """L-008, S-171: Triton answers the second of these with the shape of the first (E-074)."""
    assert ask(server, "cached", [1, 2], (1, 2))["shape"] == [1, 2]
    assert ask(server, "cached", [1, 2], (2, 1))["shape"] == [2, 1]
    assert ask(server, "cached", [1, 2], outputs=[{"name": "OUT"}]).get("COUNT") is None
    assert ask(server, "cached", [1, 2], outputs=[{"name": "COUNT"}])["COUNT"] == [4]
    assert ask(server, "cached", [1, 2], parameters={"a": 1})["COUNT"] == [5]
    assert ask(server, "cached", [1, 2], parameters={"a": True})["COUNT"] == [6]
    assert ask(server, "cached", [1, 2], parameters={"a": 1})["COUNT"] == [5]


def test_errors_are_not_kept(server: ForebayServer) -> None:
    assert ask(server, "cached", [-1]) == ask(server, "cached", [-1]) == {"error": "negative"}
    # A worker counts a batch when it is answered.
    server.wait_for(lambda: statistics(server, "cached")["execution_count"] == 2, "both executions to be counted")


def test_a_reload_starts_anew(server: ForebayServer, repository: Path) -> None:
    """Better than S-176, L-009."""
    ask(server, "cached", [1, 2])
    model = repository / "cached" / "1" / "model.py"
    model.write_text(_COUNTING.replace('pb_utils.Tensor("OUT", given)', 'pb_utils.Tensor("OUT", given * 10)'))
    assert server.post("/v2/repository/models/cached/load")[0] == 200
    assert ask(server, "cached", [1, 2])["OUT"] == [10, 20]
    assert metrics(server)["nv_cache_num_entries"] == 1


def test_equal_requests_at_once_run_once(server: ForebayServer) -> None:
    """S-177, L-009."""
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: ask(server, "cached", [7], parameters={"sleep": 0.5}), range(6)))
    assert [reply["COUNT"] for reply in replies] == [[1]] * 6
    # A worker counts an execution when it has answered.
    wait_until(lambda: statistics(server, "cached")["execution_count"] > 0, "the execution counted")
    assert statistics(server, "cached")["execution_count"] == 1


def test_the_least_recently_used_answer_goes_first(repository: Path) -> None:
    """S-173: the pool is never exceeded, and an answer larger than the pool is not kept."""
    with ForebayServer(repository, "--cache-config", "local,size=6000") as server:
        for first in range(12):
            ask(server, "cached", [first])
        page = metrics(server)
        assert page["nv_cache_num_evictions"] > 0
        assert page["nv_cache_util"] <= 1
        entries = page["nv_cache_num_entries"]
        ask(server, "cached", [11])
        assert metrics(server)["nv_cache_num_hits"] == 1
        ask(server, "cached", list(range(4000)))
        assert metrics(server)["nv_cache_num_entries"] == entries


def test_ensembles_and_their_steps_are_cached(server: ForebayServer) -> None:
    """S-114: a hit on the ensemble leaves its steps alone; a step's own cache works inside an ensemble."""
    assert ask(server, "all_of_it", [1])["N"] == ask(server, "all_of_it", [1])["N"] == [1]
    assert statistics(server, "plain")["execution_count"] == 1
    assert statistics(server, "all_of_it")["inference_stats"]["success"]["count"] == 2
    assert [ask(server, "its_step", [5])["N"] for _ in range(3)] == [[2], [3], [4]]
    assert statistics(server, "cached")["execution_count"] == 1
    assert statistics(server, "cached")["inference_stats"]["cache_hit"]["count"] == 2


def test_a_cache_needs_both_the_server_and_the_model(repository: Path) -> None:
    """S-170: without --cache-config the model's wish means nothing."""
    with ForebayServer(repository) as server:
        assert [ask(server, "cached", [1])["COUNT"] for _ in range(2)] == [[1], [2]]
        assert not any(name.startswith("nv_cache") for name in metrics(server))
