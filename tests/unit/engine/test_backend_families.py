"""Which zygote runs a backend, and what is said when its library is missing."""

from __future__ import annotations

import importlib.util

import pytest

from forebay.engine.backend_families import FAMILIES, family_of, missing_library


def test_backends_without_a_framework_share_one_zygote() -> None:
    assert family_of("onnxruntime") == "onnxruntime"
    assert {family_of(name) for name in ("python", "identity", "anything")} == {"python"}


def test_missing_framework_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert missing_library("python") is None
    assert missing_library("pytorch") == (
        "backend 'pytorch' needs PyTorch, which is not installed; install it with: pip install 'forebay[torch]'"
    )
    assert (missing_library("onnxruntime") or "").endswith("pip install 'onnxruntime'")
    assert all(missing_library(name) for name, family in FAMILIES.items() if family.library)
