"""Which CPU cores instances are pinned to: distinct ones if there are enough, else none."""

from __future__ import annotations

import os

#: Cores that no instance is pinned to: for the frontends, the scheduler and everything else.
RESERVED_COUNT = 2


def usable_cores(affinity: set[int] | None = None, quota: float | None = None) -> tuple[int, ...]:
    """Return the cores of our affinity mask, at most as many as the control group's CPU quota pays for."""
    cores = sorted(os.sched_getaffinity(0) if affinity is None else affinity)
    limit = cgroup_quota() if quota is None else quota
    return tuple(cores[: max(1, int(min(limit, len(cores))))])


def cgroup_quota() -> float:
    """Return how many cores the control group may use at once; infinity without a limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", encoding="ascii") as file:
            quota_us = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us", encoding="ascii") as file:
            period_us = int(file.read())
        return quota_us / period_us if quota_us > 0 else float("inf")
    except (OSError, ValueError):
        return float("inf")


class CorePool:
    """Lends cores to instances."""

    def __init__(self, cores: tuple[int, ...]) -> None:
        self._free = list(cores[RESERVED_COUNT:])

    def expect(self, count: int) -> None:
        """Announce ``count`` instances that will ask: if all together are too many, nobody is pinned."""
        if count > len(self._free):
            self._free.clear()

    def take(self, count: int) -> list[tuple[int, ...]]:
        """Return one core set per instance; all empty if there are not enough for all of them."""
        if count > len(self._free):
            return [()] * count
        taken, self._free = self._free[:count], self._free[count:]
        return [(core,) for core in taken]

    def give_back(self, cores: tuple[int, ...]) -> None:
        """Make the cores of an ended instance free again."""
        self._free = sorted([*self._free, *cores])
