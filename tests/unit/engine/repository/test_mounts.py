"""Models that lie outside of the repositories, as SageMaker hands them over (spec H-300)."""

from pathlib import Path

import pytest

from forebay.engine.repository.repository import ModelRepository
from forebay.ipc.errors import AlreadyExists, InvalidArgument, NotFound

CONFIG = 'backend: "identity" input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] } ]'


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    (tmp_path / "models").mkdir()
    return ModelRepository([str(tmp_path / "models")])


def write(archive: Path, name: str, config: str = CONFIG) -> str:
    (archive / name / "1").mkdir(parents=True)
    (archive / name / "config.pbtxt").write_text(config)
    return str(archive)


def test_the_only_model_gets_the_name(repository: ModelRepository, tmp_path: Path) -> None:
    url = write(tmp_path / "archive", "inside", f'name: "inside" {CONFIG}')
    repository.mount("hash", url)
    assert repository.mounts() == {"hash": url}
    found = repository.poll_model("hash")
    assert (found.name, found.path, found.problems) == ("hash", f"{url}/inside", ())
    assert found.usable_config.message.name == "hash"
    with pytest.raises(AlreadyExists):
        repository.mount("hash", url)
    repository.unmount("hash")
    assert repository.mounts() == {}
    with pytest.raises(NotFound):
        repository.poll_model("hash")


def test_an_ensemble_gets_the_name_and_its_models_keep_theirs(repository: ModelRepository, tmp_path: Path) -> None:
    write(tmp_path / "archive", "whole", 'platform: "ensemble"')
    url = write(tmp_path / "archive", "part")
    repository.mount("hash", url)
    assert repository.poll_model("hash").path == f"{url}/whole"
    assert repository.poll_model("part").path == f"{url}/part"
    repository.unmount("hash")
    with pytest.raises(NotFound):
        repository.poll_model("part")


def test_what_cannot_be_mounted(repository: ModelRepository, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "two", "a")
    for url, text in (
        (tmp_path / "nope", "does not exist"),
        (tmp_path / "empty", "No model detected"),
        (Path(write(tmp_path / "two", "b")), "More than one model"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            repository.mount("m", str(url))
    with pytest.raises(InvalidArgument):
        repository.mount("../m", str(tmp_path))
    assert repository.mounts() == {}
