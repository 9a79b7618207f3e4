"""Cache directories hold what is loaded like a model: nobody else may write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forebay.engine.backends.cache_directory import default_cache_directory, make_private_directory


def test_default_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_directory("onnx") == "/somewhere/forebay/onnx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_directory("onnx") == "/home/someone/.cache/forebay/onnx"


def test_directory_is_made_for_this_user(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    make_private_directory(str(path))
    make_private_directory(str(path))
    assert path.stat().st_mode & 0o777 == 0o700


def test_directory_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="everybody may write"):
        make_private_directory(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        make_private_directory(str(tmp_path))
