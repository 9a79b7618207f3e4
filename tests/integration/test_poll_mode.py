"""Control mode ``poll``: what people do to a repository while it is being served (spec R-081, L-013)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forebay_server import ForebayServer
from scheduling_models import add_python_model

MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", value * FACTOR)]) for value in inputs]
"""

CONFIG = """
backend: "python"
max_batch_size: 0
input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }
instance_group { kind: KIND_CPU }
"""


def source(factor: int) -> str:
    return MODEL.replace("FACTOR", str(factor))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    add_python_model(models, "times", source(2), CONFIG)
    return models


@pytest.fixture
def server(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(repository, "--model-control-mode=poll", "--repository-poll-secs=1") as running:
        yield running


def factor_of(server: ForebayServer, model: str = "times") -> float:
    """Return what a model multiplies by; 0: it does not serve."""
    document = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [1], "data": [1]}]}
    status, body = server.post(f"/v2/models/{model}/infer", json.dumps(document).encode())
    return float(json.loads(body)["outputs"][0]["data"][0]) if status == 200 else 0


def index(server: ForebayServer) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(server.post("/v2/repository/index")[1])
    return rows


def wait_reason(server: ForebayServer, text: str) -> None:
    server.wait_for(lambda: any(text in row.get("reason", "") for row in index(server)), f"the reason {text!r}")


def wait_factor(server: ForebayServer, factor: float, model: str = "times") -> None:
    server.wait_for(lambda: factor_of(server, model) == factor, f"{model} to multiply by {factor}")


def test_models_come_and_go(server: ForebayServer, repository: Path) -> None:
    add_python_model(repository.parent, "staged", source(3), CONFIG)
    (repository.parent / "staged").rename(repository / "thrice")
    wait_factor(server, 3, "thrice")
    shutil.rmtree(repository / "thrice")
    server.wait_for(lambda: [row["name"] for row in index(server)] == ["times"], "it to be gone again")
    assert factor_of(server) == 2


def test_a_new_version_that_is_broken_harms_nobody_and_is_forgotten_with_its_directory(
    server: ForebayServer, repository: Path
) -> None:
    """Spec R-086: the old version serves; the server is not ready as long as the broken one is there."""
    (repository / "times/2").mkdir()
    (repository / "times/2/model.py").write_text("def broken(:")
    wait_reason(server, "SyntaxError")
    assert factor_of(server) == 2
    assert server.get("/v2/health/ready")[0] == 400
    shutil.rmtree(repository / "times/2")
    server.wait_for(lambda: server.get("/v2/health/ready")[0] == 200, "the server to be ready again")
    assert index(server) == [{"name": "times", "version": "1", "state": "READY"}]
    assert factor_of(server) == 2


def _as_directory(path: Path) -> None:
    path.mkdir()


def _as_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _as_noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [(_as_directory, "is not a file"), (_as_link_to_itself, "symbolic links"), (_as_noise, "update failed: ")],
)
def test_a_configuration_that_is_none_is_not_taken(
    server: ForebayServer, repository: Path, replace: Callable[[Path], None], reason: str
) -> None:
    config = repository / "times/config.pbtxt"
    config.unlink()
    replace(config)
    wait_reason(server, reason)
    assert factor_of(server) == 2


def test_the_reason_is_that_of_the_last_change(server: ForebayServer, repository: Path) -> None:
    config = repository / "times/config.pbtxt"
    config.write_text("first_nonsense: 1")
    wait_reason(server, "first_nonsense")
    config.write_text("second_nonsense: 1")
    wait_reason(server, "second_nonsense")
    config.write_text(CONFIG)
    server.wait_for(lambda: "reason" not in index(server)[0], "all to be well")
    assert factor_of(server) == 2


def test_a_link_that_is_swapped_is_an_update(server: ForebayServer, repository: Path) -> None:
    """As volumes of Kubernetes are updated: what is behind the link changes in one step (spec R-014)."""
    for number in (5, 7):
        add_python_model(repository / ".store", str(number), source(number), CONFIG)
    link, coming = repository / "linked", repository / ".coming"
    for number in (5, 7):
        coming.symlink_to(f".store/{number}")
        coming.rename(link)
        wait_factor(server, number, "linked")
