"""Asking the kernel how long an idle core may take to wake up."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from forebay.ipc import wakeup_latency
from forebay.ipc.errors import Unavailable
from forebay.ipc.wakeup_latency import WakeupLatency, cores_obey


def _holders(path: Path) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))


def test_wish_lasts_from_hold_to_release(latency_device: Path) -> None:
    latency = WakeupLatency(20)
    assert not latency.is_held
    latency.hold()
    latency.hold()
    assert latency.is_held
    assert latency_device.read_bytes() == struct.pack("=i", 20)
    assert _holders(latency_device) == 1
    latency.release()
    latency.release()
    assert not latency.is_held
    assert _holders(latency_device) == 0


def test_who_may_not_ask_is_told_what_to_do(latency_device: Path) -> None:
    latency_device.unlink()
    with pytest.raises(Unavailable, match=r"needs to write to .*cpu_dma_latency: No such file.*leave the flag out"):
        WakeupLatency(0).hold()


def test_what_the_kernel_refuses_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeup_latency, "_DEVICE", "/dev/full")
    latency = WakeupLatency(0)
    with pytest.raises(Unavailable, match="the kernel does not take it: No space left"):
        latency.hold()
    assert not latency.is_held
    assert _holders(Path("/dev/full")) == 0


@pytest.mark.parametrize(("driver", "obey"), [("haltpoll\n", True), ("none\n", False), (None, False)])
def test_kernel_without_a_driver_does_not_decide(
    driver: str | None, obey: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "current_driver"
    if driver is not None:
        file.write_text(driver)
    monkeypatch.setattr(wakeup_latency, "_DRIVER", file)
    assert cores_obey() is obey
