"""Which models are told beforehand from those that answer at the end of their execution."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from forebay.engine.backends.python_model.late_answers import may_answer_late


class Plain:
    def execute(self, requests: Any) -> Any:
        return []


class Awaiting:
    async def execute(self, requests: Any) -> Any:
        return []


def add_module(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, f"late_{path.stem}", module)


def test_a_coroutine_answers_late(tmp_path: Path) -> None:
    assert may_answer_late(Awaiting(), str(tmp_path))
    assert not may_answer_late(Plain(), str(tmp_path))
    assert not may_answer_late(object(), str(tmp_path))


def test_a_sender_anywhere_in_the_model_s_own_code_answers_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_module(monkeypatch, tmp_path / "m" / "1" / "model.py", "import helper")
    assert not may_answer_late(Plain(), str(tmp_path / "m"))
    add_module(monkeypatch, tmp_path / "m" / "helper.py", "sender = request.get_response_sender()")
    assert may_answer_late(Plain(), str(tmp_path / "m"))


def test_code_of_the_backend_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-134"""
    add_module(monkeypatch, tmp_path / "backends" / "b" / "model.py", "request.get_response_sender()")
    assert not may_answer_late(Plain(), str(tmp_path / "m"))
    assert may_answer_late(Plain(), str(tmp_path / "m"), str(tmp_path / "backends" / "b"))


def test_other_models_and_installed_packages_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(monkeypatch, tmp_path / "other" / "1" / "model.py", "get_response_sender")
    add_module(monkeypatch, tmp_path / "m" / "env" / "site-packages" / "library.py", "get_response_sender")
    assert not may_answer_late(Plain(), str(tmp_path / "m"))


def test_code_that_cannot_be_read_may_do_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(monkeypatch, tmp_path / "m" / "gone.py", "")
    (tmp_path / "m" / "gone.py").unlink()
    assert may_answer_late(Plain(), str(tmp_path / "m"))


def test_a_lazy_module_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"'{name}' was asked for")

    monkeypatch.setitem(sys.modules, "late_lazy", Lazy("late_lazy"))
    assert not may_answer_late(Plain(), str(tmp_path))
