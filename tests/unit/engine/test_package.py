"""What ``import forebay`` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import forebay
from forebay.engine.model_functions import model


def test_declares_functions_as_models() -> None:
    assert forebay.model is model
    assert "model" in forebay.__all__


def test_says_what_it_has_not() -> None:
    with pytest.raises(AttributeError, match="module 'forebay' has no attribute 'modle'"):
        _ = forebay.modle  # type: ignore[attr-defined]


def test_imports_nothing_unasked() -> None:
    """Every process of the server comes past it."""
    code = "import sys, forebay.ipc; print('numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"
