"""What does an ensemble cost beside the models that it is made of?

    python -m bench.ensemble_overhead [--connections 1,8,32] [--rounds 5]

One server serves ``alpha_model`` version 2, an ensemble whose only step it is, and an ensemble of two steps: a model
that passes its rows on, then ``alpha_model``. A round measures them directly after one another, the next round in the
opposite order; a ratio is the median of the ratios within rounds, so that a slow minute of the machine falls on all.

The aim for one step is at most 1.15 times the model's p50 (core#7080 saw twice the p99 in Triton); two steps are shown
beside the sum of their models, each alone.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from bench.kserve import infer_once, infer_request
from bench.machine import describe_machine, machine_line, save_results
from bench.measurement import Measurement, measure
from bench.servers import EXAMPLE_REPOSITORY, forebay
from bench.tables import markdown_table, number

#: The model alone, the model in front of it alone, and the ensembles.
TARGETS = ("alpha_model", "pass_on", "one_step", "two_steps")

_PASS_ON = """
backend: "onnxruntime"
max_batch_size: 64
input [ { name: "features" data_type: TYPE_FP32 dims: [ 50 ] } ]
output [ { name: "prediction" data_type: TYPE_FP32 dims: [ 50 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
dynamic_batching { }
"""

_ALPHA = """
backend: "onnxruntime"
max_batch_size: 64
input [ { name: "features" data_type: TYPE_FP32 dims: [ 50 ] } ]
output [ { name: "prediction" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
dynamic_batching { }
"""

_ENSEMBLE = """
platform: "ensemble"
max_batch_size: 64
input [ {{ name: "features" data_type: TYPE_FP32 dims: [ 50 ] }} ]
output [ {{ name: "prediction" data_type: TYPE_FP32 dims: [ 1 ] }} ]
ensemble_scheduling {{ {steps} }}
"""

_STEP = (
    'step {{ model_name: "{model}" model_version: -1 '
    'input_map {{ key: "features" value: "{given}" }} output_map {{ key: "prediction" value: "{made}" }} }}'
)


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    rows = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    requests = {name: infer_request(name, {"features": rows}, ["prediction"]) for name in TARGETS}
    rounds: dict[int, dict[str, list[Measurement]]] = {
        connections: {name: [] for name in TARGETS} for connections in options.connections
    }
    with _repository() as repository, forebay(repository) as server:
        expected = infer_once(server.http_port, requests["alpha_model"])["prediction"]
        for name in ("one_step", "two_steps"):
            np.testing.assert_array_equal(infer_once(server.http_port, requests[name])["prediction"], expected)
        for number_of_round in range(options.rounds):
            order = TARGETS if number_of_round % 2 == 0 else TARGETS[::-1]
            for connections in options.connections:
                for name in order:
                    measurement = measure(
                        server,
                        requests[name],
                        model=name,
                        client="load",
                        connections=connections,
                        duration_s=options.duration,
                        warmup_s=options.warmup,
                    )
                    rounds[connections][name].append(measurement)
                    print(
                        f"round {number_of_round + 1}, {connections} connections, {name}: {measurement.load.p50_us} us"
                    )
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(report(rounds))
    figures = {
        "by_connections": {
            connections: {name: [seen.as_json() for seen in measurements] for name, measurements in targets.items()}
            for connections, targets in rounds.items()
        }
    }
    print(f"\nsaved: {save_results('ensemble_overhead', machine, figures, options.output)}")


def report(rounds: dict[int, dict[str, list[Measurement]]]) -> str:
    """Return the tables: medians, and what the ensembles cost."""
    medians = [
        [
            f"{connections}, {name}",
            *(number(_median(seen, column)) for column in ("rate_per_s", "p50_us", "p99_us", "cpu_us")),
        ]
        for connections, targets in rounds.items()
        for name, seen in targets.items()
    ]
    ratios: list[list[str]] = []
    for connections, targets in rounds.items():
        alone, first = _column(targets["alpha_model"]), _column(targets["pass_on"])
        one, two = _column(targets["one_step"]), _column(targets["two_steps"])
        both = [mine + before for mine, before in zip(alone, first, strict=True)]
        ratios.append([str(connections), number(_median_ratio(one, alone)), number(_median_ratio(two, both))])
    return "\n".join(
        (
            markdown_table(["connections, model", "inferences/s", "p50 us", "p99 us", "server CPU us"], medians),
            "\np50, medians of paired ratios\n",
            markdown_table(["connections", "one step / its model", "two steps / the sum of their models"], ratios),
        )
    )


def _median(measurements: list[Measurement], column: str) -> float:
    return statistics.median(measurement.figures()[column] for measurement in measurements)


def _column(measurements: list[Measurement]) -> list[float]:
    return [measurement.load.p50_us for measurement in measurements]


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def _repository() -> Iterator[Path]:
    """Write the models; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as directory:
        root = Path(directory)
        for name, config in (
            ("alpha_model", _ALPHA),
            ("pass_on", _PASS_ON),
            (
                "one_step",
                _ENSEMBLE.format(steps=_STEP.format(model="alpha_model", given="features", made="prediction")),
            ),
            (
                "two_steps",
                _ENSEMBLE.format(
                    steps=_STEP.format(model="pass_on", given="features", made="between")
                    + _STEP.format(model="alpha_model", given="between", made="prediction")
                ),
            ),
        ):
            (root / name / "1").mkdir(parents=True)
            (root / name / "config.pbtxt").write_text(config)
        shutil.copy(EXAMPLE_REPOSITORY / "alpha_model" / "2" / "model.onnx", root / "alpha_model" / "1")
        (root / "pass_on" / "1" / "model.onnx").write_bytes(_pass_on())
        yield root


def _pass_on() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["features"], ["prediction"])],
        "pass_on",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 50])],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["batch", 50])],
    )
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return model


class _Options(argparse.Namespace):
    """The command line."""

    connections: list[int]
    rounds: int
    duration: float
    warmup: float
    output: Path | None


def _parse_options() -> _Options:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ensemble_overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--connections", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=3, help="seconds of one measurement")
    parser.add_argument("--warmup", type=float, default=1, help="seconds before each measurement")
    parser.add_argument(
        "--output", type=Path, help="results file (default: bench/results/ensemble_overhead-DATE-COMMIT.json)"
    )
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
