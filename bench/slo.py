"""How many requests per second are answered within an objective of 5, 10 or 20 ms?

    python -m bench.slo [--quick] [--model mlp|device] [--servers forebay,triton] [--arrivals poisson,bursty]

One model, one instance, at most 32 rows. *mlp*, the default, is an ONNX file whose batch costs about a millisecond
however small it is, and an eighth of that per row. *device* stands for a model on an accelerator: a Python model that
sleeps, 2 ms and 0.25 ms per row, so that it does not compete with servers and client for the cores of a small machine.

forebay serves it with delays of 0, 2 and 5 ms, and by objective (``forebay_slo_ms``); Triton with delays of 0 and 2 ms.
An open loop asks each of them at the same rates: multiples of what forebay without a delay answers in a closed loop.
*Poisson* arrivals are those of many independent clients; *bursty* ones come at 2.5 times the mean rate for 20 ms, then
at 0.625 times for 80 ms. Latency counts from the time a request was due; a refused or late request counts as one that
was not answered in time.

What is printed, for each objective: the highest rate at which 99 % of the requests were in time, and how many requests
per second were answered in time at the highest rate, where none of them can answer all. All run on one machine, the
client included, one server directly after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from bench.kserve import FloatArray, infer_once, infer_request
from bench.load.client import Arrivals, LoadFailed, LoadResult, run_load
from bench.machine import REPOSITORY_ROOT, describe_machine, machine_line, save_results
from bench.servers import PEER_MODEL, Server, forebay, triton
from bench.tables import markdown_table, number

Model = Literal["mlp", "device"]

OBJECTIVES_MS = (5, 10, 20)
#: Queue delays that are compared, us, by server.
DELAYS_US = {"forebay": (0, 2000, 5000), "triton": (0, 2000)}
WIDTH = 1024
LAYERS = 6
#: Numbers in a row.
WIDTHS = {"mlp": WIDTH, "device": 16}
DEVICE_MODEL = REPOSITORY_ROOT / "bench" / "python_models" / "device.py"
ROWS_MAX = 32
#: Enough for all that is asked within the time of the longest objective, at the highest rate.
CONNECTIONS = 256
#: The share of requests that must be in time for a rate to count as sustained.
SHARE = 0.99

CONFIG = """
backend: "{backend}"
max_batch_size: {rows}
input {{ name: "x" data_type: TYPE_FP32 dims: [ {width} ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 8 ] }}
instance_group {{ count: 1 kind: KIND_CPU }}
dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}
{parameters}
"""


class Contender(NamedTuple):
    """One way to form batches."""

    name: str
    server: Server
    model: str
    objective_ms: int = 0
    """0: the same for every objective."""


class Measurement(NamedTuple):
    """One contender at one rate."""

    contender: str
    objective_ms: int
    arrivals: Arrivals
    share: float
    """Of the capacity: what the rate is a multiple of."""
    rate_per_s: float
    load: LoadResult

    def in_time(self, objective_ms: int) -> float:
        """Return the share of requests that were answered within an objective."""
        return self.load.within_counts[OBJECTIVES_MS.index(objective_ms)] / max(self.load.due_count, 1)

    def as_json(self) -> dict[str, Any]:
        return self._asdict() | {"load": self.load.as_json()}


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    row = np.random.default_rng(0).standard_normal((1, WIDTHS[options.model])).astype(np.float32)
    expected = _mlp_output(row) if options.model == "mlp" else row[:, :8]
    with contextlib.ExitStack() as stack:
        contenders = [c for name in options.servers for c in stack.enter_context(_running(name, options.model))]
        for contender in contenders:
            check(contender, row, expected)
        capacity = run_load(
            contenders[0].server.http_port, _request(contenders[0], row), connections=64, duration_s=options.duration
        ).rate_per_s
        print(f"{contenders[0].name} in a closed loop of 64 connections: {capacity:,.0f}/s", flush=True)
        seen = [
            measure(contender, row, kind, share, capacity, options)
            for kind in options.arrivals
            for share in options.rates
            for contender in contenders
        ]
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    for kind in options.arrivals:
        print(report([one for one in seen if one.arrivals == kind], kind), "\n")
    figures = {"capacity_per_s": capacity, "measurements": [one.as_json() for one in seen]}
    print(f"saved: {save_results('slo', machine, figures, options.output)}")


def measure(
    contender: Contender, row: FloatArray, arrivals: Arrivals, share: float, capacity: float, options: _Options
) -> Measurement:
    """Ask one contender at one rate."""
    load = run_load(
        contender.server.http_port,
        _request(contender, row),
        connections=CONNECTIONS,
        duration_s=options.duration,
        warmup_s=options.warmup,
        rate_per_s=capacity * share,
        arrivals=arrivals,
        limits_us=[objective * 1000 for objective in OBJECTIVES_MS],
    )
    wrong = load.connection_error_count + load.length_mismatch_count
    if wrong or (load.non_200_count and not load.first_error.startswith("503")):
        raise LoadFailed(f"{contender.name}: {load}\n{contender.server.log_tail(10)}")
    measurement = Measurement(contender.name, contender.objective_ms, arrivals, share, capacity * share, load)
    in_time = ", ".join(f"{objective} ms {measurement.in_time(objective):.1%}" for objective in OBJECTIVES_MS)
    print(f"{arrivals} {measurement.rate_per_s:,.0f}/s, {contender.name}: {in_time}", flush=True)
    return measurement


def report(seen: list[Measurement], arrivals: str) -> str:
    """Return a table of one kind of arrivals."""
    names = list(dict.fromkeys(one.contender.partition(" slo")[0] for one in seen))
    highest = max(one.share for one in seen)
    titles = [f"{arrivals} arrivals", *(f"{SHARE:.0%} in {ms} ms up to, 1/s" for ms in OBJECTIVES_MS)]
    titles += [f"in {ms} ms at {highest:g}x, 1/s" for ms in OBJECTIVES_MS]
    rows: list[list[str]] = []
    for name in [*names, "forebay slo"]:
        mine = [one for one in seen if one.contender.startswith(name)]
        if name == "forebay":
            continue
        meant = {ms: [one for one in mine if one.objective_ms in (0, ms)] for ms in OBJECTIVES_MS}
        sustained = [
            max((one.rate_per_s for one in meant[ms] if one.in_time(ms) >= SHARE), default=0.0) for ms in OBJECTIVES_MS
        ]
        goodput = [
            max((one.in_time(ms) * one.rate_per_s for one in meant[ms] if one.share == highest), default=0.0)
            for ms in OBJECTIVES_MS
        ]
        rows.append([name, *(number(rate) if rate else "-" for rate in (*sustained, *goodput))])
    return markdown_table(titles, rows)


def check(contender: Contender, row: FloatArray, expected: FloatArray) -> None:
    """See that it computes what the model computes, and let it see batches before anything is measured."""
    request = _request(contender, row)
    np.testing.assert_allclose(infer_once(contender.server.http_port, request)["y"], expected, rtol=1e-3, atol=1e-4)
    run_load(contender.server.http_port, request, connections=16, duration_s=0.3, warmup_s=0.1)


def _request(contender: Contender, row: FloatArray) -> bytes:
    return infer_request(contender.model, {"x": row}, ["y"])


@contextlib.contextmanager
def _running(name: str, kind: Model) -> Iterator[list[Contender]]:
    """Start a server with all of its contenders; those that are not asked cost nothing."""
    variants = {f"delay_{delay_us}": (delay_us, 0) for delay_us in DELAYS_US[name]}
    if name == "forebay":
        variants |= {f"slo_{objective}": (0, objective) for objective in OBJECTIVES_MS}
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        for model, (delay_us, objective_ms) in variants.items():
            _add_model(Path(folder) / model, name, kind, delay_us, objective_ms)
        with (forebay if name == "forebay" else triton)(Path(folder)) as server:
            yield [
                Contender(
                    f"{name} slo {objective_ms} ms" if objective_ms else f"{name} delay {delay_us / 1000:g} ms",
                    server,
                    model,
                    objective_ms,
                )
                for model, (delay_us, objective_ms) in variants.items()
            ]


def _add_model(folder: Path, server: str, kind: Model, delay_us: int, objective_ms: int) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    if kind == "device":
        (version / "model.py").write_bytes(DEVICE_MODEL.read_bytes())
    else:
        onnx.save(_network(), str(version / "model.onnx"))
        if server == "triton":
            (version / "model.py").write_bytes(PEER_MODEL.read_bytes())
    parameters = (
        f'parameters {{ key: "forebay_slo_ms" value {{ string_value: "{objective_ms}" }} }}' if objective_ms else ""
    )
    backend = "python" if server == "triton" or kind == "device" else "onnxruntime"
    config = CONFIG.format(backend=backend, rows=ROWS_MAX, width=WIDTHS[kind], delay_us=delay_us, parameters=parameters)
    (folder / "config.pbtxt").write_text(config)


def _weights() -> list[FloatArray]:
    dice = np.random.default_rng(1)
    sizes = [WIDTH] * LAYERS + [8]
    return [
        (dice.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        for rows, columns in zip([WIDTH, *sizes], sizes, strict=False)
    ]


def _network() -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    name = "x"
    weights = _weights()
    for index, weight in enumerate(weights):
        is_last = index == len(weights) - 1
        initializers.append(
            helper.make_tensor(f"w{index}", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)
        )
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], ["y" if is_last else f"h{index}"]))
        if not is_last:
            nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"]))
            name = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _mlp_output(row: FloatArray) -> FloatArray:
    hidden = row
    *inner, last = _weights()
    for weight in inner:
        hidden = np.maximum(hidden @ weight, 0)
    return hidden @ last


class _Options(argparse.Namespace):
    """The command line."""

    model: Model
    servers: list[str]
    arrivals: list[Arrivals]
    rates: list[float]
    duration: float
    warmup: float
    quick: bool
    output: Path | None


def _one_of(*known: str) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"known are {', '.join(known)}")
        return names

    return parse


def _parse_options() -> _Options:
    parser = argparse.ArgumentParser(prog="python -m bench.slo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=["mlp", "device"], default="mlp")
    parser.add_argument("--servers", type=_one_of("forebay", "triton"), default=["forebay", "triton"])
    parser.add_argument("--arrivals", type=_one_of("poisson", "bursty"), default=["poisson", "bursty"])
    parser.add_argument(
        "--rates",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.2],
        help="multiples of the capacity",
    )
    parser.add_argument("--duration", type=float, default=2.0, help="seconds of one measurement")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before each measurement")
    parser.add_argument("--quick", action="store_true", help="three rates, one second each")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/slo-DATE-COMMIT.json)")
    options = parser.parse_args(namespace=_Options())
    if options.quick:
        options.rates, options.duration, options.warmup = [0.3, 0.6, 1.2], 1.0, 0.3
    return options


if __name__ == "__main__":
    main()
