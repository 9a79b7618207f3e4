"""Put load on a server from Python: ``run_load`` drives our own load generator, ``run_wrk`` drives wrk.

Both repeat one whole HTTP request, given as bytes, over many keep-alive connections, and answer with a `LoadResult`.
The load generator is C (load.c), compiled by gcc on first use into ``build/bench/``; wrk is Debian's package ``wrk``.
Both are one thread, and their process takes a few microseconds of CPU per request.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
BUILD_FOLDER = HERE.parent.parent / "build" / "bench"
#: How long to wait for the answers that are still missing when the time is up.
DRAIN_TIMEOUT_S = 5.0

Arrivals = Literal["constant", "poisson", "bursty"]


class LoadFailed(Exception):
    """The load generator could not be built or started, or lost the server."""


@dataclass(frozen=True)
class LoadResult:
    """What a load generator saw in the measured time; latencies in microseconds."""

    duration_s: float
    completed_count: int
    """Answers with status 200 (and, by run_load, of the right length) that arrived in the measured time."""
    p50_us: float
    p75_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    p99_9_us: float
    mean_us: float
    min_us: float
    max_us: float
    non_200_count: int
    connection_error_count: int
    unanswered_count: int
    """Requests without an answer when the generator gave up."""
    length_mismatch_count: int = 0
    """Answers of another length than the first (run_load only)."""
    unsent_count: int = 0
    """Open loop: requests that were due but never found a free connection."""
    idle_closed_count: int = 0
    """Idle connections that the server closed."""
    client_cpu_us: float = 0.0
    """User and system time of the generator itself in the measured time."""
    due_count: int = 0
    """Open loop: requests that were due in the measured time (run_load only)."""
    within_counts: tuple[int, ...] = ()
    """Right answers within each of the limits that were given (run_load only)."""
    first_error: str = ""
    """Status and beginning of the first answer that was not 200."""

    @property
    def rate_per_s(self) -> float:
        """Right answers per second."""
        return self.completed_count / self.duration_s

    @property
    def error_count(self) -> int:
        """Everything that went wrong; a measurement with errors is not worth quoting."""
        return (
            self.non_200_count
            + self.connection_error_count
            + self.unanswered_count
            + self.length_mismatch_count
            + self.unsent_count
            + self.idle_closed_count
        )

    def as_json(self) -> dict[str, Any]:
        """Return all fields and the rate, for a results file."""
        return asdict(self) | {"rate_per_s": self.rate_per_s}


def build_load() -> Path:
    """Compile load.c if its binary is missing or older, and return the binary.

    Raises:
        LoadFailed: there is no C compiler, or it failed.
    """
    source, binary = HERE / "load.c", BUILD_FOLDER / "load"
    if binary.exists() and binary.stat().st_mtime_ns >= source.stat().st_mtime_ns:
        return binary
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise LoadFailed("the load generator needs a C compiler: apt-get install gcc libc6-dev, or set CC")
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    fresh = binary.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source), "-lm"]
    compilation = subprocess.run(command, capture_output=True, text=True, check=False)
    if compilation.returncode != 0:
        raise LoadFailed(f"{' '.join(command)} failed:\n{compilation.stderr}")
    # Renamed into place, so that a run beside this one never starts half a binary.
    fresh.replace(binary)
    return binary


def run_load(
    port: int,
    request: bytes,
    *,
    connections: int,
    duration_s: float,
    warmup_s: float = 0.5,
    rate_per_s: float | None = None,
    arrivals: Arrivals = "poisson",
    idle_connections: int = 0,
    limits_us: Sequence[float] = (),
    host: str = "127.0.0.1",
    realtime: bool = False,
    on_start: Callable[[], None] | None = None,
    on_end: Callable[[], None] | None = None,
) -> LoadResult:
    """Repeat one request over many connections and return what was seen.

    Args:
        request: one whole HTTP/1.1 request, header and body.
        connections: keep-alive connections that send; each has at most one request under way.
        rate_per_s: None for a closed loop (the next request when the last is answered), else an open loop: requests
            are due at this rate, all connections together, and latency counts from the time a request was due.
        arrivals: the distances between due times in an open loop; ``bursty`` is Poisson at a rate that changes.
        idle_connections: further connections that make one request each before the start and then stay silent.
        limits_us: latencies for which to count the answers that are no later, sixteen at most.
        realtime: the generator gets a core whenever it wants one, as if it were on a machine of its own. For a few
            connections: it is to be an instrument, and no load.
        on_start: called when the warm-up is over; take the server's CPU time here.
        on_end: called when the measured time is over.

    Raises:
        LoadFailed: the generator could not be built, may not be real time, or lost the server.
    """
    with _file_of(request) as path:
        command = [
            str(build_load()),
            host,
            *(str(port), str(path), str(connections), str(idle_connections), str(warmup_s), str(duration_s)),
            *(str(rate_per_s or 0), arrivals, str(DRAIN_TIMEOUT_S)),
            *map(str, limits_us),
        ]
        callbacks = {"start": on_start, "end": on_end}
        last_line = ""
        with _start(command, realtime=realtime) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                last_line = line.strip()
                callback = callbacks.get(last_line)
                if callback is not None:
                    callback()
            error = process.stderr.read()
    if process.returncode != 0:
        raise LoadFailed(error.strip() or f"load exited with {process.returncode}")
    return _result_of(json.loads(last_line))


def _start(command: Sequence[str], *, realtime: bool) -> subprocess.Popen[str]:
    """Start a process whose output is read here.

    Raises:
        LoadFailed: it may not be real time.
    """
    if not realtime:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A child inherits what the thread that starts it has just then.
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        raise LoadFailed("a real-time client needs root, or CAP_SYS_NICE") from None
    try:
        return _start(command, realtime=False)
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def run_wrk(
    port: int,
    request: bytes,
    *,
    connections: int,
    duration_s: float,
    warmup_s: float = 0.5,
    host: str = "127.0.0.1",
    on_start: Callable[[], None] | None = None,
    on_end: Callable[[], None] | None = None,
) -> LoadResult:
    """Do what `run_load` does in a closed loop, with wrk and one thread.

    wrk has no warm-up of its own: it runs once before, for ``warmup_s``. What happened while it started and stopped (a
    few milliseconds) is inside the measured time.

    Raises:
        LoadFailed: wrk is not installed, or failed.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise LoadFailed("wrk is not installed: apt-get install wrk, or use --client load")
    with _file_of(request) as path:

        def run(seconds: float) -> dict[str, Any]:
            command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(HERE / "wrk.lua")]
            command += [f"http://{host}:{port}/", "--", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise LoadFailed(f"wrk: {done.stderr.strip()}")
            figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return figures

        if warmup_s > 0:
            run(warmup_s)
        before = os.times()
        if on_start is not None:
            on_start()
        figures = run(duration_s)
        if on_end is not None:
            on_end()
        after = os.times()
    figures["client_cpu_us"] = (
        after.children_user + after.children_system - before.children_user - before.children_system
    ) * 1e6
    return _result_of(figures)


def _result_of(figures: dict[str, Any]) -> LoadResult:
    """Make a result of a generator's JSON object, leaving out what only the generator needs."""
    if figures.get("first_error_status"):
        figures["first_error"] = f"{figures['first_error_status']}: {figures['first_error']}"
    figures["within_counts"] = tuple(figures.get("within_counts", ()))
    names = {field.name for field in fields(LoadResult)}
    return LoadResult(**{name: value for name, value in figures.items() if name in names})


@contextmanager
def _file_of(request: bytes) -> Generator[Path, None, None]:
    """Give the generators the request as a file."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        path = Path(folder) / "request"
        path.write_bytes(request)
        yield path
