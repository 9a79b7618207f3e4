"""Log settings at run time, in every process that logs (spec H-261..H-263, O-042, P-118)."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server import ForebayServer, wait_until

_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        pb_utils.Logger.log_info("told by the model")
        pb_utils.Logger.log_verbose("told at length")
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.zeros(1, np.float32))]) for _ in requests]
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForebayServer]:
    directory = tmp_path / "teller"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(_MODEL)
    (directory / "config.pbtxt").write_text(
        'backend: "python"\ninput { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }\n'
    )
    with ForebayServer(tmp_path, "--model-control-mode=explicit", "--load-model=*") as server:
        yield server


def _post(server: ForebayServer, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        answer = reply.read()
        return json.loads(answer) if answer else None


def test_workers_follow_and_so_do_those_that_come_later(server: ForebayServer) -> None:
    def infer() -> None:
        _post(
            server,
            "/v2/models/teller/infer",
            {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1], "data": [1]}]},
        )

    infer()
    wait_until(lambda: server.stderr.count("told by the model") == 1, "the line")
    assert "told at length" not in server.stderr
    found = _post(server, "/v2/logging", {"log_info": False, "log_verbose_level": 1})
    assert (found["log_info"], found["log_verbose_level"]) == (False, 1)
    infer()
    wait_until(lambda: server.stderr.count("told at length") == 1, "the verbose line")
    assert server.stderr.count("told by the model") == 1
    _post(server, "/v2/repository/models/teller/unload", {})
    _post(server, "/v2/repository/models/teller/load", {})
    infer()
    wait_until(lambda: server.stderr.count("told at length") == 2, "the verbose line of another worker")
    assert server.stderr.count("told by the model") == 1
    _post(server, "/v2/logging", {"log_format": "ISO8601", "log_info": True})
    infer()
    wait_until(lambda: server.stderr.count("told by the model") == 2, "the line")
    line = next(line for line in reversed(server.stderr.splitlines()) if "told by the model" in line)
    assert line[4] == "-"
    assert line[10] == "T"
