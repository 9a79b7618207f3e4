"""Warm-up in a real server: every instance runs the samples, statistics do not know of it, failures are named."""

from __future__ import annotations

import json
from pathlib import Path

from forebay_server import ForebayServer

#: Logs the identifiers of the requests of each execution, and fails on what is below zero.
_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            if value.min() < 0:
                raise ValueError("below zero")
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value)]))
        pb_utils.Logger.log_info(f"ran {[request.request_id() for request in requests]}")
        return answers
"""

_CONFIG = """
backend: "python"
max_batch_size: 4
input {{ name: "IN" data_type: TYPE_FP32 dims: [ -1 ] }}
output {{ name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }}
instance_group {{ count: {count} kind: KIND_CPU }}
model_warmup {{ name: "zeros" batch_size: 2 inputs {{ key: "IN" value {{ data_type: TYPE_FP32 dims: 3 {data} }} }} }}
"""


def _write_model(directory: Path, count: int, data: str) -> None:
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(_MODEL)
    (directory / "config.pbtxt").write_text(_CONFIG.format(count=count, data=data))


def test_instances_are_warm_before_they_serve(tmp_path: Path) -> None:
    """Spec C-110, C-114, C-115."""
    _write_model(tmp_path / "warm", 2, "zero_data: true")
    _write_model(tmp_path / "failing", 1, 'input_data_file: "low"')
    (tmp_path / "failing" / "warmup").mkdir()
    (tmp_path / "failing" / "warmup" / "low").write_bytes(bytes(8) + b"\0\0\x80\xbf")
    with ForebayServer(tmp_path, "--exit-on-error=false") as server:
        assert server.get("/v2/models/warm/ready")[0] == 200
        assert server.stderr.count("ran ['zeros', 'zeros']") == 2
        assert server.stderr.count(", warmed up in ") == 2
        [statistics] = json.loads(server.get("/v2/models/warm/stats")[1])["model_stats"]
        assert statistics["execution_count"] == 0
        assert statistics["inference_stats"]["success"]["count"] == 0
        rows = {row["name"]: row for row in json.loads(server.post("/v2/repository/index")[1])}
        assert rows["failing"]["state"] == "UNAVAILABLE"
        assert rows["failing"]["reason"].startswith("Invalid argument: failed to run warmup sample 'zeros': ")
        assert "below zero" in rows["failing"]["reason"]
