"""How fast is forebay beside a real Triton, for small inferences over HTTP?

    python -m bench.http_vs_triton [--connections 1,8,32,128] [--rounds 5] [--delay 0] [--client wrk]

Both servers run at once and serve ``alpha_model`` version 2 with the same ``config.pbtxt``, on free ports; one is idle
while the other is measured. A round measures every number of connections, forebay and Triton one directly after the
other, and the next round begins with the other server. What is printed are medians over the rounds; a ratio is the
median of the ratios of measurements that followed each other, so that a slow minute of the machine falls on both.

*Server CPU* is user and system time of all processes of a server per inference, from /proc, while the client ran;
*batch* is inferences per execution, from the server's own statistics.

The Triton that PyPI offers has no C++ ONNX Runtime backend; its Python backend runs the same file here. What forebay
would look like beside the C++ backend is *estimated*, with factors between Triton's two backends that were measured
once on another machine (`CPP_FACTORS`); only forebay and the Python backend are measured by this file.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import onnxruntime

from bench.kserve import FloatArray, get_json, infer_once, infer_request
from bench.machine import describe_machine, machine_line, save_results
from bench.measurement import Client, Measurement, measure
from bench.servers import EXAMPLE_REPOSITORY, PEER_FOLDER, Server, alpha_repository, forebay, triton
from bench.tables import markdown_table, number

MODEL = "alpha_model"
#: Columns of a ratio, and what they are called.
RATIO_COLUMNS = {"rate_per_s": "rate", "p50_us": "p50", "p99_us": "p99", "p99_9_us": "p99.9", "cpu_us": "server CPU"}
#: Triton's C++ ONNX Runtime backend divided by its Python backend, by connections: rate, p50, server CPU. Measured on
#: 2026-11-22 with wrk (one thread), queue delay 0 and two instances, both of Triton 2.51 in one session on 2 cores.
CPP_FACTORS: dict[int, dict[str, float]] = {
    1: {"rate_per_s": 2.24, "p50_us": 0.38, "cpu_us": 0.38},
    8: {"rate_per_s": 1.73, "p50_us": 0.55, "cpu_us": 0.58},
    32: {"rate_per_s": 2.00, "p50_us": 0.48, "cpu_us": 0.50},
    128: {"rate_per_s": 1.40, "p50_us": 0.72, "cpu_us": 0.62},
}

#: Measurements by connections and server name, in the order of the rounds.
Rounds = dict[int, dict[str, list[Measurement]]]


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    rows = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    with (
        alpha_repository("onnxruntime", delay_us=options.delay, instances=options.instances) as our_repository,
        alpha_repository("python", delay_us=options.delay, instances=options.instances) as peer_repository,
        forebay(our_repository) as ours,
        triton(peer_repository, folder=options.peer) as peer,
    ):
        requests = {server.name: infer_request(MODEL, {"features": rows}, ["prediction"]) for server in (ours, peer)}
        for server in (ours, peer):
            check_prediction(server, requests[server.name], rows)
        peer_version: str = get_json(peer.http_port, "/v2")["version"]
        rounds: Rounds = {connections: {ours.name: [], peer.name: []} for connections in options.connections}
        for number_of_round in range(options.rounds):
            order = (ours, peer) if number_of_round % 2 == 0 else (peer, ours)
            for connections in options.connections:
                for server in order:
                    measurement = measure(
                        server,
                        requests[server.name],
                        model=MODEL,
                        client=options.client,
                        connections=connections,
                        duration_s=options.duration,
                        warmup_s=options.warmup,
                    )
                    rounds[connections][server.name].append(measurement)
                    print(
                        f"round {number_of_round + 1}, {connections} connections, {server.name}: "
                        f"{measurement.load.rate_per_s:,.0f}/s, {measurement.cpu_us:.1f} us of server CPU",
                        flush=True,
                    )
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(report(rounds, options.delay, peer_version))
    measurements = {
        connections: {name: [measurement.as_json() for measurement in seen] for name, seen in servers.items()}
        for connections, servers in rounds.items()
    }
    figures = {"triton_version": peer_version, "by_connections": measurements}
    print(f"\nsaved: {save_results('http_vs_triton', machine, figures, options.output)}")


def check_prediction(server: Server, request: bytes, rows: FloatArray) -> None:
    """See that a server computes what the model computes in process; a fast wrong answer is no result.

    Raises:
        AssertionError: it does not.
    """
    session = onnxruntime.InferenceSession(EXAMPLE_REPOSITORY / MODEL / "2" / "model.onnx")
    (expected,) = session.run(None, {"features": rows})
    np.testing.assert_allclose(infer_once(server.http_port, request)["prediction"], np.asarray(expected), rtol=1e-5)


def report(rounds: Rounds, delay_us: int, peer_version: str) -> str:
    """Return the tables: medians, ratios, and the estimate against Triton's C++ backend."""
    titles = ["connections, server", "inferences/s", "p50 us", "p99 us", "p99.9 us", "batch", "server CPU us"]
    titles += ["switches", "client CPU us"]
    columns = ["rate_per_s", "p50_us", "p99_us", "p99_9_us", "mean_batch", "cpu_us", "switches", "client_cpu_us"]
    medians = [
        [f"{connections}, {name}", *(number(_median(seen, column)) for column in columns)]
        for connections, servers in rounds.items()
        for name, seen in servers.items()
    ]
    ratios = {
        connections: {column: _median_ratio(servers["forebay"], servers["triton"], column) for column in RATIO_COLUMNS}
        for connections, servers in rounds.items()
    }
    ratio_rows = [[str(count), *(number(ratio[column]) for column in RATIO_COLUMNS)] for count, ratio in ratios.items()]
    text = [
        f"Medians; Triton {peer_version} runs the model in its Python backend.\n",
        markdown_table(titles, medians),
        "\nforebay / Triton (Python backend), medians of paired ratios\n",
        markdown_table(["connections", *RATIO_COLUMNS.values()], ratio_rows),
    ]
    if delay_us == 0 and any(connections in CPP_FACTORS for connections in ratios):
        estimates = [
            [str(count), *(number(ratio[column] / factor) for column, factor in CPP_FACTORS[count].items())]
            for count, ratio in ratios.items()
            if count in CPP_FACTORS
        ]
        text.append("\nforebay / Triton (C++ backend): an ESTIMATE, by factors measured once on another machine\n")
        text.append(markdown_table(["connections", "rate", "p50", "server CPU"], estimates))
    return "\n".join(text)


def _median(measurements: list[Measurement], column: str) -> float:
    return statistics.median(measurement.figures()[column] for measurement in measurements)


def _median_ratio(ours: list[Measurement], peer: list[Measurement], column: str) -> float:
    pairs = zip(ours, peer, strict=True)
    return statistics.median(mine.figures()[column] / its.figures()[column] for mine, its in pairs)


class _Options(argparse.Namespace):
    """The command line."""

    connections: list[int]
    rounds: int
    duration: float
    warmup: float
    delay: int
    instances: int
    client: Client
    peer: Path
    output: Path | None


def _parse_options() -> _Options:
    parser = argparse.ArgumentParser(
        prog="python -m bench.http_vs_triton", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--connections", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 128]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=4, help="seconds of one measurement (whole seconds with wrk)")
    parser.add_argument("--warmup", type=float, default=1, help="seconds before each measurement")
    parser.add_argument("--delay", type=int, default=0, help="queue delay of the model, microseconds")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--client", choices=["wrk", "load"], default="wrk")
    parser.add_argument("--peer", type=Path, default=PEER_FOLDER, help="where bench/peer_triton.sh installed Triton")
    parser.add_argument(
        "--output", type=Path, help="results file (default: bench/results/http_vs_triton-DATE-COMMIT.json)"
    )
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
