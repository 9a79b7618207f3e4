"""Cores are kept awake from the first request to a lull."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from forebay.frontend.data_plane.awake_cores import AwakeCores
from forebay.ipc.wakeup_latency import WakeupLatency


class Loop:
    """An event loop whose timers a test lets fire."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []

    def call_later(self, _delay_s: float, callback: Callable[..., None], *args: object) -> None:
        self.timers.append(lambda: callback(*args))

    def let_a_lull_pass(self) -> None:
        (timer,) = self.timers
        self.timers = []
        timer()


class Scene:
    """A frontend that may keep cores awake."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[WakeupLatency] = []
        real_hold = WakeupLatency.hold

        def hold(latency: WakeupLatency) -> None:
            real_hold(latency)
            self.held.append(latency)

        monkeypatch.setattr(WakeupLatency, "hold", hold)
        self.loop = Loop()
        self.cores = AwakeCores(cast("Any", self.loop))

    @property
    def is_awake(self) -> bool:
        return any(latency.is_held for latency in self.held)


@pytest.fixture
def scene(latency_device: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_cores_sleep_unless_it_is_allowed(scene: Scene) -> None:
    scene.cores.used()
    assert not scene.is_awake
    assert not scene.loop.timers


def test_awake_from_the_first_request_to_a_lull(scene: Scene) -> None:
    scene.cores.allow(0)
    assert not scene.is_awake
    scene.cores.used()
    assert scene.is_awake
    scene.loop.let_a_lull_pass()
    assert scene.is_awake  # There were requests in it.
    scene.cores.used()
    scene.loop.let_a_lull_pass()
    assert scene.is_awake
    scene.loop.let_a_lull_pass()
    assert not scene.is_awake
    assert not scene.loop.timers  # An idle server does nothing.
    scene.cores.used()
    assert scene.is_awake


def test_who_may_no_longer_ask_serves_on_and_says_so_once(
    scene: Scene, latency_device: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scene.cores.allow(0)
    latency_device.unlink()
    scene.cores.used()
    scene.cores.used()
    assert not scene.is_awake
    assert not scene.loop.timers
    assert capfd.readouterr().err.count("--cpu-wakeup-latency-us needs to write") == 1
