"""Warm-up of ensembles in a real server: samples run through all steps before the ensemble is READY."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ensemble_models import step, write_ensemble, write_model
from forebay_server import ForebayServer, wait_until

#: Logs what it gets; fails on what is below zero, and takes long for what is above a thousand.
_FIRST = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            pb_utils.Logger.log_info(f"{request.request_id()} ran on {value.tolist()}")
            if value.min() < 0:
                raise ValueError("below zero")
            if value.max() > 1000:
                time.sleep(5)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value + 1)]))
        return answers
"""

#: Two responses to each request.
_TWICE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            value = pb_utils.get_input_tensor_by_name(request, "IN")
            sender = request.get_response_sender()
            for _ in range(2):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value.as_numpy())]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

_TENSORS = """
input {{ name: "{}" data_type: TYPE_FP32 dims: [ -1 ] }}
output {{ name: "{}" data_type: TYPE_FP32 dims: [ -1 ] }}
"""

_SAMPLES = """
parameters {{ key: "forebay_ensemble_warmup" value: {{ string_value: "true" }} }}
model_warmup {{ name: "sample" batch_size: 2 count: 3
  inputs {{ key: "X" value {{ data_type: TYPE_FP32 dims: 2 {} }} }} }}
"""

#: What its process is called.
_WARM_UP = "worker slow:1 warm-up"


def _write_steps(repository: Path) -> None:
    for name in ("first", "second"):
        config = 'backend: "python"\nmax_batch_size: 4\n' + _TENSORS.format("IN", "OUT")
        write_model(repository, name, config, {"model.py": _FIRST})


def _write_ensemble(repository: Path, name: str, data: str) -> None:
    steps = step("first", {"IN": "X"}, {"OUT": "between"}), step("second", {"IN": "between"}, {"OUT": "Y"})
    write_ensemble(repository, name, _TENSORS.format("X", "Y"), *steps, batch=4, more=_SAMPLES.format(data))


def _write_file(repository: Path, name: str, content: bytes) -> None:
    (repository / name / "warmup").mkdir()
    (repository / name / "warmup" / "file").write_bytes(content)


def test_all_responses_of_a_decoupled_step_go_through_the_rest(tmp_path: Path) -> None:
    """Spec S-109, C-110."""
    _write_steps(tmp_path)
    decoupled = 'backend: "python"\nmax_batch_size: 4\nmodel_transaction_policy { decoupled: true }\n'
    write_model(tmp_path, "twice", decoupled + _TENSORS.format("IN", "OUT"), {"model.py": _TWICE})
    steps = step("twice", {"IN": "X"}, {"OUT": "between"}), step("first", {"IN": "between"}, {"OUT": "Y"})
    more = _SAMPLES.format("random_data: true")
    write_ensemble(tmp_path, "decoupled", _TENSORS.format("X", "Y"), *steps, batch=4, more=more)
    with ForebayServer(tmp_path) as server:
        assert server.get("/v2/models/decoupled/ready")[0] == 200
        assert server.stderr.count("sample ran on") == 2 * 2 * 3


def _side_doors(server: ForebayServer) -> list[Path]:
    return list(server.runtime_base.rglob("warm-*"))


def test_steps_run_before_the_ensemble_is_ready_and_are_not_counted(tmp_path: Path) -> None:
    """Spec C-110, C-114, C-115, L-054."""
    _write_steps(tmp_path)
    _write_ensemble(tmp_path, "warm", "zero_data: true")
    _write_ensemble(tmp_path, "failing", 'input_data_file: "file"')
    _write_file(tmp_path, "failing", b"\0\0\x80\xbf" * 2)
    with ForebayServer(tmp_path, "--exit-on-error=false") as server:
        assert server.get("/v2/models/warm/ready")[0] == 200
        printed = server.stderr
        assert printed.count("sample ran on [[0.0, 0.0]]") == printed.count("sample ran on [[1.0, 1.0]]") == 6
        assert printed.index("sample ran on [[1.0, 1.0]]") < printed.index("successfully loaded 'warm'")
        assert "warm:1: warmed up in " in printed
        for statistics in json.loads(server.get("/v2/models/stats")[1])["model_stats"]:
            assert statistics["execution_count"] == 0, statistics["name"]
            assert statistics["inference_stats"]["success"]["count"] == 0, statistics["name"]
            assert statistics["inference_stats"]["fail"]["count"] == 0, statistics["name"]
        rows = {row["name"]: row for row in json.loads(server.post("/v2/repository/index")[1])}
        assert rows["failing"]["state"] == "UNAVAILABLE"
        reason = rows["failing"]["reason"]
        assert reason.startswith("Invalid argument: failed to run warmup sample 'sample': in ensemble 'failing', ")
        assert "below zero" in reason
        given = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()
        assert server.post("/v2/models/warm/infer", given)[0] == 200
        [statistics] = json.loads(server.get("/v2/models/first/stats")[1])["model_stats"]
        assert statistics["execution_count"] == statistics["inference_stats"]["success"]["count"] == 1


def test_a_warm_up_that_dies_refuses_the_load_and_leaves_nothing(tmp_path: Path) -> None:
    _write_steps(tmp_path)
    _write_ensemble(tmp_path, "warm", "zero_data: true")
    _write_ensemble(tmp_path, "slow", 'input_data_file: "file"')
    _write_file(tmp_path, "slow", b"\0\0\x00\x47" * 2)
    flags = ("--model-control-mode=explicit", "--load-model=first", "--load-model=second")
    with ThreadPoolExecutor() as background, ForebayServer(tmp_path, *flags) as server:
        loading = background.submit(server.post, "/v2/repository/models/slow/load")
        wait_until(lambda: "sample ran on [[32768.0" in server.stderr, "the sample to run")
        assert _side_doors(server)
        pid = server.pid_of(_WARM_UP)
        assert pid
        os.kill(pid, signal.SIGKILL)
        status, body = loading.result()
        assert status == 400
        assert b"ended with signal 9" in body
        assert not _side_doors(server)
        assert not server.pid_of(_WARM_UP)
