"""How fast is forebay beside a real Triton, for small inferences over gRPC?

    python -m bench.grpc_vs_triton [--in-flight 1,8,32] [--rounds 5] [--delay 0]

Both servers run at once and serve ``alpha_model`` version 2 with the same ``config.pbtxt``, on free ports; one is idle
while the other is measured. A round measures every number of calls in flight, forebay and Triton one directly after the
other, and the next round begins with the other server. What is printed are medians over the rounds; a ratio is the
median of the ratios of measurements that followed each other, so that a slow minute of the machine falls on both.

The client is h2load (Debian's package ``nghttp2-client``): one connection, that many streams of it in flight, each a
unary ``ModelInfer`` with 200 bytes of tensor. It is C, so what it takes of the two cores is small beside either server;
latencies are those of its log, one line per call. *Server CPU* is user and system time of all processes of a server
per inference, from /proc, while the client ran; how many inferences there were the server's own statistics say.

The Triton that PyPI offers has no C++ ONNX Runtime backend; its Python backend runs the same file here. With the
factors between the two backends that were measured over HTTP (`rounds.CPP_FACTORS`) a ratio against the C++
backend is *estimated*; only forebay and the Python backend are measured by this file.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tritonclient.grpc as grpcclient

from bench.kserve import FloatArray, execution_counts, get_json
from bench.load.client import LoadFailed
from bench.machine import describe_machine, machine_line, save_results
from bench.rounds import (
    MEDIAN_COLUMNS,
    RATIO_COLUMNS,
    RoundOptions,
    idle_cores,
    in_turns,
    numbers,
    round_parser,
    triton_report,
)
from bench.servers import EXAMPLE_REPOSITORY, PEER_FOLDER, Server, alpha_repository, forebay, free_ports, triton

MODEL = "alpha_model"
#: Seconds beyond the measurement that h2load may take to start and to finish.
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class GrpcMeasurement:
    """One run of h2load against a server."""

    rate_per_s: float
    p50_us: float
    p99_us: float
    mean_batch: float
    cpu_us: float

    def figures(self) -> dict[str, float]:
        """Return what the tables show, by column."""
        return asdict(self)


#: Measurements by calls in flight and server name, in the order of the rounds.
Rounds = dict[int, dict[str, list[GrpcMeasurement]]]


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    if shutil.which("h2load") is None:
        raise SystemExit("h2load is missing: apt-get install nghttp2-client")
    rows = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    our_port, peer_port = free_ports(2)
    ours_flags = ["--allow-grpc=true", "--grpc-address=127.0.0.1", f"--grpc-port={our_port}"]
    peer_flags = ["--allow-grpc=true", "--grpc-address=127.0.0.1", f"--grpc-port={peer_port}"]
    with (
        idle_cores(options.cores),
        alpha_repository("onnxruntime", delay_us=options.delay, instances=options.instances) as our_repository,
        alpha_repository("python", delay_us=options.delay, instances=options.instances) as peer_repository,
        forebay(our_repository, *ours_flags) as ours,
        triton(peer_repository, *peer_flags, folder=options.peer) as peer,
        tempfile.TemporaryDirectory(prefix="grpc-bench-") as folder,
    ):
        ports = {ours.name: our_port, peer.name: peer_port}
        for server in (ours, peer):
            check_prediction(ports[server.name], rows)
        message = Path(folder) / "message"
        message.write_bytes(request_message(rows))
        peer_version: str = get_json(peer.http_port, "/v2")["version"]
        rounds: Rounds = {in_flight: {ours.name: [], peer.name: []} for in_flight in options.in_flight}
        for number_of_round, order in in_turns((ours, peer), options.rounds):
            for in_flight in options.in_flight:
                for server in order:
                    run_h2load(ports[server.name], message, in_flight, options.warmup)
                    seen = measure(server, ports[server.name], message, in_flight, options.duration)
                    rounds[in_flight][server.name].append(seen)
                    print(
                        f"round {number_of_round}, {in_flight} in flight, {server.name}: "
                        f"{seen.rate_per_s:,.0f}/s, {seen.cpu_us:.1f} us of server CPU",
                        flush=True,
                    )
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(
        triton_report(
            MEDIAN_COLUMNS, RATIO_COLUMNS, "in flight", rounds, peer_version=peer_version, estimates=options.delay == 0
        )
    )
    figures: dict[str, Any] = {
        "triton_version": peer_version,
        "by_in_flight": {
            in_flight: {name: [asdict(one) for one in seen] for name, seen in servers.items()}
            for in_flight, servers in rounds.items()
        },
    }
    print(f"\nsaved: {save_results('grpc_vs_triton', machine, figures, options.output)}")


def check_prediction(port: int, rows: FloatArray) -> None:
    """See that a server computes what the model computes in process; a fast wrong answer is no result.

    Raises:
        AssertionError: it does not.
    """
    session = onnxruntime.InferenceSession(EXAMPLE_REPOSITORY / MODEL / "2" / "model.onnx")
    (expected,) = session.run(None, {"features": rows})
    tensor = grpcclient.InferInput("features", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        found = client.infer(MODEL, [tensor]).as_numpy("prediction")
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5)


def request_message(rows: FloatArray) -> bytes:
    """Return a ``ModelInferRequest`` as it follows the header: with its five bytes of prefix."""
    request = grpcclient.service_pb2.ModelInferRequest(model_name=MODEL, raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="features", datatype="FP32", shape=rows.shape)
    body: bytes = request.SerializeToString()
    return b"\0" + len(body).to_bytes(4, "big") + body


def measure(server: Server, port: int, message: Path, in_flight: int, duration_s: int) -> GrpcMeasurement:
    """Put load on a server and return what happened.

    Raises:
        LoadFailed: an answer was no success, or the server counted fewer inferences than there were answers.
    """
    inferences_before, executions_before = execution_counts(server.http_port, MODEL)
    usage_before = server.processes.usage()
    latencies_us, elapsed_s = run_h2load(port, message, in_flight, duration_s)
    usage = server.processes.usage() - usage_before
    inferences, executions = execution_counts(server.http_port, MODEL)
    count = inferences - inferences_before
    if count < len(latencies_us):
        raise LoadFailed(f"{server.name} answered {len(latencies_us)} calls and ran {count}\n{server.log_tail(10)}")
    cuts = statistics.quantiles(latencies_us, n=100)
    return GrpcMeasurement(
        rate_per_s=len(latencies_us) / elapsed_s,
        p50_us=cuts[49],
        p99_us=cuts[98],
        mean_batch=count / max(1, executions - executions_before),
        cpu_us=usage.cpu_ns / 1e3 / count,
    )


def run_h2load(port: int, message: Path, in_flight: int, duration_s: int) -> tuple[list[float], float]:
    """Run h2load for so long; return the latency of each call, microseconds, and the seconds that it took.

    Raises:
        LoadFailed: it failed, or an answer was not HTTP 200.
    """
    log = message.with_name("h2load.log")
    log.unlink(missing_ok=True)
    command = ["h2load", "--clients=1", f"--max-concurrent-streams={in_flight}", f"--duration={duration_s}"]
    command += [f"--data={message}", "--header=content-type: application/grpc", "--header=te: trailers"]
    command += [f"--log-file={log}", f"http://127.0.0.1:{port}/inference.GRPCInferenceService/ModelInfer"]
    began_s = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, timeout=duration_s + _PATIENCE_S, check=False)
    elapsed_s = time.monotonic() - began_s
    if run.returncode:
        raise LoadFailed(f"h2load ended with {run.returncode}: {run.stderr.strip()}")
    # One line per call: when it began, status, microseconds.
    calls = [line.split("\t") for line in log.read_text().splitlines()]
    if not calls or any(status != "200" for _began, status, _took in calls):
        raise LoadFailed(f"{sum(status != '200' for _b, status, _t in calls)} of {len(calls)} calls failed")
    return [float(took) for _began, _status, took in calls], elapsed_s


class _Options(RoundOptions):
    """The command line. h2load measures whole seconds."""

    in_flight: list[int]
    duration: int
    warmup: int
    delay: int
    instances: int
    peer: Path


def _parse_options() -> _Options:
    parser = round_parser("grpc_vs_triton", __doc__, duration_s=4, type=int)
    parser.add_argument("--in-flight", type=numbers, default=[1, 8, 32])
    parser.add_argument("--delay", type=int, default=0, help="queue delay of the model, microseconds")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--peer", type=Path, default=PEER_FOLDER, help="where bench/peer_triton.sh installed Triton")
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
