"""What does an ensemble cost beside the models that it is made of?

    python -m bench.ensemble_overhead [--connections 1,8,32] [--rounds 5]

One server serves ``alpha_model`` version 2, an ensemble whose only step it is, and an ensemble of two steps: a model
that passes its rows on, then ``alpha_model``. A round measures them directly after one another, the next round in the
opposite order; a ratio is the median of the ratios within rounds, so that a slow minute of the machine falls on all.

The aim for one step is at most 1.15 times the model's p50 (core#7080 saw twice the p99 in Triton); two steps are shown
beside the sum of their models, each alone.
"""

from __future__ import annotations

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
from bench.rounds import RoundOptions, idle_cores, in_turns, median_ratio, median_table, numbers, round_parser
from bench.servers import EXAMPLE_REPOSITORY, forebay
from bench.tables import markdown_table, number

#: The model alone, the model in front of it alone, and the ensembles.
TARGETS = ("alpha_model", "pass_on", "one_step", "two_steps")

#: Columns of the medians.
COLUMNS = {"rate_per_s": "inferences/s", "p50_us": "p50 us", "p99_us": "p99 us", "cpu_us": "server CPU us"}

_MODEL = """
backend: "onnxruntime"
max_batch_size: 64
input [ {{ name: "features" data_type: TYPE_FP32 dims: [ 50 ] }} ]
output [ {{ name: "prediction" data_type: TYPE_FP32 dims: [ {made} ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ }}
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
    with idle_cores(options.cores), _repository() as repository, forebay(repository) as server:
        expected = infer_once(server.http_port, requests["alpha_model"])["prediction"]
        for name in ("one_step", "two_steps"):
            np.testing.assert_array_equal(infer_once(server.http_port, requests[name])["prediction"], expected)
        for number_of_round, order in in_turns(TARGETS, options.rounds):
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
                    print(f"round {number_of_round}, {connections} connections, {name}: {measurement.load.p50_us} us")
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
    medians = {
        f"{connections}, {name}": seen for connections, targets in rounds.items() for name, seen in targets.items()
    }
    ratios: list[list[str]] = []
    for connections, targets in rounds.items():
        alone, first = _column(targets["alpha_model"]), _column(targets["pass_on"])
        two = _column(targets["two_steps"])
        both = [mine + before for mine, before in zip(alone, first, strict=True)]
        of_two = statistics.median(ours / theirs for ours, theirs in zip(two, both, strict=True))
        of_one = median_ratio(targets["one_step"], targets["alpha_model"], "p50_us")
        ratios.append([str(connections), number(of_one), number(of_two)])
    return "\n".join(
        (
            median_table(COLUMNS, "connections, model", medians),
            "\np50, medians of paired ratios\n",
            markdown_table(["connections", "one step / its model", "two steps / the sum of their models"], ratios),
        )
    )


def _column(measurements: list[Measurement]) -> list[float]:
    return [measurement.load.p50_us for measurement in measurements]


@contextlib.contextmanager
def _repository() -> Iterator[Path]:
    """Write the models; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as directory:
        root = Path(directory)
        for name, config in (
            ("alpha_model", _MODEL.format(made=1)),
            ("pass_on", _MODEL.format(made=50)),
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


class _Options(RoundOptions):
    """The command line."""

    connections: list[int]


def _parse_options() -> _Options:
    parser = round_parser("ensemble_overhead", __doc__, duration_s=3)
    parser.add_argument("--connections", type=numbers, default=[1, 8, 32])
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
