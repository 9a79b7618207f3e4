"""A server of TensorRT plans, over a stand-in library: completion, shape tensors, profiles (R-065, B-070)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import tritonclient.http as httpclient
from forebay_server import ForebayServer

from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE

SUPPORT = Path(fake_tensorrt.__file__).parent

#: Values of the shape tensor by profile: least, usual, largest; the batch size comes first.
SMALL, LARGE = [[1, 1, 1], [1, 2, 3], [2, 6, 6]], [[1, 1, 1], [5, 2, 3], [5, 6, 6]]


def serving(root: Path, *flags: str) -> ForebayServer:
    path = os.pathsep.join(map(str, (SUPPORT / "played_tensorrt", SUPPORT)))
    environment = {PLAYED_GPUS_VARIABLE: "1", "PYTHONPATH": path}
    return ForebayServer(root, "--exit-on-error=false", "--strict-readiness=false", *flags, environment=environment)


def add_plan(root: Path, name: str, config: str = "") -> None:
    """Add a model of two profiles."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.plan").write_text(json.dumps([SMALL, LARGE]))
    if config:
        (root / name / "config.pbtxt").write_text(config)


def both_profiles(more: str = "") -> str:
    return f'platform: "tensorrt_plan" instance_group {{ kind: KIND_GPU profile: ["0", "1"] }} {more}'


def infer(server: ForebayServer, model: str, rows: int, size: tuple[int, int]) -> Any:
    with httpclient.InferenceServerClient(server.http_url) as client:
        x = httpclient.InferInput("x", [rows, 6], "FP32")
        x.set_data_from_numpy(np.arange(rows * 6, dtype=np.float32).reshape(rows, 6))
        shape = httpclient.InferInput("size", [2], "INT32")
        shape.set_data_from_numpy(np.array(size, np.int32))
        return client.infer(model, [x, shape])


def reasons(server: ForebayServer) -> dict[str, str]:
    _status, body = server.post("/v2/repository/index", b"{}")
    return {each["name"]: each.get("reason", "") for each in json.loads(body)}


def config_of(server: ForebayServer, model: str) -> Any:
    return json.loads(server.get(f"/v2/models/{model}/config")[1])


def test_plans_are_completed_and_answer(tmp_path: Path) -> None:
    add_plan(tmp_path, "bare")
    add_plan(tmp_path, "both", both_profiles())
    with serving(tmp_path) as server:
        config = config_of(server, "bare")
        assert config["max_batch_size"] == 2
        assert [(one["name"], one["dims"], one["is_shape_tensor"]) for one in config["input"]] == [
            ("x", [6], False),
            ("size", [2], True),
        ]
        assert [one["is_shape_tensor"] for one in config["output"]] == [False, True]
        assert config_of(server, "both")["max_batch_size"] == 5
        for model, rows in (("bare", 2), ("both", 1), ("both", 5)):
            answer = infer(server, model, rows, (3, 2))
            assert answer.as_numpy("y").shape == (rows, 3, 2)
            assert answer.as_numpy("y").ravel().tolist() == list(range(rows * 6))
            assert answer.as_numpy("made").tolist() == [[3, 2]] * rows
        wrong = server.post("/v2/models/bare/infer", shape_request(7))
        assert wrong[0] == 400
        assert b"The shape value at index 2 is expected to be in range from 1 to 6, Got: 7" in wrong[1]


def shape_request(width: int) -> bytes:
    inputs = [
        {"name": "x", "shape": [1, 6], "datatype": "FP32", "data": [0.0] * 6},
        {"name": "size", "shape": [2], "datatype": "INT32", "data": [1, width]},
    ]
    return json.dumps({"inputs": inputs}).encode()


SIZE = 'input { name: "size" data_type: TYPE_INT32 dims: [ 2 ] }'
MARKED_X = 'input { name: "x" data_type: TYPE_FP32 dims: [ 6 ] is_shape_tensor: true }'


def test_configurations_that_contradict_a_plan_are_refused(tmp_path: Path) -> None:
    add_plan(tmp_path, "marked", both_profiles(MARKED_X))
    add_plan(tmp_path, "unmarked", both_profiles(SIZE))
    add_plan(tmp_path, "large", both_profiles("max_batch_size: 6"))
    add_plan(tmp_path, "elsewhere", 'platform: "tensorrt_plan" instance_group { kind: KIND_CPU }')
    add_plan(tmp_path, "profile", 'platform: "tensorrt_plan" instance_group { kind: KIND_GPU profile: "2" }')
    with serving(tmp_path) as server:
        found = reasons(server)
    assert "'x' is incorrectly specified as a shape tensor." in found["marked"]
    assert "'size' is incorrectly specified as an execution tensor." in found["unmarked"]
    assert "configuration specified max-batch 6 but TensorRT engine only supports max-batch 5" in found["large"]
    assert "unable to load model 'elsewhere', TensorRT backend supports only GPU device" in found["elsewhere"]
    assert "specified invalid profile 2 . Number of profiles supported by TensorRT engine: 2" in found["profile"]


def test_without_completion_the_instance_says_what_is_wrong(tmp_path: Path) -> None:
    outputs = 'output { name: "y" data_type: TYPE_FP32 dims: [ -1, -1 ] }'
    x = 'input { name: "x" data_type: TYPE_FP32 dims: [ 6 ] }'
    add_plan(tmp_path, "unmarked", both_profiles(f"max_batch_size: 2 {x} {SIZE} {outputs}"))
    with serving(tmp_path, "--disable-auto-complete-config") as server:
        assert (
            "input 'size' for model 'unmarked' is a shape tensor but the model configuration doesn't mark it as a "
            "shape tensor."
        ) in reasons(server)["unmarked"]
