"""One measurement of one server under load: what the client saw, and what it cost the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bench.kserve import execution_counts
from bench.load.client import LoadFailed, LoadResult, run_load, run_wrk
from bench.processes import Usage
from bench.servers import Server

Client = Literal["wrk", "load"]


@dataclass(frozen=True)
class Measurement:
    """One run of a client against a server, with what the server's processes used meanwhile."""

    load: LoadResult
    usage: Usage
    mean_batch: float
    """Inferences per execution, from the server's statistics; the warm-up counts too."""

    @property
    def cpu_us(self) -> float:
        """Server CPU time, all processes, per request: microseconds."""
        return self.usage.cpu_ns / 1e3 / self.load.completed_count

    @property
    def switches(self) -> float:
        """Context switches of the server per request."""
        return (self.usage.voluntary_switches + self.usage.involuntary_switches) / self.load.completed_count

    def figures(self) -> dict[str, float]:
        """Return what the tables show, by column."""
        return {
            "rate_per_s": self.load.rate_per_s,
            "p50_us": self.load.p50_us,
            "p99_us": self.load.p99_us,
            "p99_9_us": self.load.p99_9_us,
            "mean_batch": self.mean_batch,
            "cpu_us": self.cpu_us,
            "switches": self.switches,
            "client_cpu_us": self.load.client_cpu_us / self.load.completed_count,
        }

    def as_json(self) -> dict[str, Any]:
        """Return everything, for a results file."""
        return self.figures() | {"load": self.load.as_json()}


def measure(
    server: Server,
    request: bytes,
    *,
    model: str,
    client: Client,
    connections: int,
    duration_s: float,
    warmup_s: float,
    idle_connections: int = 0,
    rate_per_s: float | None = None,
) -> Measurement:
    """Put load on a server and return what happened.

    Raises:
        LoadFailed: the client failed, an answer was wrong, or wrk was asked for what only our own client can do.
    """
    looks: list[Usage] = []

    def look() -> None:
        looks.append(server.processes.usage())

    inferences_before, executions_before = execution_counts(server.http_port, model)
    if client == "wrk":
        if idle_connections or rate_per_s is not None:
            raise LoadFailed("wrk has neither idle connections nor an open loop; use --client load")
        load = run_wrk(
            server.http_port,
            request,
            connections=connections,
            duration_s=duration_s,
            warmup_s=warmup_s,
            on_start=look,
            on_end=look,
        )
    else:
        load = run_load(
            server.http_port,
            request,
            connections=connections,
            duration_s=duration_s,
            warmup_s=warmup_s,
            idle_connections=idle_connections,
            rate_per_s=rate_per_s,
            on_start=look,
            on_end=look,
        )
    if load.completed_count == 0 or load.error_count > load.unsent_count:
        raise LoadFailed(f"{server.name} with {connections} connections: {load}\n{server.log_tail(10)}")
    inferences, executions = execution_counts(server.http_port, model)
    return Measurement(
        load,
        looks[1] - looks[0],
        (inferences - inferences_before) / max(1, executions - executions_before),
    )
