"""What becomes of a batch, and of its worker, when a device fails."""

from __future__ import annotations

import pytest

from forebay.engine.devices import poisoning
from forebay.engine.devices.base import DeviceBroken, DeviceError
from forebay.engine.devices.host_device import HostDevice, HostStream
from forebay.engine.devices.poisoning import DeviceBatch, DeviceGuard
from forebay.ipc.errors import BackendFailed, InvalidArgument


class Ended(BaseException):
    """The process would have ended."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(poisoning.os, "_exit", end)
    return codes


class CountingStream(HostStream):
    """Counts who waits for it, and may be broken."""

    waits_count = 0
    is_broken = False

    def synchronize(self) -> None:
        self.waits_count += 1
        if self.is_broken:
            raise DeviceBroken("illegal address")
        super().synchronize()


def open_batch() -> tuple[HostDevice, CountingStream, DeviceBatch]:
    device = HostDevice()
    stream = CountingStream(device.traffic)
    return device, stream, DeviceBatch(device, stream)


def test_a_batch_waits_for_its_stream_and_is_timed() -> None:
    device, stream, batch = open_batch()
    with batch:
        pass
    assert stream.waits_count == 1
    assert device.traffic.device_ns > 0


def test_a_failed_batch_waits_too() -> None:
    """Its copies must not reach memory that has other owners by then."""
    _device, stream, batch = open_batch()
    with pytest.raises(InvalidArgument), batch:
        raise InvalidArgument("wrong shape")
    assert stream.waits_count == 1


def test_what_the_device_refuses_fails_the_batch() -> None:
    with pytest.raises(BackendFailed, match="no room"), DeviceGuard():
        raise DeviceError("no room")


def test_a_broken_device_ends_the_process_with_its_own_code(ends: list[int]) -> None:
    with pytest.raises(Ended), DeviceGuard():
        raise DeviceBroken("illegal address")
    _device, stream, batch = open_batch()
    stream.is_broken = True
    with pytest.raises(Ended), batch:
        pass
    with pytest.raises(Ended), batch:
        raise InvalidArgument("found after the device broke")
    assert ends == [poisoning.POISONED_EXIT_CODE] * 3
