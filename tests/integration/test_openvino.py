"""OpenVINO models, made here and served (spec B-060..B-064, R-035). Skipped without the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forebay_server import ForebayServer

openvino: Any = pytest.importorskip("openvino")

_CPU = "instance_group [ { count: 1 kind: KIND_CPU } ]\n"


def write_model(models: Path, name: str, shape: list[int], config: str = "") -> Path:
    """Write a model that doubles float32 X of ``shape`` into Y; return its directory."""
    from openvino import opset13 as operations

    source = operations.parameter(shape, np.float32, name="X")
    source.output(0).get_tensor().set_names({"X"})
    doubled = operations.multiply(source, operations.constant(np.float32(2)))
    doubled.output(0).get_tensor().set_names({"Y"})
    (models / name / "1").mkdir(parents=True)
    model = openvino.Model([operations.result(doubled)], [source], name)
    openvino.save_model(model, models / name / "1" / "model.xml", compress_to_fp16=False)
    if config:
        (models / name / "config.pbtxt").write_text(f'backend: "openvino"\n{_CPU}{config}')
    return models / name


def tensors(dims: str, *, batch: int = 0, data_type: str = "TYPE_FP32", parameters: str = "") -> str:
    listed = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in (pair.split("=") for pair in parameters.split())
    )
    return (
        f'max_batch_size: {batch}\ninput [ {{ name: "X" data_type: {data_type} dims: [ {dims} ] }} ]\n'
        f'output [ {{ name: "Y" data_type: {data_type} dims: [ {dims} ] }} ]\n{listed}'
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("openvino") / "models"
    every_parameter = (
        "PERFORMANCE_HINT=THROUGHPUT INFERENCE_NUM_THREADS=1 COMPILATION_NUM_THREADS=1 NUM_STREAMS=AUTO "
        "SKIP_OV_DYNAMIC_BATCHSIZE=YES"
    )
    write_model(models, "completed", [-1, 3])
    write_model(models, "batching", [-1, 3], tensors("3", batch=8, parameters=every_parameter))
    write_model(models, "fixed", [4, 3], tensors("3", batch=4))
    write_model(models, "padded", [4, 3], tensors("3", batch=4, parameters="ENABLE_BATCH_PADDING=YES"))
    write_model(models, "reshaped", [2, 3], tensors("2, 5", parameters="RESHAPE_IO_LAYERS=YES"))
    write_model(models, "converted", [-1, 3], tensors("3", batch=8, data_type="TYPE_INT32"))
    write_model(models, "scalar", [], tensors("1"))
    write_model(models, "bad_hint", [-1, 3], tensors("3", batch=8, parameters="PERFORMANCE_HINT=FAST"))
    write_model(models, "bad_name", [-1, 3], tensors("3", batch=8).replace('"X"', '"Z"'))
    (write_model(models, "broken", [-1, 3], tensors("3", batch=8)) / "1" / "model.xml").write_text("no model")
    flags = ("--exit-on-error=false", "--strict-readiness=false")
    with ForebayServer(models, *flags, protocols=("http",)) as running:
        yield running


def infer(server: ForebayServer, model: str, array: np.ndarray[Any, Any]) -> tuple[int, Any]:
    """Return the status and the answer's Y, or the error's text."""
    tensor = {
        "name": "X",
        "datatype": {"float32": "FP32", "int32": "INT32"}[array.dtype.name],
        "shape": list(array.shape),
        "data": array.reshape(-1).tolist(),
    }
    status, body = server.post(f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())
    answer = json.loads(body)
    if status != 200:
        return status, answer["error"]
    return status, np.array(answer["outputs"][0]["data"]).reshape(answer["outputs"][0]["shape"])


def rows(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3)


@pytest.mark.parametrize(("model", "count"), [("completed", 2), ("batching", 8), ("batching", 1), ("fixed", 4)])
def test_batches_are_answered(server: ForebayServer, model: str, count: int) -> None:
    status, answer = infer(server, model, rows(count))
    assert status == 200, answer
    np.testing.assert_array_equal(answer, 2 * rows(count))


def test_configuration_is_completed_from_the_file(server: ForebayServer) -> None:
    """Spec B-063, R-035."""
    _status, body = server.get("/v2/models/completed/config")
    config = json.loads(body)
    assert (config["backend"], config["platform"], config["max_batch_size"]) == ("openvino", "", 4)
    assert [(tensor["name"], tensor["data_type"], tensor["dims"]) for tensor in config["input"]] == [
        ("X", "TYPE_FP32", [3])
    ]


def test_fixed_batch_takes_exactly_so_many_rows(server: ForebayServer) -> None:
    """Spec B-062."""
    status, text = infer(server, "fixed", rows(2))
    assert status == 500
    assert text.startswith("expected requests with batch size '4', got '2'... this error can be avoided by setting")


def test_fixed_batch_is_padded_on_request(server: ForebayServer) -> None:
    """Spec B-062."""
    status, answer = infer(server, "padded", rows(2))
    assert status == 200, answer
    np.testing.assert_array_equal(answer, 2 * rows(2))


def test_inputs_are_reshaped_on_request(server: ForebayServer) -> None:
    """Spec B-061."""
    array = np.arange(10, dtype=np.float32).reshape(2, 5)
    status, answer = infer(server, "reshaped", array)
    assert status == 200, answer
    np.testing.assert_array_equal(answer, 2 * array)


def test_datatypes_are_converted_to_those_of_the_configuration(server: ForebayServer) -> None:
    status, answer = infer(server, "converted", rows(2).astype(np.int32))
    assert status == 200, answer
    np.testing.assert_array_equal(answer, 2 * rows(2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("scalar", "OpenVINO backend takes no scalars"),
        (
            "bad_hint",
            "expected the parameter 'PERFORMANCE_HINT' to be LATENCY/THROUGHPUT/CUMULATIVE_THROUGHPUT, got fast",
        ),
        ("bad_name", "unexpected inference input 'Z', allowed inputs are: X"),
        ("broken", "openvino error in reading model : "),
    ],
)
def test_a_model_that_cannot_be_served_says_why(server: ForebayServer, model: str, reason: str) -> None:
    _status, body = server.post("/v2/repository/index")
    (row,) = [row for row in json.loads(body) if row["name"] == model]
    assert row["state"] == "UNAVAILABLE"
    assert reason in row["reason"]
    assert "/tmp" not in row["reason"]
