"""``forebay validate``: what it finds, prints and returns. Loading has its tests with real processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forebay_server import CONF_MODELS

from forebay.engine.command_line import parse_command_line
from forebay.engine.validate_command import run


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    shutil.copytree(CONF_MODELS / "alpha_model", tmp_path / "alpha_model")
    return tmp_path


def validate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Return exit code and what was printed."""
    code = run(parse_command_line(["validate", *map(str, words)], {}))
    return code, capsys.readouterr().out


def validate_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, dict[str, Any]]]:
    code, text = validate(capsys, *words, "--json")
    document = json.loads(text)
    assert document["valid"] == (code == 0)
    return code, {model["name"]: model for model in document["models"]}


def edit(repository: Path, old: str, new: str) -> None:
    path = repository / "alpha_model" / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def texts(model: dict[str, Any]) -> list[str]:
    return [problem["text"] for problem in model["problems"]]


def test_sound_repository_is_exit_code_0(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    code, text = validate(capsys, repository)
    assert code == 0
    assert [line.split() for line in text.splitlines()[2:3]] == [["alpha_model", "1,", "2", "onnxruntime", "✓"]]
    assert text.splitlines()[-1] == "1 model, all can be served"


def test_model_whose_package_is_missing_is_not_said_to_be_servable(
    capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    """It is no defect of the repository, so the exit code stays 0."""
    lacking = 'parameters { key: "forebay_packages" value { string_value: "no-such-package-1" } }'
    with (repository / "alpha_model" / "config.pbtxt").open("a") as config:
        config.write(lacking)
    code, text = validate(capsys, repository)
    assert code == 0
    assert "- not installed" in text
    assert "pip install no-such-package-1" in text.replace("'", "")
    assert text.splitlines()[-1] == "1 model, 1 can be served once what it lacks is installed"


def test_every_problem_is_told_with_its_place(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    edit(repository, "max_queue_delay_microseconds", "max_queue_delay_microsecond")
    edit(repository, "instance_group", "instance_groups")
    code, models = validate_json(capsys, repository)
    assert code == 1
    problems = models["alpha_model"]["problems"]
    assert [problem["suggestion"] for problem in problems] == ["instance_group", "max_queue_delay_microseconds"]
    assert all(problem["file"] == "alpha_model/config.pbtxt" and problem["line"] for problem in problems)


def test_problems_of_one_model_do_not_hide_those_of_another(
    capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    shutil.copytree(repository / "alpha_model", repository / "beta_model")
    (repository / "empty_model").mkdir()
    edit(repository, "kind: KIND_CPU", "kind: KIND_GPU\n    gpus: [ 9 ]")
    code, models = validate_json(capsys, repository)
    assert code == 1
    assert "gpu id 9" in texts(models["alpha_model"])[0]
    assert "directory name must equal model name" in texts(models["beta_model"])[0]
    assert not models["empty_model"]["valid"]


def test_missing_files_are_told(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    (repository / "alpha_model" / "2" / "model.onnx").unlink()
    edit(repository, "dims: [ 1 ]", 'dims: [ 1 ]\n    label_filename: "labels.txt"')
    _code, models = validate_json(capsys, repository)
    assert texts(models["alpha_model"])[0] == "version 2 has no 'model.onnx'"
    assert "labels.txt" in texts(models["alpha_model"])[1]


def test_model_of_two_repositories_is_a_problem(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Spec R-010; not with namespaces (R-015)."""
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(repository / "alpha_model", other / "alpha_model")
    assert validate(capsys, repository, other)[0] == 1
    assert validate(capsys, repository, other, "--model-namespacing=true")[0] == 0


def ensemble(step_output: str) -> str:
    return f"""
platform: "ensemble"
max_batch_size: 64
input [ {{ name: "in" data_type: TYPE_FP32 dims: [ 50 ] }} ]
output [ {{ name: "out" data_type: TYPE_FP32 dims: [ 1 ] }} ]
ensemble_scheduling {{ step [ {{
  model_name: "alpha_model" model_version: -1
  input_map {{ key: "features" value: "in" }} output_map {{ key: "{step_output}" value: "out" }}
}} ] }}
"""


@pytest.mark.parametrize(("step_output", "code"), [("prediction", 0), ("predictions", 1)])
def test_ensembles_are_compared_with_their_models(
    capsys: pytest.CaptureFixture[str], repository: Path, step_output: str, code: int
) -> None:
    """Spec S-102."""
    (repository / "ens" / "1").mkdir(parents=True)
    (repository / "ens" / "config.pbtxt").write_text(ensemble(step_output))
    found, models = validate_json(capsys, repository)
    assert found == code
    assert bool(models["ens"]["problems"]) == bool(code)


def test_ensemble_of_a_broken_model_says_so(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    (repository / "ens" / "1").mkdir(parents=True)
    (repository / "ens" / "config.pbtxt").write_text(ensemble("prediction"))
    edit(repository, "max_batch_size: 64", "max_batch_size: -1")
    _code, models = validate_json(capsys, repository)
    assert texts(models["ens"]) == ["ensemble 'ens' depends on 'alpha_model' which is not valid"]


def test_incomplete_configuration_is_noted(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    (repository / "alpha_model" / "config.pbtxt").unlink()
    code, models = validate_json(capsys, repository)
    assert code == 0
    assert models["alpha_model"]["notes"] == ["inputs and outputs are taken from the model file when it is loaded"]


def test_repository_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Spec R-012."""
    assert run(parse_command_line(["validate", str(tmp_path / "nothing")], {})) == 1
    assert "does not exist" in capsys.readouterr().err


def test_an_objective_that_cannot_be_kept_is_found(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    edit(
        repository, "dynamic_batching {",
        'parameters { key: "forebay_slo_ms" value { string_value: "soon" } } dynamic_batching {',
    )  # fmt: skip
    code, models = validate_json(capsys, repository)
    assert code == 1
    (text,) = texts(models["alpha_model"])
    assert text.startswith("parameter 'forebay_slo_ms' of model 'alpha_model' must be a number of milliseconds")


def test_a_model_of_passive_instances_only_is_found(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    """Spec C-098."""
    edit(repository, "    count: 2", "    count: 2 passive: true")
    code, models = validate_json(capsys, repository)
    assert code == 1
    assert texts(models["alpha_model"]) == [
        "model 'alpha_model' has passive instances only, which get no requests; add an instance_group without 'passive'"
    ]
