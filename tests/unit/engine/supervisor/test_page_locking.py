"""Whether workers on GPUs may come to page-lock an arena; on a machine whose device files are made up."""

from __future__ import annotations

import os

import msgspec
import pytest

from forebay.engine.settings import GpuSettings, MemorySettings, Settings
from forebay.engine.supervisor.page_locking import may_be_page_locked

SETTINGS = Settings(memory=MemorySettings(pinned_pool_byte_size=1000))


def test_only_where_there_may_be_gpus_and_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda _path: ["null", "nvidia7"])
    assert may_be_page_locked(SETTINGS, 1000)
    assert not may_be_page_locked(SETTINGS, 1001)
    assert not may_be_page_locked(msgspec.structs.replace(SETTINGS, gpu=GpuSettings(cpu_only=True)), 1000)
    monkeypatch.setattr(os, "listdir", lambda _path: ["null"])
    assert not may_be_page_locked(SETTINGS, 1000)
