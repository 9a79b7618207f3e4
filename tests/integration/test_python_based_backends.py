"""Backends that are a ``model.py`` in the backend directory (spec P-134, R-040)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server import ForebayServer

#: Multiplies by what the model's own file says; completes the configuration of models that have none.
BACKEND = """
import json, os
import triton_python_backend_utils as pb_utils
from scaling import scale

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "X", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "Y", "data_type": "TYPE_FP32", "dims": [-1]})
        config.set_max_batch_size(0)
        return config

    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.json")
        with open(path) as file:
            self.factor = json.load(file)["factor"]

    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("Y", scale(pb_utils.get_input_tensor_by_name(request, "X").as_numpy(), self.factor))]
            )
            for request in requests
        ]
"""

SCALING = """
def scale(array, factor):
    return array * array.dtype.type(factor)
"""

CONFIG = """
backend: "scaling_backend"
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def write_model(models: Path, name: str, factor: int, config: str = CONFIG) -> Path:
    """Write a model that has no code of its own; return its directory."""
    (models / name / "1").mkdir(parents=True)
    if config:
        (models / name / "config.pbtxt").write_text(config)
    (models / name / "1" / "model.json").write_text(json.dumps({"factor": factor}))
    return models / name


def write_backend(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.py").write_text(BACKEND)
    (directory / "scaling.py").write_text(SCALING)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    folder = tmp_path_factory.mktemp("based")
    write_backend(folder / "backends" / "scaling_backend")
    models = folder / "models"
    write_model(models, "twice", 2)
    write_model(models, "thrice", 3)
    # Without a configuration the model's name says the backend (spec R-040).
    write_model(models, "by_name.scaling_backend", 4, config="")
    write_model(models, "lost", 5, CONFIG.replace("scaling_backend", "nonexist"))
    lost_too = write_model(models, "lost_too", 6, CONFIG.replace("scaling_backend", "nonexist"))
    for directory in (lost_too, lost_too / "1"):
        write_backend(directory)
    flags = (f"--backend-directory={folder / 'backends'}", "--exit-on-error=false", "--strict-readiness=false")
    with ForebayServer(models, *flags, protocols=("http",)) as running:
        yield running


def infer(server: ForebayServer, model: str) -> Any:
    tensor = {"name": "X", "datatype": "FP32", "shape": [2], "data": [1.5, -2]}
    status, body = server.post(f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())
    assert status == 200, body
    return json.loads(body)["outputs"][0]["data"]


@pytest.mark.parametrize(("model", "factor"), [("twice", 2), ("thrice", 3), ("by_name.scaling_backend", 4)])
def test_models_share_the_code_of_their_backend(server: ForebayServer, model: str, factor: int) -> None:
    assert infer(server, model) == [1.5 * factor, -2 * factor]


def test_metadata_and_configuration_name_the_backend(server: ForebayServer) -> None:
    """Spec H-038: the client sees what the model's author wrote."""
    _status, body = server.get("/v2/models/twice")
    assert json.loads(body)["platform"] == "scaling_backend"
    _status, body = server.get("/v2/models/twice/config")
    config = json.loads(body)
    assert config["backend"] == "scaling_backend"
    assert [tensor["name"] for tensor in config["input"]] == ["X"]


@pytest.mark.parametrize("model", ["lost", "lost_too"])
def test_unknown_backend_has_triton_s_text(server: ForebayServer, model: str) -> None:
    """Spec R-044: a ``model.py`` among a model's own files is no backend."""
    _status, body = server.post("/v2/repository/index")
    (row,) = [row for row in json.loads(body) if row["name"] == model]
    assert row["reason"] == (
        "Invalid argument: unable to find backend library for backend 'nonexist', try specifying runtime on the model "
        "configuration."
    )
