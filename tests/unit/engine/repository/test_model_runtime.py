"""What runs a model: backends of ours, and those that are a ``model.py`` (spec P-134, R-044)."""

from __future__ import annotations

import pathlib

import pytest

from forebay.engine.repository.model_runtime import ModelRuntime, find_runtime
from forebay.ipc.errors import InvalidArgument


def install(directory: pathlib.Path, backend: str) -> pathlib.Path:
    """Write an installed backend; return its file."""
    file = directory / backend / "model.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    return file


@pytest.mark.parametrize("backend", ["onnxruntime", "python", "identity"])
def test_backends_of_ours_need_no_file_and_are_not_replaced_by_one(tmp_path: pathlib.Path, backend: str) -> None:
    install(tmp_path, backend)
    assert find_runtime(backend, str(tmp_path)) == ModelRuntime(backend)


def test_others_are_found_in_the_backend_directory(tmp_path: pathlib.Path) -> None:
    file = install(tmp_path, "twice")
    assert find_runtime("twice", str(tmp_path)) == ModelRuntime("python", str(file))


@pytest.mark.parametrize("backend", ["twice", "../twice", "..", "a/b", "x" * 300])
def test_an_unknown_backend_has_triton_s_text(tmp_path: pathlib.Path, backend: str) -> None:
    install(tmp_path, "twice")
    with pytest.raises(InvalidArgument) as caught:
        find_runtime(backend, str(tmp_path / "backends"))
    assert caught.value.text == (
        f"unable to find backend library for backend '{backend}', try specifying runtime on the model configuration."
    )
