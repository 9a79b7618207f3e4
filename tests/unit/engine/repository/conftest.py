"""What the tests of the model repository share."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from forebay.engine.repository.config import parse_config_text
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import Gpu, detect_backend, normalise_defaults, normalise_instance_groups

Normalised = Callable[..., ModelConfig]
MakeRepository = Callable[[dict[str, str | bytes | None]], pathlib.Path]


@pytest.fixture
def data_directory() -> pathlib.Path:
    """tests/data/config."""
    return pathlib.Path(__file__).parents[3] / "data" / "config"


@pytest.fixture
def normalised() -> Normalised:
    """Read a text and fill in its defaults, as for a model directory called ``name`` with one version directory."""

    def make(
        text: str, name: str = "m", files: dict[str, bool] | None = None, gpus: tuple[Gpu, ...] = ()
    ) -> ModelConfig:
        config = parse_config_text(text)
        detect_backend(config, name, files)
        normalise_defaults(config)
        normalise_instance_groups(config, gpus)
        return config

    return make


@pytest.fixture
def make_repository(tmp_path: pathlib.Path) -> MakeRepository:
    """Write files below a new directory; a value of None makes a directory."""

    def make(files: dict[str, str | bytes | None]) -> pathlib.Path:
        root = tmp_path / "models"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root

    return make
