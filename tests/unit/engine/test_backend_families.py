"""Which backends can run here, and what is said of those that cannot."""

from __future__ import annotations

import importlib.util

import pytest

from forebay.engine.backend_families import FAMILIES, family_of, missing_library


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that count as installed."""
    packages: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    return packages


def test_missing_framework_comes_with_the_command_that_installs_it(installed: set[str]) -> None:
    assert missing_library("pytorch") == (
        "backend 'pytorch' needs PyTorch, which is not installed; install it with: pip install 'forebay[torch]'"
    )
    installed.add("torch")
    assert missing_library("pytorch") is None


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx", "tensorrt_lean"])
def test_any_tensorrt_library_will_do(installed: set[str], library: str) -> None:
    assert missing_library("tensorrt") is not None
    installed.add(library)
    assert missing_library("tensorrt") is None


def test_backends_without_a_framework_always_run(installed: set[str]) -> None:
    for backend in ("identity", "python", "forebay_function"):
        assert family_of(backend) == "python"
        assert missing_library(backend) is None
    assert FAMILIES["python"].library == ""
