"""Which zygotes are started before any configuration is read."""

from __future__ import annotations

import pathlib

import pytest

from forebay.engine.supervisor.likely_families import likely_families


@pytest.mark.parametrize(
    ("models", "families"), [(None, ["onnxruntime", "python"]), (("scripted",), ["python"]), ((), [])]
)
def test_files_of_the_models_that_will_be_loaded_tell(
    tmp_path: pathlib.Path, models: tuple[str, ...] | None, families: list[str]
) -> None:
    for name in ("network/1/model.onnx", "scripted/1/model.py", "scripted/notes/model.pt", "data/model.xml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert sorted(likely_families([str(tmp_path), str(tmp_path / "missing")], models)) == families
