"""CPU and memory of the machine, as ``/metrics`` shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from forebay.frontend.metric_families import Value
from forebay.ipc.clock import Clock, MonotonicClock

_NS_PER_MS = 1_000_000


class MachineReading(msgspec.Struct, frozen=True):
    """What /proc said."""

    busy_ticks: int
    total_ticks: int
    memory_total_bytes: int
    memory_available_bytes: int


def read_machine() -> MachineReading:
    """Read /proc/stat and /proc/meminfo."""
    with open("/proc/stat", "rb") as file:
        # user nice system idle iowait irq softirq steal; guest time is part of user already
        ticks = [int(word) for word in file.readline().split()[1:9]]
    memory_bytes: dict[bytes, int] = {}
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            name, _, rest = line.partition(b":")
            if name in (b"MemTotal", b"MemAvailable"):
                memory_bytes[name] = int(rest.split()[0]) * 1024
    idle_ticks = ticks[3] + ticks[4]
    return MachineReading(sum(ticks) - idle_ticks, sum(ticks), memory_bytes[b"MemTotal"], memory_bytes[b"MemAvailable"])


class Machine:
    """CPU and memory of the machine, read when scraped but not more often than every interval (spec M-005).

    Nothing wakes up between scrapes. Utilisation is that since the reading before, which is at least one interval old.
    """

    def __init__(
        self,
        interval_ms: int,
        *,
        read: Callable[[], MachineReading] = read_machine,
        clock: Clock | None = None,
    ) -> None:
        self._interval_ns = interval_ms * _NS_PER_MS
        self._read = read
        self._clock = clock or MonotonicClock()
        self._last = read()
        self._last_ns = self._clock.now_ns()
        self._utilization = 0.0

    def gauges(self) -> list[tuple[str, str, Value]]:
        """Return (name, help, value) of each gauge (spec M-050, M-051)."""
        now_ns = self._clock.now_ns()
        if now_ns - self._last_ns >= self._interval_ns:
            # In a container that hides /proc the old values stay.
            with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
                self._advance(self._read(), now_ns)
        last = self._last
        return [
            ("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", self._utilization),
            ("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", last.memory_total_bytes),
            (
                "nv_cpu_memory_used_bytes",
                "CPU used memory (RAM), in bytes",
                max(last.memory_total_bytes - last.memory_available_bytes, 0),
            ),
        ]

    def _advance(self, reading: MachineReading, now_ns: int) -> None:
        passed = reading.total_ticks - self._last.total_ticks
        if passed > 0:
            busy = reading.busy_ticks - self._last.busy_ticks
            self._utilization = min(max(busy / passed, 0.0), 1.0)
        self._last = reading
        self._last_ns = now_ns
