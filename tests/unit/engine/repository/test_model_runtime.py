"""What runs a model: backends of ours, and those that are a ``model.py`` (spec P-134, R-044)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from forebay.engine.repository.model_runtime import ModelRuntime, find_runtime
from forebay.engine.repository.repository import ModelRepository
from forebay.ipc.errors import InvalidArgument

MakeRepository = Callable[[dict[str, str | bytes | None]], pathlib.Path]

CONFIG = 'backend: "twice"'


def find(root: pathlib.Path, backend: str, directory: pathlib.Path | str = "/nowhere") -> ModelRuntime:
    return find_runtime(backend, ModelRepository([str(root)]).poll_model("m"), 1, str(directory))


@pytest.mark.parametrize("backend", ["onnxruntime", "python", "identity"])
def test_backends_of_ours_need_no_file_and_are_not_replaced_by_one(
    make_repository: MakeRepository, tmp_path: pathlib.Path, backend: str
) -> None:
    root = make_repository({"m/config.pbtxt": f'backend: "{backend}"', "m/1/model.py": "", "m/model.py": ""})
    (tmp_path / "backends" / backend).mkdir(parents=True)
    (tmp_path / "backends" / backend / "model.py").write_text("")
    assert find(root, backend, tmp_path / "backends") == ModelRuntime(backend)


def test_the_version_s_file_comes_before_the_model_s_and_the_installed_one(
    make_repository: MakeRepository, tmp_path: pathlib.Path
) -> None:
    installed = tmp_path / "backends" / "twice" / "model.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    root = make_repository({"m/config.pbtxt": CONFIG, "m/1/model.py": "", "m/model.py": ""})
    for path in (root / "m" / "1" / "model.py", root / "m" / "model.py"):
        assert find(root, "twice", tmp_path / "backends") == ModelRuntime("python", str(path))
        path.unlink()
    assert find(root, "twice", tmp_path / "backends") == ModelRuntime("python", str(installed))


@pytest.mark.parametrize("backend", ["twice", "../twice", "..", "a/b", "x" * 300])
def test_an_unknown_backend_has_triton_s_text(
    make_repository: MakeRepository, tmp_path: pathlib.Path, backend: str
) -> None:
    root = make_repository({"m/config.pbtxt": f'backend: "{backend}"', "m/1/weights": ""})
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "model.py").write_text("")
    with pytest.raises(InvalidArgument) as caught:
        find(root, backend, tmp_path / "backends")
    assert caught.value.text == (
        f"unable to find backend library for backend '{backend}', try specifying runtime on the model configuration."
    )
