"""Ragged batches in a real server: requests of different shapes run together (spec S-140, S-147, S-148)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from forebay_server import ForebayServer, wait_until
from ragged_models import BATCH_TENSORS_TEXT, CONFIG_TEXT, PYTHON_MODEL, double_onnx

import forebay.client.shm


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("models")
    files: dict[str, tuple[str, bytes, str]] = {
        "python": ("model.py", PYTHON_MODEL.encode(), ""),
        "onnxruntime": ("model.onnx", double_onnx(), BATCH_TENSORS_TEXT),
    }
    for backend, (name, content, extra) in files.items():
        (models / backend / "1").mkdir(parents=True)
        (models / backend / "1" / name).write_bytes(content)
        (models / backend / "config.pbtxt").write_text(CONFIG_TEXT.format(backend=backend) + extra)
    with ForebayServer(models) as server:
        yield server


def _infer(server: ForebayServer, model: str, rows: list[list[int]]) -> dict[str, Any]:
    body = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [len(rows), len(rows[0])], "data": rows}]}
    status, answer = server.post(f"/v2/models/{model}/infer", json.dumps(body).encode())
    assert status == 200, answer
    return {output["name"]: (output["shape"], output["data"]) for output in json.loads(answer)["outputs"]}


@pytest.mark.parametrize("model", ["onnxruntime", "python"])
def test_requests_of_different_shapes_share_an_execution(server: ForebayServer, model: str) -> None:
    """Without the other, each would wait for half a minute."""
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(_infer, server, model, [[1, 2, 3]])
        long = pool.submit(_infer, server, model, [[4, 5, 6, 7, 8]])
        assert short.result() == {"Y": ([1, 3], [2, 4, 6]), "SHAPE": ([1, 1], [3])}
        assert long.result() == {"Y": ([1, 5], [8, 10, 12, 14, 16]), "SHAPE": ([1, 1], [5])}

    def counts() -> tuple[int, int]:
        [statistics] = json.loads(server.get(f"/v2/models/{model}/stats")[1])["model_stats"]
        return statistics["execution_count"], statistics["inference_count"]

    # A worker counts an execution when it has ended, which is after its answers have left.
    wait_until(lambda: counts()[0] > 0, "the execution to be counted")
    assert counts() == (1, 2)


def test_clients_in_shared_memory_join_others(server: ForebayServer) -> None:
    with forebay.client.shm.connect(server.runtime_base) as engine, ThreadPoolExecutor(1) as pool:
        other = pool.submit(_infer, server, "onnxruntime", [[1, 2, 3]])
        model = engine.model("onnxruntime")
        model.input("X", shape=(1, 2))[:] = [[4, 5]]
        model.infer()
        assert model.output("Y").tolist() == [[8, 10]]
        assert other.result()["Y"] == ([1, 3], [2, 4, 6])


def test_metadata_do_not_show_the_tensors_of_the_batch(server: ForebayServer) -> None:
    """Spec S-148."""
    metadata = json.loads(server.get("/v2/models/onnxruntime")[1])
    assert metadata["inputs"] == [{"name": "X", "datatype": "FP32", "shape": [-1, -1]}]
