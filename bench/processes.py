"""What the processes of a server have cost so far, from /proc.

A server's processes are found by its session (every server is started as the leader of a new one), by descent from its
first process, and by a mark in the environment that survives a child's own ``setsid`` and its parent's death. A process
once seen stays counted after it has ended, so that totals never fall.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CLOCK_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
#: The environment variable whose value marks the processes of one server.
MARK = "BENCH_SERVER_MARK"


@dataclass(frozen=True)
class Usage:
    """What all processes of a server have used since they started."""

    cpu_ns: int
    """User and system time."""
    voluntary_switches: int
    """Context switches because a thread waited."""
    involuntary_switches: int
    """Context switches because a thread's time was up."""

    def __sub__(self, earlier: Usage) -> Usage:
        """Return what was used since an earlier look."""
        return Usage(
            self.cpu_ns - earlier.cpu_ns,
            self.voluntary_switches - earlier.voluntary_switches,
            self.involuntary_switches - earlier.involuntary_switches,
        )


@dataclass(frozen=True)
class Memory:
    """The memory of one process, in bytes."""

    pid: int
    name: str
    """The process's title as ``ps`` shows it."""
    pss_bytes: int
    """Proportional set size: shared pages are divided among those who share them."""
    private_bytes: int
    """Pages that only this process has: what its end would give back."""


@dataclass(frozen=True)
class _Process:
    """The fields of /proc/PID/stat that tell processes apart and bind them together."""

    parent_pid: int
    session: int
    start_ticks: int
    cpu_ns: int


class ProcessGroup:
    """All processes of one server."""

    def __init__(self, root_pid: int, mark: str) -> None:
        self._root_pid = root_pid
        self._mark = f"{MARK}={mark}".encode()
        #: Usage of each process when it was last seen, by (pid, start time): pids are used again.
        self._last_seen: dict[tuple[int, int], Usage] = {}

    def pids(self) -> list[int]:
        """Return the pids of the processes that live now."""
        return [pid for pid, _ in self._alive()]

    def usage(self) -> Usage:
        """Return what the processes have used, those included that have ended since an earlier look."""
        for pid, process in self._alive():
            usage = _usage_of(pid, process)
            if usage is not None:
                self._last_seen[pid, process.start_ticks] = usage
        return Usage(
            sum(usage.cpu_ns for usage in self._last_seen.values()),
            sum(usage.voluntary_switches for usage in self._last_seen.values()),
            sum(usage.involuntary_switches for usage in self._last_seen.values()),
        )

    def memory(self) -> list[Memory]:
        """Return the memory of each process that lives now."""
        found = (_memory_of(pid) for pid, _ in self._alive())
        return [memory for memory in found if memory is not None]

    def _alive(self) -> list[tuple[int, _Process]]:
        processes: dict[int, _Process] = {}
        for entry in os.listdir(PROC):
            if entry.isdecimal():
                process = _read_process(int(entry))
                if process is not None:
                    processes[int(entry)] = process
        known = {pid for pid, process in processes.items() if (pid, process.start_ticks) in self._last_seen}
        return [(pid, process) for pid, process in processes.items() if self._is_ours(pid, processes, known)]

    def _is_ours(self, pid: int, processes: dict[int, _Process], known: set[int]) -> bool:
        if pid in known or processes[pid].session == self._root_pid or self._mark in _environment(pid):
            return True
        ancestor = pid
        while ancestor in processes:
            if ancestor == self._root_pid:
                return True
            ancestor = processes[ancestor].parent_pid
        return False


def _read_process(pid: int) -> _Process | None:
    try:
        # The name, in parentheses, may hold anything: the fields are counted from behind it.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Process(
        parent_pid=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        cpu_ns=(int(fields[11]) + int(fields[12])) * CLOCK_TICK_NS,
    )


def _environment(pid: int) -> list[bytes]:
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _usage_of(pid: int, process: _Process) -> Usage | None:
    """Return the usage of one process, or None if it has just ended.

    The kernel's own counters (schedstat) are nanoseconds but leave out threads that have ended; the process's times
    (stat) hold those, but in ticks of 10 ms. The larger is the nearer.
    """
    cpu_ns = voluntary = involuntary = 0
    try:
        for thread in (PROC / str(pid) / "task").iterdir():
            cpu_ns += int((thread / "schedstat").read_text().split()[0])
            for line in (thread / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    voluntary += int(line.split()[1])
                elif line.startswith("nonvoluntary_ctxt_switches"):
                    involuntary += int(line.split()[1])
    except OSError:
        return None
    return Usage(max(cpu_ns, process.cpu_ns), voluntary, involuntary)


def _memory_of(pid: int) -> Memory | None:
    sizes: dict[str, int] = {}
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
            key, _, value = line.partition(":")
            sizes[key] = int(value.split()[0]) * 1024
        name = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    if "Pss" not in sizes:  # a process that has ended but was not waited for
        return None
    return Memory(pid, name[:80], sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"])
