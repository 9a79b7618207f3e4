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
once on another machine (`rounds.CPP_FACTORS`); only forebay and the Python backend are measured by this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from bench.kserve import FloatArray, get_json, infer_once, infer_request
from bench.machine import describe_machine, machine_line, save_results
from bench.measurement import Client, Measurement, measure
from bench.rounds import RoundOptions, idle_cores, in_turns, numbers, round_parser, triton_report
from bench.servers import EXAMPLE_REPOSITORY, PEER_FOLDER, Server, alpha_repository, forebay, triton

MODEL = "alpha_model"
#: Columns of a ratio, and what they are called.
RATIO_COLUMNS = {"rate_per_s": "rate", "p50_us": "p50", "p99_us": "p99", "p99_9_us": "p99.9", "cpu_us": "server CPU"}
#: Columns of the medians.
COLUMNS = {
    "rate_per_s": "inferences/s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "p99_9_us": "p99.9 us",
    "mean_batch": "batch",
    "cpu_us": "server CPU us",
    "switches": "switches",
    "client_cpu_us": "client CPU us",
}

#: Measurements by connections and server name, in the order of the rounds.
Rounds = dict[int, dict[str, list[Measurement]]]


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    rows = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    with (
        idle_cores(options.cores),
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
        for number_of_round, order in in_turns((ours, peer), options.rounds):
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
                        f"round {number_of_round}, {connections} connections, {server.name}: "
                        f"{measurement.load.rate_per_s:,.0f}/s, {measurement.cpu_us:.1f} us of server CPU",
                        flush=True,
                    )
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(
        triton_report(
            COLUMNS, RATIO_COLUMNS, "connections", rounds, peer_version=peer_version, estimates=options.delay == 0
        )
    )
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


class _Options(RoundOptions):
    """The command line."""

    connections: list[int]
    delay: int
    instances: int
    client: Client
    peer: Path


def _parse_options() -> _Options:
    parser = round_parser("http_vs_triton", __doc__, duration_s=4)
    parser.add_argument("--connections", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--delay", type=int, default=0, help="queue delay of the model, microseconds")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--client", choices=["wrk", "load"], default="wrk", help="wrk measures whole seconds")
    parser.add_argument("--peer", type=Path, default=PEER_FOLDER, help="where bench/peer_triton.sh installed Triton")
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
