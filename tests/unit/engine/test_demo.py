"""``forebay demo``: what it needs, said before anything is started."""

from __future__ import annotations

import importlib.util

import pytest

from forebay.engine.demo import main


def test_says_how_to_install_a_missing_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain installation has no tritonclient: that is an extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main() == 1
    assert "pip install 'forebay[demo]'" in capsys.readouterr().err
