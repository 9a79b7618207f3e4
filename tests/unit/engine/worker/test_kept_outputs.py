"""Outputs that wait on the device for room: how much may wait, and when it is free again. The host plays the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from forebay.engine.devices import poisoning
from forebay.engine.devices.base import DeviceBroken, DeviceError, DeviceMemoryFull, Memory
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.host_device import HostDevice
from forebay.engine.worker import kept_outputs
from forebay.engine.worker.kept_outputs import KeptOutputs
from forebay.ipc.errors import BackendFailed

FLOAT = np.dtype(np.float32)


class FullDevice(HostDevice):
    """Refuses memory as it is told."""

    def __init__(self, error: DeviceError) -> None:
        super().__init__()
        self._error = error

    def allocate(self, byte_size: int) -> Memory:
        raise self._error


def kept(device: HostDevice) -> KeptOutputs:
    stream = device.make_stream()
    return KeptOutputs(device, lambda copies: copies(stream))


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(kept_outputs, "KEPT_BYTES_MAX", size)


def test_as_much_may_wait_as_is_allowed_and_is_free_again_when_nobody_has_it(limit: Callable[[int], None]) -> None:
    limit(64)
    store = kept(HostDevice())
    first, second = store.take((1, 8), FLOAT), store.take((8,), FLOAT)
    assert first is not None
    assert (first.shape, first.nbytes) == ((1, 8), 32)
    assert second is not None
    assert store.take((1,), FLOAT) is None
    del first
    assert store.take((8,), FLOAT) is not None


def test_outputs_are_handed_over_on_the_device_or_fetched() -> None:
    device = HostDevice()
    store, target = kept(device), device.allocate(32)
    values = np.arange(8, dtype=np.float32)
    array = store.take((8,), FLOAT)
    assert array is not None
    device.make_stream().copy_in(array.address, values.ctypes.data, values.nbytes)
    store.hand_over([(target.address, array)])
    found = DeviceArray(target.address, (8,), FLOAT)
    np.testing.assert_array_equal(np.frombuffer(store.fetch(found), np.float32), values)
    assert device.traffic.bytes_out == 32
    target.close()


def test_a_full_device_lets_outputs_go_to_the_host() -> None:
    assert kept(FullDevice(DeviceMemoryFull("no room"))).take((8,), FLOAT) is None


def test_a_device_that_refuses_fails_the_request_and_a_broken_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BackendFailed, match="refused"):
        kept(FullDevice(DeviceError("refused"))).take((8,), FLOAT)

    def end(_error: Any) -> None:
        raise SystemExit(poisoning.POISONED_EXIT_CODE)

    monkeypatch.setattr(poisoning, "end_poisoned_process", end)
    with pytest.raises(SystemExit):
        kept(FullDevice(DeviceBroken("illegal address"))).take((8,), FLOAT)
