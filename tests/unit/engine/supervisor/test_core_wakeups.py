"""A flag that cannot be kept is refused when the server starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.engine.supervisor.core_wakeups import check_wakeup_latency
from forebay.ipc import wakeup_latency
from forebay.ipc.errors import Unavailable


def test_refused_where_the_device_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeup_latency, "_DEVICE", str(tmp_path / "absent"))
    check_wakeup_latency(-1)
    with pytest.raises(Unavailable, match="--device"):
        check_wakeup_latency(0)


def test_warns_where_it_has_no_effect(
    latency_device: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wakeup_latency, "_DRIVER", latency_device.with_name("absent"))
    check_wakeup_latency(0)
    assert "--cpu-wakeup-latency-us has no effect" in "".join(capfd.readouterr())
