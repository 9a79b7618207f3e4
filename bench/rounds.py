"""Rounds of paired measurements, and what is made of them: medians, and medians of the ratios within rounds.

Machines drift by more than what is compared. So whatever is compared is measured directly one after the other, the next
round begins at the other end, and a slow minute of the machine falls on everything alike.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench.tables import markdown_table, number
from forebay.ipc.wakeup_latency import WakeupLatency

#: Triton's C++ ONNX Runtime backend divided by its Python backend, by requests in flight: rate, p50, server CPU.
#: Measured on 2026-11-22 with wrk (one thread), queue delay 0 and two instances, both of Triton 2.51 in one session on
#: 2 cores.
CPP_FACTORS: dict[int, dict[str, float]] = {
    1: {"rate_per_s": 2.24, "p50_us": 0.38, "cpu_us": 0.38},
    8: {"rate_per_s": 1.73, "p50_us": 0.55, "cpu_us": 0.58},
    32: {"rate_per_s": 2.00, "p50_us": 0.48, "cpu_us": 0.50},
    128: {"rate_per_s": 1.40, "p50_us": 0.72, "cpu_us": 0.62},
}

#: Columns of the medians, and what they are called.
MEDIAN_COLUMNS = {
    "rate_per_s": "inferences/s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "mean_batch": "batch",
    "cpu_us": "server CPU us",
}
#: The same of the ratios.
RATIO_COLUMNS = {"rate_per_s": "rate", "p50_us": "p50", "p99_us": "p99", "cpu_us": "server CPU"}

CORES_HELP = "what idle cores do, for all servers: sleep as the system has it, or stay awake"

Item = TypeVar("Item")


class Measured(Protocol):
    """One measurement."""

    def figures(self) -> dict[str, float]:
        """Return what the tables show, by column."""
        ...


def in_turns(items: Sequence[Item], rounds: int) -> Iterator[tuple[int, Sequence[Item]]]:
    """Yield the number of each round, from 1, with the items in its order: every second round from the end."""
    for number_of_round in range(1, rounds + 1):
        yield number_of_round, items if number_of_round % 2 else items[::-1]


def median(seen: Sequence[Measured], column: str) -> float:
    """Return the median of a column over the rounds."""
    return statistics.median(measurement.figures()[column] for measurement in seen)


def median_ratio(ours: Sequence[Measured], theirs: Sequence[Measured], column: str) -> float:
    """Return the median of the ratios within rounds."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(mine.figures()[column] / its.figures()[column] for mine, its in pairs)


def median_table(titles: Mapping[str, str], first: str, seen: Mapping[str, Sequence[Measured]]) -> str:
    """Return a table of medians.

    Args:
        titles: title by column.
        first: title of the lines' names.
        seen: measurements by the name of a line.
    """
    lines = [[name, *(number(median(measured, column)) for column in titles)] for name, measured in seen.items()]
    return markdown_table([first, *titles.values()], lines)


def triton_report(
    titles: Mapping[str, str],
    ratio_titles: Mapping[str, str],
    first: str,
    rounds: Mapping[int, Mapping[str, Sequence[Measured]]],
    *,
    peer_version: str,
    estimates: bool,
) -> str:
    """Return the tables beside a Triton: medians, ratios, and the estimate against its C++ backend.

    Args:
        titles: of the medians, by column.
        first, rounds, estimates: as for :func:`triton_tables`.
    """
    seen = {f"{in_flight}, {name}": seen for in_flight, servers in rounds.items() for name, seen in servers.items()}
    return "\n".join(
        (
            f"Medians; Triton {peer_version} runs the model in its Python backend.\n",
            median_table(titles, f"{first}, server", seen),
            triton_tables(ratio_titles, first, rounds, estimates=estimates),
        )
    )


def triton_tables(
    titles: Mapping[str, str], first: str, seen: Mapping[int, Mapping[str, Sequence[Measured]]], *, estimates: bool
) -> str:
    """Return the tables of forebay's ratios to Triton, and of the estimate beside Triton's C++ backend.

    Args:
        titles: title of a ratio by column.
        first: title of the numbers of requests in flight.
        seen: measurements by requests in flight and server ("forebay", "triton").
        estimates: the load is such that :data:`CPP_FACTORS` may be applied.
    """
    ratios = {
        in_flight: {column: median_ratio(servers["forebay"], servers["triton"], column) for column in titles}
        for in_flight, servers in seen.items()
    }
    lines = [[str(in_flight), *map(number, ratio.values())] for in_flight, ratio in ratios.items()]
    text = [
        "\nforebay / Triton (Python backend), medians of paired ratios\n",
        markdown_table([first, *titles.values()], lines),
    ]
    estimated = [
        [str(in_flight), *(number(ratio[column] / factor) for column, factor in CPP_FACTORS[in_flight].items())]
        for in_flight, ratio in ratios.items()
        if estimates and in_flight in CPP_FACTORS
    ]
    if estimated:
        text.append("\nforebay / Triton (C++ backend): an ESTIMATE, by factors measured once over HTTP elsewhere\n")
        text.append(markdown_table([first, "rate", "p50", "server CPU"], estimated))
    return "\n".join(text)


@contextlib.contextmanager
def idle_cores(how: str) -> Iterator[None]:
    """Have idle cores do what ``--cores`` says until the end of the block, whatever is measured."""
    latency = WakeupLatency(0)
    if how == "awake":
        latency.hold()
    try:
        yield
    finally:
        latency.release()


class RoundOptions(argparse.Namespace):
    """What every command line of paired rounds has."""

    rounds: int
    duration: float
    warmup: float
    cores: str
    output: Path | None


def round_parser(name: str, doc: str | None, *, duration_s: float, **types: Any) -> argparse.ArgumentParser:
    """Return a parser with the options of :class:`RoundOptions`.

    Args:
        name: of the module in ``bench``.
        doc: its docstring, whose first line is the description.
        duration_s: of one measurement, unless the command line says otherwise.
        types: further arguments for the durations, such as ``type=int``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(doc or "").partition("\n")[0])
    types = {"type": float} | types
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", default=duration_s, help="seconds of one measurement", **types)
    parser.add_argument("--warmup", default=1, help="seconds before each measurement", **types)
    parser.add_argument("--cores", choices=["system", "awake"], default="system", help=CORES_HELP)
    parser.add_argument("--output", type=Path, help=f"results file (default: bench/results/{name}-DATE-COMMIT.json)")
    return parser


def numbers(text: str) -> list[int]:
    """Parse an option that is a list: ``1,8,32``."""
    return [int(part) for part in text.split(",")]
