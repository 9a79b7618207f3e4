"""GPUs for the metrics page, by NVML (spec M-053). Metrics process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from forebay.ipc.clock import Clock, MonotonicClock

_NS_PER_MS = 1_000_000


class GpuSample(NamedTuple):
    """One value of one GPU."""

    name: str
    help: str
    kind: str
    uuid: str
    value: int | float


class Gpus:
    """The GPUs that workers see, read when scraped but not more often than every interval."""

    def __init__(self, nvml: Any, interval_ms: int, *, visible: str | None = None, clock: Clock | None = None) -> None:
        """Find the devices.

        Args:
            nvml: the module ``pynvml``, initialised.
            visible: ``CUDA_VISIBLE_DEVICES``, which NVML itself does not obey; None: all.
        """
        self._nvml = nvml
        self._interval_ns = interval_ms * _NS_PER_MS
        self._clock = clock or MonotonicClock()
        found: dict[str, tuple[str, Any]] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            # One may be lost, or not be ours to ask; the others are shown all the same.
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = nvml.nvmlDeviceGetUUID(handle)
                found[str(index)] = (uuid.decode() if isinstance(uuid, bytes) else str(uuid), handle)
        uuids = {index: uuid for index, (uuid, _handle) in found.items()}
        self._devices = [found[index] for index in visible_indices(uuids, visible)]
        #: Energy counts from the start of the server.
        self._energy_at_start_mj = {uuid: self._ask(self._energy_mj, handle) for uuid, handle in self._devices}
        self._samples: list[GpuSample] = []
        self._last_ns = 0

    def samples(self) -> list[GpuSample]:
        """Return every value that the devices tell, family by family."""
        now_ns = self._clock.now_ns()
        if not self._samples or now_ns - self._last_ns >= self._interval_ns:
            self._last_ns = now_ns
            self._samples = self._read()
        return self._samples

    def _read(self) -> list[GpuSample]:
        nvml = self._nvml
        families: tuple[tuple[str, str, str, Callable[[str, Any], int | float]], ...] = (
            (
                "nv_gpu_utilization",
                "GPU utilization rate [0.0 - 1.0)",
                "gauge",
                lambda _uuid, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            ),
            (
                "nv_gpu_memory_total_bytes",
                "GPU total memory, in bytes",
                "gauge",
                lambda _uuid, handle: int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            ),
            (
                "nv_gpu_memory_used_bytes",
                "GPU used memory, in bytes",
                "gauge",
                lambda _uuid, handle: int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
            ),
            (
                "nv_gpu_power_usage",
                "GPU power usage in watts",
                "gauge",
                lambda _uuid, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            ),
            (
                "nv_gpu_power_limit",
                "GPU power management limit in watts",
                "gauge",
                lambda _uuid, handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            ),
            (
                "nv_energy_consumption",
                "GPU energy consumption in joules since the Triton Server started",
                "counter",
                lambda uuid, handle: (self._energy_mj(handle) - (self._energy_at_start_mj[uuid] or 0)) / 1000,
            ),
        )
        found: list[GpuSample] = []
        for name, text, kind, read in families:
            for uuid, handle in self._devices:
                # A device that cannot tell something (a slice of one cannot tell its power) has no such series.
                value = self._ask(partial(read, uuid), handle)
                if value is not None:
                    found.append(GpuSample(name, text, kind, uuid, value))
        return found

    def _energy_mj(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def _ask(self, read: Callable[[Any], int | float], handle: Any) -> int | float | None:
        with contextlib.suppress(self._nvml.NVMLError):
            return read(handle)
        return None


def visible_indices(uuids: Mapping[str, str], visible: str | None) -> list[str]:
    """Return the devices that CUDA shows.

    Args:
        uuids: by index, in the order of PCI, as the supervisor has CUDA number them.
        visible: indices, or beginnings of UUIDs, of which the first that is no device ends the list; None: all.
    """
    # NVML does not list slices (MIG): then what is known of the whole is shown.
    if visible is None or "MIG-" in visible:
        return list(uuids)
    chosen: list[str] = []
    for wanted in map(str.strip, visible.split(",")):
        matching = [index for index, uuid in uuids.items() if wanted and (wanted == index or uuid.startswith(wanted))]
        if not matching:
            break
        chosen += matching
    return list(dict.fromkeys(chosen))


def find_gpus(interval_ms: int) -> Gpus | None:
    """Return the GPUs of this machine; None: there is none, or no library that knows of them."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return Gpus(pynvml, interval_ms, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError:
        return None
