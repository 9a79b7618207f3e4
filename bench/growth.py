"""How do costs grow: with idle connections, with models, and with nothing to do?

    python -m bench.growth [idle-connections] [many-models] [ready] [idle] [--server forebay]

Without names all four are measured:

``idle-connections``
    Server CPU per inference of 32 busy connections, with 5,000 idle keep-alive connections beside them and without, in
    turns. Each idle connection has made one request first. Target: at most 1.3 times as much.
``many-models``
    100 copies of ``alpha_model`` with one instance each: seconds until ready, and the proportional set size (PSS) of
    all processes after each model has answered once. What one more worker costs is told in two ways: the private memory
    of the median process, and the PSS that each model adds beyond the first. Targets: 15 s, 3 GB, 25 MB.
``ready``
    Seconds from ``forebay serve`` until ``/v2/health/ready`` answers 200, for the example repository. Target: 1.5 s.
``idle``
    CPU time in 10 s without a request, as a share of one core, for the example repository. Target: 1 %.

``--server triton`` measures the same of a real Triton with its Python backend (``ready`` and ``idle`` with
``alpha_model`` alone, which is all of the example repository that it can serve).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.kserve import infer_once, infer_request
from bench.machine import describe_machine, machine_line, save_results
from bench.measurement import measure
from bench.servers import EXAMPLE_REPOSITORY, Server, alpha_repository, forebay, triton
from bench.tables import markdown_table, number

ServerName = Literal["forebay", "triton"]
#: Lines of the report: what was measured, the figure, the target.
Lines = list[tuple[str, str, str]]

FEATURES = {"features": np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)}
BUSY_CONNECTIONS = 32
IDLE_CONNECTIONS = 5000
MODEL_COUNT = 100
IDLE_S = 10.0
#: Between the start of a server and a look at what it does when idle.
SETTLE_S = 2.0


def main() -> None:
    """Measure what was asked for, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=f"any of {', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--server", choices=["forebay", "triton"], default="forebay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    unknown = set(options.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")

    lines: Lines = []
    figures: dict[str, Any] = {"server": options.server}
    for question in options.questions or QUESTIONS:
        print(f"{options.server}: {question}", flush=True)
        answer_lines, figures[question] = QUESTIONS[question](options.server, options.rounds)
        lines += answer_lines
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(markdown_table([options.server, "measured", "target"], lines))
    print(f"\nsaved: {save_results(f'growth-{options.server}', machine, figures, options.output)}")


def idle_connections(server_name: ServerName, rounds: int) -> tuple[Lines, dict[str, Any]]:
    """Compare the cost of an inference with and without idle connections beside it."""
    costs: dict[int, list[float]] = {0: [], IDLE_CONNECTIONS: []}
    request = infer_request("alpha_model", FEATURES, ["prediction"])
    with alpha_server(server_name, instances=2) as server:
        for round_number in range(rounds):
            for idle_count in sorted(costs, reverse=round_number % 2 == 1):
                measurement = measure(
                    server,
                    request,
                    model="alpha_model",
                    client="load",
                    connections=BUSY_CONNECTIONS,
                    duration_s=3,
                    warmup_s=1,
                    idle_connections=idle_count,
                )
                costs[idle_count].append(measurement.cpu_us)
    ratio = statistics.median(with_idle / alone for alone, with_idle in zip(*costs.values(), strict=True))
    lines: Lines = [
        (
            f"server CPU per inference, {BUSY_CONNECTIONS} busy and {idle_count:,} idle connections",
            f"{number(statistics.median(seen))} us",
            "",
        )
        for idle_count, seen in costs.items()
    ]
    lines.append(("the one divided by the other", number(ratio), "<= 1.3"))
    return lines, {"cpu_us": costs, "ratio": ratio}


def many_models(server_name: ServerName, rounds: int) -> tuple[Lines, dict[str, Any]]:
    """Start a server with one model and one with many, and see what each model adds. Once: memory does not vary."""
    del rounds
    pss_bytes: dict[int, int] = {}
    for count in (1, MODEL_COUNT):
        with alpha_server(server_name, instances=1, copies=count) as server:
            for name in ["alpha_model"] if count == 1 else [f"alpha_model_{index:03}" for index in range(count)]:
                infer_once(server.http_port, infer_request(name, FEATURES, ["prediction"]))
            memory = server.processes.memory()
            pss_bytes[count] = sum(process.pss_bytes for process in memory)
            ready_s = server.ready_s
    added_bytes = (pss_bytes[MODEL_COUNT] - pss_bytes[1]) / (MODEL_COUNT - 1)
    worker_bytes = statistics.median(process.private_bytes for process in memory)
    lines: Lines = [
        (f"{MODEL_COUNT} models ready", f"{number(ready_s)} s", "<= 15 s"),
        (f"PSS of {len(memory)} processes", f"{number(pss_bytes[MODEL_COUNT] / 1e9)} GB", "<= 3 GB"),
        ("private memory of the median process", f"{number(worker_bytes / 1e6)} MB", "<= 25 MB"),
        ("PSS that one more model adds", f"{number(added_bytes / 1e6)} MB", ""),
    ]
    return lines, {
        "ready_s": ready_s,
        "pss_bytes": pss_bytes,
        "median_private_bytes": worker_bytes,
        "processes": [[process.name, process.pss_bytes, process.private_bytes] for process in memory],
    }


def ready(server_name: ServerName, rounds: int) -> tuple[Lines, dict[str, Any]]:
    """Time the start of a server with the example repository."""
    seconds: list[float] = []
    for _ in range(rounds):
        with example_server(server_name) as server:
            seconds.append(server.ready_s)
    spread = f"{number(min(seconds))} to {number(max(seconds))}"
    return [(f"example repository ready ({spread})", f"{number(statistics.median(seconds))} s", "<= 1.5 s")], {
        "ready_s": seconds
    }


def idle(server_name: ServerName, rounds: int) -> tuple[Lines, dict[str, Any]]:
    """See what a server does when nobody asks anything. Once: it is ten seconds long already."""
    del rounds
    with example_server(server_name) as server:
        time.sleep(SETTLE_S)
        before, started = server.processes.usage(), time.monotonic()
        time.sleep(IDLE_S)
        used = server.processes.usage() - before
        elapsed_s = time.monotonic() - started
    share = used.cpu_ns / 1e9 / elapsed_s
    switches = (used.voluntary_switches + used.involuntary_switches) / elapsed_s
    lines: Lines = [
        (f"CPU of one core over {elapsed_s:.0f} idle seconds", f"{share:.2%}", "<= 1 %"),
        ("context switches per idle second", number(switches), ""),
    ]
    return lines, {"share": share, "switches_per_s": switches}


@contextmanager
def alpha_server(server_name: ServerName, *, instances: int, copies: int = 1) -> Generator[Server, None, None]:
    """Run a server with ``alpha_model``, queue delay 0."""
    backend: Literal["onnxruntime", "python"] = "onnxruntime" if server_name == "forebay" else "python"
    start = forebay if server_name == "forebay" else triton
    with alpha_repository(backend, instances=instances, copies=copies) as repository, start(repository) as server:
        yield server


@contextmanager
def example_server(server_name: ServerName) -> Generator[Server, None, None]:
    """Run a server with the example repository, or what Triton can serve of it."""
    if server_name == "triton":
        with alpha_server("triton", instances=2) as server:
            yield server
    else:
        with forebay(EXAMPLE_REPOSITORY) as server:
            yield server


QUESTIONS: dict[str, Callable[[ServerName, int], tuple[Lines, dict[str, Any]]]] = {
    "idle-connections": idle_connections,
    "many-models": many_models,
    "ready": ready,
    "idle": idle,
}

if __name__ == "__main__":
    main()
