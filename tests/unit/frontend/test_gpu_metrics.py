"""GPUs on the metrics page, with a module that stands in for NVML (spec M-053)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from forebay.frontend.gpu_metrics import Gpus, visible_indices
from forebay.frontend.metrics import MetricsPage, MetricsSettings
from forebay.ipc.clock import FakeClock
from forebay.ipc.counters import CountersFile


class FakeNvml:
    """Three devices; the second cannot tell its power, the third is lost."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.energy_mj = 5000
        self.used = 100

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 2:
            raise self.NVMLError
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:
        return b"GPU-0" if handle == 0 else "GPU-1"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=25 * handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=1000, used=self.used)

    def _only_first(self, handle: int, value: int) -> int:
        if handle:
            raise self.NVMLError
        return value

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._only_first(handle, 55_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return self._only_first(handle, 70_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self._only_first(handle, self.energy_mj)


def test_every_family_of_every_device_that_tells_it() -> None:
    nvml = FakeNvml()
    clock = FakeClock()
    counters = CountersFile()
    page = MetricsPage(counters.words, MetricsSettings(allow_cpu=False), gpus=Gpus(nvml, interval_ms=1000, clock=clock))
    nvml.energy_mj += 2500
    lines = page.render().decode().splitlines()
    for expected in (
        "# TYPE nv_gpu_utilization gauge",
        'nv_gpu_utilization{gpu_uuid="GPU-0"} 0',
        'nv_gpu_utilization{gpu_uuid="GPU-1"} 0.25',
        'nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"} 1000',
        'nv_gpu_memory_used_bytes{gpu_uuid="GPU-0"} 100',
        'nv_gpu_power_usage{gpu_uuid="GPU-0"} 55.5',
        'nv_gpu_power_limit{gpu_uuid="GPU-0"} 70',
        "# TYPE nv_energy_consumption counter",
        'nv_energy_consumption{gpu_uuid="GPU-0"} 2.5',
    ):
        assert expected in lines
    assert not any("nv_gpu_power" in line and "GPU-1" in line for line in lines)


def test_devices_are_read_once_per_interval() -> None:
    """M-005."""
    nvml = FakeNvml()
    clock = FakeClock()
    gpus = Gpus(nvml, interval_ms=1000, clock=clock)
    first = gpus.samples()
    nvml.used = 700
    assert gpus.samples() == first
    clock.advance(ns=1_000_000_000)
    assert {sample.value for sample in gpus.samples() if sample.name == "nv_gpu_memory_used_bytes"} == {700}


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, ["0", "1", "10"]),
        ("1", ["1"]),
        ("10,0", ["10", "0"]),
        ("GPU-b", ["1"]),
        ("0,7,1", ["0"]),
        ("", []),
        ("-1", []),
        ("MIG-GPU-b/1/0", ["0", "1", "10"]),
    ],
)
def test_only_gpus_that_cuda_shows_are_on_the_page(visible: str | None, indices: list[str]) -> None:
    uuids = {"0": "GPU-a1", "1": "GPU-b1", "10": "GPU-c1"}
    assert visible_indices(uuids, visible) == indices


def test_a_hidden_gpu_has_no_series() -> None:
    gpus = Gpus(FakeNvml(), interval_ms=1000, visible="1", clock=FakeClock())
    assert {sample.uuid for sample in gpus.samples()} == {"GPU-1"}
