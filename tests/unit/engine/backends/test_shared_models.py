"""Models that the instances of a process load once."""

from __future__ import annotations

import threading

import pytest

from forebay.engine.backends.shared_models import shared


def test_loaded_once_however_many_ask_at_a_time() -> None:
    loaded: list[object] = []
    found: list[object] = []

    def load() -> object:
        loaded.append(object())
        return loaded[-1]

    threads = [threading.Thread(target=lambda: found.append(shared(("test", "once"), load))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1
    assert set(map(id, found)) == {id(loaded[0])}


def test_what_only_one_may_use_is_loaded_for_each() -> None:
    first, second = (shared(("test", "own"), object, may_share=lambda _model: False) for _ in range(2))
    assert first is not second


def test_a_failed_load_is_tried_again() -> None:
    def fail() -> object:
        raise ValueError("no file")

    with pytest.raises(ValueError, match="no file"):
        shared(("test", "failed"), fail)
    assert shared(("test", "failed"), lambda: 5) == 5
