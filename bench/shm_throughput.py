"""How many rows per second go through a batching model from several shared-memory clients at once?

    python -m bench.shm_throughput [--clients 8] [--rows 16] [--in-flight 32] [--group 1] [--duration 5]

Each client is a process of its own with so many requests of so many rows of ``alpha_model`` in flight; it takes the
oldest answer, fills in the next request and hands it over. With ``--group`` it does so for that many requests at a
time, which share a message (``model.group``). The server has the queue delay 0 and two instances. What is printed are
rows per second of all clients together, and what the server's processes and the clients used of the processor per row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import deque
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from bench.kserve import execution_counts
from bench.machine import describe_machine, machine_line, save_results
from bench.servers import alpha_repository, forebay
from bench.tables import markdown_table, number
from forebay.client import shm

MODEL = "alpha_model"

#: How long the clients may take to be ready, s.
_START_TIMEOUT_S = 60.0


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    with (
        tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as folder,
        alpha_repository("onnxruntime", instances=options.instances) as repository,
        forebay(repository, f"--runtime-directory={folder}") as server,
    ):
        context = multiprocessing.get_context("spawn")
        barrier, results_in = context.Barrier(options.clients + 1), context.Queue()
        arguments = (folder, options.rows, options.in_flight, options.group, options.duration, barrier, results_in)
        processes = [context.Process(target=run_client, args=arguments) for _ in range(options.clients)]
        for process in processes:
            process.start()
        barrier.wait(_START_TIMEOUT_S)
        before, counts_before = server.processes.usage(), execution_counts(server.http_port, MODEL)
        results = [results_in.get() for _ in processes]
        used, counts = server.processes.usage() - before, execution_counts(server.http_port, MODEL)
        for process in processes:
            process.join()
    rows = sum(result["rows"] for result in results)
    client_cpu_s = sum(result["cpu_s"] for result in results)
    batch = (counts[0] - counts_before[0]) / max(counts[1] - counts_before[1], 1)
    figures: dict[str, Any] = {
        "clients": options.clients,
        "rows_per_request": options.rows,
        "in_flight": options.in_flight,
        "group": options.group,
        "rows_per_s": rows / options.duration,
        "mean_batch": batch,
        "server_cpu_us_per_row": used.cpu_ns / 1e3 / max(rows, 1),
        "client_cpu_us_per_row": client_cpu_s * 1e6 / max(rows, 1),
    }
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(markdown_table(list(figures), [[number(float(value)) for value in figures.values()]]))
    print(f"\nsaved: {save_results('shm_throughput', machine, figures, options.output)}")


def run_client(
    folder: str,
    rows: int,
    in_flight: int,
    group: int,
    duration_s: float,
    barrier: Barrier,
    results: Queue[dict[str, float]],
) -> None:
    """Keep requests in flight until the time is up; tell the rows answered and the CPU time used."""
    with shm.connect(folder) as engine:
        model = engine.model(MODEL)
        waiting: deque[shm.Future | shm.RequestGroup] = deque()
        barrier.wait(_START_TIMEOUT_S)
        answered, cpu_s, end_s = 0, _cpu_s(), time.monotonic() + duration_s
        while time.monotonic() < end_s:
            while len(waiting) * group < in_flight:
                waiting.append(submit(model, rows, group, answered))
            waiting.popleft().result()
            answered += rows * group
        results.put({"rows": float(answered), "cpu_s": _cpu_s() - cpu_s})


def submit(model: shm.Model, rows: int, count: int, value: float) -> shm.Future | shm.RequestGroup:
    """Fill one request, or a group of them, and hand it over."""
    if count == 1:
        model.input("features", rows=rows)[:, 0] = value
        return model.submit()
    group = model.group(count, rows)
    group.input("features")[:, 0] = value
    group.submit()
    return group


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


class _Options(argparse.Namespace):
    """The command line."""

    clients: int
    rows: int
    in_flight: int
    group: int
    duration: float
    instances: int
    output: Path | None


def _parse_options() -> _Options:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shm_throughput", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="rows of a request")
    parser.add_argument("--in-flight", type=int, default=32, help="requests of a client at a time")
    parser.add_argument("--group", type=int, default=1, help="requests that share a message")
    parser.add_argument("--duration", type=float, default=5.0, help="seconds")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--output", type=Path, help="results file (default: in bench/results)")
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
