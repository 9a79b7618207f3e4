"""Models that compute on a GPU with tensors in host memory: what becomes of their worker when the GPU fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from forebay.engine.backends.base import TensorInstance
from forebay.engine.backends.watched_instance import WatchedInstance
from forebay.engine.devices import poisoning
from forebay.engine.devices.base import DeviceBroken
from forebay.engine.devices.host_device import HostDevice, HostStream
from forebay.ipc.errors import BackendFailed, InvalidArgument

Arrays = dict[str, np.ndarray[Any, Any]]

ONES = np.ones(2, np.float32)


class Ended(BaseException):
    """The process would have ended."""


class Doubler(TensorInstance):
    """Doubles, or raises what it is told to."""

    error: Exception | None = None
    is_closed = False

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Arrays:
        if self.error is not None:
            raise self.error
        return {"y": inputs["x"] * 2}

    def close(self) -> None:
        self.is_closed = True


class Scene:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def end(code: int) -> None:
            assert code == poisoning.POISONED_EXIT_CODE
            raise Ended

        monkeypatch.setattr(poisoning.os, "_exit", end)
        self.monkeypatch = monkeypatch
        self.doubler = Doubler()
        self.watched = WatchedInstance(self.doubler, HostDevice())

    def lose_context(self) -> None:
        def synchronize(_stream: HostStream) -> None:
            raise DeviceBroken("illegal address")

        self.monkeypatch.setattr(HostStream, "synchronize", synchronize)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_runs_are_passed_on(scene: Scene) -> None:
    target = np.zeros(2, np.float32)
    assert scene.watched.run({"x": ONES}, ("y",))["y"].tolist() == [2, 2]
    scene.watched.bind({"x": ONES}, {"y": target})()
    assert target.tolist() == [2, 2]
    scene.watched.close()
    assert scene.doubler.is_closed


@pytest.mark.parametrize("error", [BackendFailed("a model's own error"), InvalidArgument("a client's")])
def test_an_error_is_an_error_while_the_device_works(scene: Scene, error: Exception) -> None:
    scene.doubler.error = error
    with pytest.raises(type(error), match=str(error)):
        scene.watched.run({"x": ONES}, ("y",))
    scene.doubler.error = None
    assert scene.watched.run({"x": ONES}, ("y",))["y"].tolist() == [2, 2]


def test_an_error_on_a_lost_context_ends_the_worker(scene: Scene) -> None:
    run = scene.watched.bind({"x": ONES}, {"y": np.zeros(2, np.float32)})
    scene.lose_context()
    assert scene.watched.run({"x": ONES}, ("y",))["y"].tolist() == [2, 2]
    scene.doubler.error = BackendFailed("device-side assert triggered")
    with pytest.raises(Ended):
        scene.watched.run({"x": ONES}, ("y",))
    with pytest.raises(Ended):
        run()
