"""Does a saturated model slow down its neighbours?

    python -m bench.isolation [--servers forebay,triton] [--busy wide,tiny] [--clients realtime,normal]
                              [--connections 32] [--rounds 5]

A server serves ``alpha_model`` version 2, the quiet model, beside two others of one instance each. The quiet one is
asked one request at a time, by turns alone and while many connections saturate one of the others: ``wide``, whose
instance then computes all the time, or ``tiny``, a copy of the quiet one, which computes so little that the server
around it, and the client, are what is saturated. A round does all of that on each server, the next round in the
opposite order; a ratio is the median of the ratios within rounds.

The aim is a p99 of at most twice that of the quiet model alone. All share the machine's cores, the load on the busy
model included. Who asks the quiet model is the instrument here, and would be on another machine: the *realtime* one
gets a core at once whenever it wants one, alone and beside. The *normal* one stands in line with everybody, and a part
of what it sees is how long it has waited itself for a core that the load keeps busy, which no server decides.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.kserve import infer_once, infer_request
from bench.load.client import LoadResult, run_load
from bench.machine import describe_machine, machine_line, save_results
from bench.servers import Server, alpha_repository, forebay, triton
from bench.tables import markdown_table, number
from bench.wide_model import write_wide_model

QUIET = "alpha_model_000"
#: What is saturated, by what the command line calls it.
BUSY = {"tiny": "alpha_model_001", "wide": "alpha_model_002"}

#: How much longer the busy model is asked than the quiet one is measured, s.
_MARGIN_S = 1.0


class Pair(NamedTuple):
    """One round of one server."""

    alone: LoadResult
    beside: LoadResult
    """The quiet model while the other is saturated."""
    busy: LoadResult

    def as_json(self) -> dict[str, object]:
        return {name: result.as_json() for name, result in self._asdict().items()}


#: By what is busy, the client and the server.
Rounds = dict[tuple[str, str, str], list[Pair]]


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    rows = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    requests = {name: infer_request(name, {"features": rows}, ["prediction"]) for name in (QUIET, *BUSY.values())}
    rounds: Rounds = {case: [] for case in itertools.product(options.busy, options.clients, options.servers)}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(_running(name)) for name in options.servers}
        for server in servers.values():
            answers = {name: infer_once(server.http_port, request)["prediction"] for name, request in requests.items()}
            np.testing.assert_array_equal(answers[QUIET], answers[BUSY["tiny"]])
        for number_of_round in range(options.rounds):
            order = options.servers if number_of_round % 2 == 0 else options.servers[::-1]
            for busy, client, name in itertools.product(options.busy, options.clients, order):
                realtime = client == "realtime"
                pair = measure_pair(servers[name], requests[QUIET], requests[BUSY[busy]], options, realtime=realtime)
                rounds[busy, client, name].append(pair)
                print(
                    f"round {number_of_round + 1}, {name}, {client} client: p99 {pair.alone.p99_us} us alone, "
                    f"{pair.beside.p99_us} us beside {busy}"
                )
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(report(rounds))
    figures = {", ".join(case): [pair.as_json() for pair in pairs] for case, pairs in rounds.items()}
    print(f"\nsaved: {save_results('isolation', machine, figures, options.output)}")


def measure_pair(
    server: Server, quiet_request: bytes, busy_request: bytes, options: _Options, *, realtime: bool
) -> Pair:
    """Measure the quiet model alone, then beside the busy one.

    Args:
        realtime: with a client that never waits for a core.
    """
    port = server.http_port

    def quiet() -> LoadResult:
        return run_load(
            port,
            quiet_request,
            connections=1,
            duration_s=options.duration,
            warmup_s=options.warmup,
            realtime=realtime,
        )

    alone = quiet()
    busy: list[LoadResult] = []
    started = threading.Event()

    def saturate() -> None:
        busy.append(
            run_load(
                port,
                busy_request,
                connections=options.connections,
                duration_s=options.warmup + options.duration + _MARGIN_S,
                on_start=started.set,
            )
        )

    thread = threading.Thread(target=saturate)
    thread.start()
    started.wait(options.duration + 30)
    beside = quiet()
    thread.join()
    return Pair(alone, beside, busy[0])


def report(rounds: Rounds) -> str:
    """Return the table: medians, and the medians of the ratios, by what is busy, the client and the server."""
    return markdown_table(
        [
            "beside",
            "client",
            "server",
            "p50 us alone",
            "p50 us beside",
            "ratio",
            "p99 us alone",
            "p99 us beside",
            "ratio",
            "busy model, 1/s",
        ],
        [
            [
                *case,
                *_columns([pair.alone.p50_us for pair in pairs], [pair.beside.p50_us for pair in pairs]),
                *_columns([pair.alone.p99_us for pair in pairs], [pair.beside.p99_us for pair in pairs]),
                number(statistics.median(pair.busy.rate_per_s for pair in pairs)),
            ]
            for case, pairs in rounds.items()
        ],
    )


def _columns(alone: list[float], beside: list[float]) -> list[str]:
    ratio = statistics.median(mine / its for mine, its in zip(beside, alone, strict=True))
    return [number(statistics.median(alone)), number(statistics.median(beside)), number(ratio)]


@contextlib.contextmanager
def _running(name: str) -> Iterator[Server]:
    backend = "onnxruntime" if name == "forebay" else "python"
    start = forebay if name == "forebay" else triton
    with alpha_repository(backend, instances=1, copies=1 + len(BUSY)) as repository:
        write_wide_model(repository / BUSY["wide"] / "2" / "model.onnx")
        with start(repository) as server:
            yield server


class _Options(argparse.Namespace):
    """The command line."""

    servers: list[str]
    busy: list[str]
    clients: list[str]
    connections: int
    rounds: int
    duration: float
    warmup: float
    output: Path | None


def _names(*known: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"one or more of {', '.join(known)}")
        return names

    return parse


def _parse_options() -> _Options:
    parser = argparse.ArgumentParser(prog="python -m bench.isolation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--servers", type=_names("forebay", "triton"), default=["forebay", "triton"])
    parser.add_argument("--busy", type=_names(*BUSY), default=list(BUSY))
    parser.add_argument("--clients", type=_names("realtime", "normal"), default=["realtime", "normal"])
    parser.add_argument("--connections", type=int, default=32, help="on the busy model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=3, help="seconds of one measurement")
    parser.add_argument("--warmup", type=float, default=1, help="seconds before each measurement")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/isolation-DATE-COMMIT.json)")
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
