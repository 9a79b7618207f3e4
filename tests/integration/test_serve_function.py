"""``forebay serve module:function``: a Python function is a model like any other."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from forebay_server import ForebayServer

SOURCE = """
import forebay

@forebay.model(inputs={"x": "FP32[3]"}, outputs={"total": "FP32[1]"}, max_batch_size=8, instances=2)
def total(x):
    return x.sum(axis=1, keepdims=True)
"""


def test_function_is_served_with_batching_beside_an_empty_repository(tmp_path: Path) -> None:
    """L-021 among others: its code runs in workers only."""
    (tmp_path / "functions_under_test.py").write_text(SOURCE)
    (tmp_path / "models").mkdir()
    environment = {"PYTHONPATH": str(tmp_path)}
    with ForebayServer(tmp_path / "models", "functions_under_test:total", environment=environment) as server:
        base = f"http://127.0.0.1:{server.http_port}/v2/models/total"
        with urllib.request.urlopen(f"{base}/config") as reply:
            config = json.load(reply)
        assert config["max_batch_size"] == 8
        assert config["instance_group"][0]["count"] == 2
        assert "dynamic_batching" in config
        body = {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}]}
        with urllib.request.urlopen(f"{base}/infer", data=json.dumps(body).encode()) as reply:
            answer = json.load(reply)
    assert answer["outputs"] == [{"name": "total", "datatype": "FP32", "shape": [2, 1], "data": [6.0, 15.0]}]
