"""What do Python models cost, beside Triton's Python backend with the same ``model.py``?

    python -m bench.python_backend [--connections 1,32] [--rounds 5]

Both servers run at once and serve one repository, the models of `bench/python_models/`: an identity and a numpy model
of 50 values to 1, both at each number of connections; an identity of 4 MB tensors; a model that calls another three
times (BLS), and an ensemble of the same three steps. A round measures each on forebay and Triton one directly after the
other, and the next round begins with the other server. What is printed are medians over the rounds; a ratio is the
median of the ratios of measurements that followed each other.

*Copies* are forebay's ``forebay_copied_bytes_total`` by stage, per inference: tensor bytes that the server copied in
user space. *ingress* is only what came in one read with the request's header; the kernel receives the rest straight
into the block that the model reads. An identity that answers with its input has that copied once, into the block that
the answer is sent from (*scatter*). The variant *lent* writes its answer into memory of ``pb_utils.empty``, which is
forebay's own: nothing is copied but by the model itself. Beside it stands Triton's plain identity.

Aims: server CPU and p50 at most half of Triton's; three calls at most 1.5 times the p50 of the ensemble.
"""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.kserve import FloatArray, execution_counts, get_json, infer_once, infer_request
from bench.machine import REPOSITORY_ROOT, describe_machine, machine_line, save_results
from bench.measurement import Measurement, measure
from bench.rounds import (
    MEDIAN_COLUMNS,
    RATIO_COLUMNS,
    RoundOptions,
    idle_cores,
    in_turns,
    median_ratio,
    median_table,
    numbers,
    round_parser,
)
from bench.servers import PEER_FOLDER, Server, forebay, triton
from bench.tables import markdown_table, number

MODEL_FOLDER = REPOSITORY_ROOT / "bench" / "python_models"
ROW_LENGTH = 50
#: FP32 values of a 4 MB tensor.
LARGE_LENGTH = 2**20
STAGES = ("ingress", "gather", "scatter", "egress")

#: Models that are one file: which, and the lengths of a row of IN and OUT.
PYTHON_MODELS: dict[str, tuple[str, int, int]] = {
    "identity": ("identity.py", ROW_LENGTH, ROW_LENGTH),
    "weighted_sum": ("weighted_sum.py", ROW_LENGTH, 1),
    "identity_4mb": ("identity.py", LARGE_LENGTH, LARGE_LENGTH),
    "identity_4mb_lent": ("identity_lent.py", LARGE_LENGTH, LARGE_LENGTH),
    "add_one": ("add_one.py", ROW_LENGTH, ROW_LENGTH),
    "three_calls": ("three_calls.py", ROW_LENGTH, ROW_LENGTH),
}
_TENSORS = """max_batch_size: 64
input [ {{ name: "IN" data_type: TYPE_FP32 dims: [ {given} ] }} ]
output [ {{ name: "OUT" data_type: TYPE_FP32 dims: [ {made} ] }} ]
"""
_PYTHON = 'backend: "python"\ninstance_group [ { count: 1 kind: KIND_CPU } ]\ndynamic_batching { }\n'
_STEP = (
    'step {{ model_name: "add_one" model_version: -1 '
    'input_map {{ key: "IN" value: "{given}" }} output_map {{ key: "OUT" value: "{made}" }} }}\n'
)


def _same(rows: FloatArray) -> FloatArray:
    return rows


def _weighted_sum(rows: FloatArray) -> FloatArray:
    return rows @ np.arange(ROW_LENGTH, dtype=np.float32)[:, np.newaxis]


def _plus_three(rows: FloatArray) -> FloatArray:
    return rows + 1 + 1 + 1


#: What each measured model computes.
EXPECTED: dict[str, Callable[[FloatArray], FloatArray]] = {
    "identity": _same,
    "weighted_sum": _weighted_sum,
    "identity_4mb": _same,
    "identity_4mb_lent": _same,
    "three_calls": _plus_three,
    "three_steps": _plus_three,
}
SMALL_MODELS = ("identity", "weighted_sum")
LARGE_MODELS = ("identity_4mb", "identity_4mb_lent")


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    model: str
    connections: int

    @property
    def title(self) -> str:
        return f"{self.model}, {self.connections}"

    def model_on(self, server: Server) -> str:
        """Return the model to ask: Triton has no `pb_utils.empty`, so its plain identity stands beside ours."""
        return self.model if server.name == "forebay" else self.model.removesuffix("_lent")

    def rows(self) -> FloatArray:
        """Return the one row that is sent."""
        length = LARGE_LENGTH if self.model in LARGE_MODELS else ROW_LENGTH
        return np.random.default_rng(0).standard_normal((1, length)).astype(np.float32)


#: Measurements by server name, in the order of the rounds.
Rounds = dict[str, list[Measurement]]


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    cases = [Case(model, connections) for model in SMALL_MODELS for connections in options.connections]
    cases += [Case(model, 1) for model in (*LARGE_MODELS, "three_calls", "three_steps")]
    requests = {model: infer_request(model, {"IN": Case(model, 1).rows()}, ["OUT"]) for model in EXPECTED}
    rounds: dict[Case, Rounds] = {case: {"forebay": [], "triton": []} for case in cases}
    copies: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    with (
        idle_cores(options.cores),
        python_repository() as repository,
        forebay(repository) as ours,
        triton(repository, folder=options.peer) as peer,
    ):
        for case in cases:
            for server in (ours, peer):
                answer = infer_once(server.http_port, requests[case.model_on(server)])["OUT"]
                np.testing.assert_allclose(answer, EXPECTED[case.model](case.rows()), rtol=1e-4, atol=1e-4)
        peer_version: str = get_json(peer.http_port, "/v2")["version"]
        for number_of_round, order in in_turns((ours, peer), options.rounds):
            for case in cases if number_of_round % 2 else cases[::-1]:
                for server in order:
                    model = case.model_on(server)
                    before = Copies(server, model) if server is ours else None
                    measurement = measure(
                        server,
                        requests[model],
                        model=model,
                        client="load",
                        connections=case.connections,
                        duration_s=options.duration,
                        warmup_s=options.warmup,
                    )
                    if before is not None:
                        copies[case].append(Copies(server, model).per_inference_since(before))
                    rounds[case][server.name].append(measurement)
                    print(
                        f"round {number_of_round}, {case.title}, {server.name}: p50 "
                        f"{number(measurement.load.p50_us)} us, {number(measurement.cpu_us)} us of server CPU",
                        flush=True,
                    )
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(report(rounds, copies, peer_version))
    figures = {
        "triton_version": peer_version,
        "by_case": {
            case.title: {name: [measurement.as_json() for measurement in seen] for name, seen in servers.items()}
            | {"copied_bytes_per_inference": copies[case]}
            for case, servers in rounds.items()
        },
    }
    print(f"\nsaved: {save_results('python_backend', machine, figures, options.output)}")


class Copies:
    """What forebay says it has copied for a model so far, and for how many inferences."""

    def __init__(self, server: Server, model: str) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as reply:
            page: str = reply.read().decode()
        pattern = rf'^forebay_copied_bytes_total\{{model="{model}",stage="(\w+)",version="\d+"\}} (\d+)$'
        self._bytes = {stage: int(count) for stage, count in re.findall(pattern, page, re.MULTILINE)}
        self._inferences, _ = execution_counts(server.http_port, model)

    def per_inference_since(self, before: Copies) -> dict[str, float]:
        """Return the bytes of each stage per inference.

        Raises:
            KeyError: the server does not count that stage.
        """
        inferences = self._inferences - before._inferences
        return {stage: (self._bytes[stage] - before._bytes[stage]) / inferences for stage in STAGES}


def report(rounds: dict[Case, Rounds], copies: dict[Case, list[dict[str, float]]], peer_version: str) -> str:
    """Return the tables: medians, ratios to Triton, copies, and what calls cost beside an ensemble."""
    medians = {f"{case.title}, {name}": seen for case, servers in rounds.items() for name, seen in servers.items()}
    ratios = [
        [case.title, *(number(median_ratio(servers["forebay"], servers["triton"], column)) for column in RATIO_COLUMNS)]
        for case, servers in rounds.items()
    ]
    copied = [
        [case.title, *(number(statistics.median(measured[stage] for measured in seen)) for stage in STAGES)]
        for case, seen in copies.items()
    ]
    calls, steps = rounds[Case("three_calls", 1)], rounds[Case("three_steps", 1)]
    nested = [[name, number(median_ratio(calls[name], steps[name], "p50_us"))] for name in calls]
    return "\n".join(
        (
            f"Medians; Triton {peer_version} and its Python backend.\n",
            median_table(MEDIAN_COLUMNS, "model, connections, server", medians),
            "\nforebay / Triton, medians of paired ratios\n",
            markdown_table(["model, connections", *RATIO_COLUMNS.values()], ratios),
            "\nforebay: tensor bytes copied in user space per inference\n",
            markdown_table(["model, connections", *STAGES], copied),
            "\np50 of three calls / p50 of an ensemble of the same three steps, medians of paired ratios\n",
            markdown_table(["server", "ratio"], nested),
        )
    )


@contextmanager
def python_repository() -> Iterator[Path]:
    """Write the repository that both servers read; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        root = Path(folder)
        for name, (source, given, made) in PYTHON_MODELS.items():
            (root / name / "1").mkdir(parents=True)
            shutil.copy(MODEL_FOLDER / source, root / name / "1" / "model.py")
            (root / name / "config.pbtxt").write_text(_PYTHON + _TENSORS.format(given=given, made=made))
        (root / "three_steps" / "1").mkdir(parents=True)
        places = ("IN", "first", "second", "OUT")
        steps = "".join(_STEP.format(given=given, made=made) for given, made in itertools.pairwise(places))
        (root / "three_steps" / "config.pbtxt").write_text(
            f'platform: "ensemble"\n{_TENSORS.format(given=ROW_LENGTH, made=ROW_LENGTH)}'
            f"ensemble_scheduling {{\n{steps}}}\n"
        )
        yield root


class _Options(RoundOptions):
    """The command line."""

    connections: list[int]
    peer: Path


def _parse_options() -> _Options:
    parser = round_parser("python_backend", __doc__, duration_s=3)
    parser.add_argument("--connections", type=numbers, default=[1, 32])
    parser.add_argument("--peer", type=Path, default=PEER_FOLDER, help="where bench/peer_triton.sh installed Triton")
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
