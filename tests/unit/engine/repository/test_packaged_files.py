"""Models that use installed packages."""

from __future__ import annotations

import os

import pytest

from forebay.engine.repository.config import parse_config_bytes
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.packaged_files import MODEL_FILE, PACKAGES, missing_packages, packaged_model_file
from forebay.ipc.errors import InvalidArgument, NotFound


def config(name: str, value: str) -> ModelConfig:
    text = f'name: "m" parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
    return parse_config_bytes(text.encode(), "config.pbtxt")


def test_a_model_without_the_parameters_needs_nothing() -> None:
    assert missing_packages(config("other", "x")) is None
    assert packaged_model_file(config("other", "x")) == ""


def test_what_is_missing_is_named_with_the_command() -> None:
    assert missing_packages(config(PACKAGES, "numpy>=1.0 pytest")) is None
    assert missing_packages(config(PACKAGES, "numpy no-such-thing>=1.0")) == (
        "model 'm' needs the package 'no-such-thing>=1.0', which is not installed; install with: pip install "
        "'no-such-thing>=1.0'"
    )
    several = missing_packages(config(PACKAGES, "no-such-thing nor-this"))
    assert several is not None
    assert several.endswith("which are not installed; install with: pip install 'no-such-thing' 'nor-this'")


def test_requirements_must_begin_with_a_name() -> None:
    with pytest.raises(InvalidArgument, match="must list packages"):
        missing_packages(config(PACKAGES, ">=1.0"))


def test_a_file_of_a_package_is_found_where_it_is_installed() -> None:
    path = packaged_model_file(config(MODEL_FILE, "numpy:numpy/__init__.py"))
    assert os.path.isfile(path)


@pytest.mark.parametrize(
    "reference", ["numpy:numpy/no_such_file", "numpy:../../../../../../../etc/hostname", "numpy:."]
)
def test_nothing_outside_the_installed_packages_can_be_named(reference: str) -> None:
    with pytest.raises(NotFound, match="package 'numpy' has no file"):
        packaged_model_file(config(MODEL_FILE, reference))


def test_a_file_of_a_package_that_is_not_there() -> None:
    with pytest.raises(NotFound, match="'no-such-thing', which is not installed"):
        packaged_model_file(config(MODEL_FILE, "no-such-thing:x"))


@pytest.mark.parametrize("reference", ["numpy", "numpy:", ":x", "a b:x"])
def test_references_have_a_package_and_a_path(reference: str) -> None:
    with pytest.raises(InvalidArgument, match="must be '<package>:<path>'"):
        packaged_model_file(config(MODEL_FILE, reference))
