"""Fixtures of several unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.ipc import wakeup_latency


@pytest.fixture
def latency_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the kernel's, to which is written how long an idle core may take to wake up."""
    path = tmp_path / "cpu_dma_latency"
    path.touch()
    monkeypatch.setattr(wakeup_latency, "_DEVICE", str(path))
    return path
