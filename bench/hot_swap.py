"""Does an update of a model under load fail a request, mix two versions, or make anybody wait?

    python -m bench.hot_swap [--seconds 60] [--every 2] [--rounds 1] [--load 0.5]

``alpha_model`` is served with two instances. First its saturation is measured with a closed loop. Then, in turns, an
open-loop client (Poisson arrivals, latency from the time a request was due) sends half of that rate, once while nothing
happens and once while the model is updated every two seconds: a new version directory with the other of the example's
two model files appears, the old one goes, ``load`` is called. Beside it a checker sends a known request all the time
and compares each answer with what ONNX Runtime gives in process for the version that the answer names.

Targets: no failed request; every answer from exactly one version; p99 with updates at most 1.2 times p99 without.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bench.kserve import FloatArray, infer_request
from bench.load.client import LoadResult, run_load
from bench.machine import describe_machine, machine_line, save_results
from bench.servers import EXAMPLE_REPOSITORY, forebay
from bench.tables import markdown_table, number

MODEL = "alpha_model"
FEATURES: FloatArray = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
CONNECTIONS = 32
#: Version numbers of equal length, so that all answers have one length.
FIRST_VERSION = 1000


@dataclass
class Deployment:
    """A repository whose one model is replaced by its successor again and again."""

    folder: Path
    version: int = FIRST_VERSION
    updates: int = 0
    load_s: list[float] = field(default_factory=list)

    def write(self, version: int) -> None:
        """Put a version there, complete from its first moment on."""
        source = EXAMPLE_REPOSITORY / MODEL / str(1 + version % 2) / "model.onnx"
        staged = self.folder / f"staged-{version}"
        staged.mkdir()
        shutil.copy(source, staged / "model.onnx")
        staged.rename(self.folder / "models" / MODEL / str(version))

    def update(self, port: int) -> None:
        """Deploy the next version, drop the last one, and have the server load it."""
        old, self.version = self.version, self.version + 1
        self.write(self.version)
        shutil.rmtree(self.folder / "models" / MODEL / str(old))
        began_s = time.monotonic()
        status, body = post(port, f"/v2/repository/models/{MODEL}/load", b"")
        if status != 200:
            raise RuntimeError(f"load answered {status}: {body[:200]!r}")
        self.load_s.append(time.monotonic() - began_s)
        self.updates += 1


class Checker(threading.Thread):
    """Sends a known request all the time; counts answers that no single version would give."""

    def __init__(self, port: int, expected: dict[int, float]) -> None:
        """``expected``: the prediction of even and of odd versions."""
        super().__init__(name="checker", daemon=True)
        self.checked = 0
        self.versions: set[int] = set()
        self.wrong: list[str] = []
        self._port = port
        self._expected = expected
        self._stopping = threading.Event()

    def run(self) -> None:
        document = {
            "inputs": [
                {"name": "features", "datatype": "FP32", "shape": [1, 50], "data": FEATURES.reshape(-1).tolist()}
            ]
        }
        body = json.dumps(document).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        while not self._stopping.wait(0.005):
            connection.request("POST", f"/v2/models/{MODEL}/infer", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                self.wrong.append(f"{response.status}: {answer[:200]!r}")
                continue
            parsed = json.loads(answer)
            version, prediction = int(parsed["model_version"]), float(parsed["outputs"][0]["data"][0])
            self.versions.add(version)
            self.checked += 1
            if not np.isclose(prediction, self._expected[version % 2], rtol=1e-4):
                self.wrong.append(f"version {version} answered {prediction}")
        connection.close()

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.hot_swap", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two updates")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.5, help="share of saturation that the open loop sends")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    request = infer_request(MODEL, {"features": FEATURES}, ["prediction"])
    expected = {parity: predict(parity) for parity in (0, 1)}
    rounds: list[dict[str, Any]] = []
    with (
        deployment() as deployed,
        forebay(deployed.folder / "models", "--model-control-mode=explicit", "--load-model=*") as server,
    ):
        port = server.http_port
        saturation = run_load(port, request, connections=CONNECTIONS, duration_s=min(options.seconds, 5.0))
        rate = saturation.rate_per_s * options.load
        print(f"saturation {number(saturation.rate_per_s)}/s; sending {number(rate)}/s", flush=True)
        for round_number in range(options.rounds):
            seen: dict[str, Any] = {}
            for is_updating in (False, True) if round_number % 2 == 0 else (True, False):
                seen["updates" if is_updating else "quiet"] = measure(
                    deployed, port, request, expected, rate, options.seconds, options.every if is_updating else None
                )
            rounds.append(seen)
            report_round(seen)
    ratio = statistics.median(seen["updates"]["p99_us"] / seen["quiet"]["p99_us"] for seen in rounds)
    failed = sum(seen[kind]["failed_count"] for seen in rounds for kind in seen)
    mixed = sum(len(seen[kind]["wrong"]) for seen in rounds for kind in seen)
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    lines = [
        ("updates", str(deployed.updates), ""),
        ("failed requests", str(failed), "0"),
        ("answers that no single version gives", str(mixed), "0"),
        ("p99 with updates / without", number(ratio), "<= 1.2"),
        ("longest answer with updates", f"{number(max(s['updates']['max_us'] for s in rounds))} us", ""),
        ("load call, median", f"{number(1e3 * statistics.median(deployed.load_s))} ms", ""),
    ]
    print(markdown_table(["forebay", "measured", "target"], lines))
    figures = {"saturation": saturation.as_json(), "rounds": rounds, "load_s": deployed.load_s}
    print(f"\nsaved: {save_results('hot-swap', machine, figures, options.output)}")


def measure(
    deployed: Deployment,
    port: int,
    request: bytes,
    expected: dict[int, float],
    rate_per_s: float,
    duration_s: float,
    every_s: float | None,
) -> dict[str, Any]:
    """Send an open loop for a while, with updates or without, and say what was seen."""
    done = threading.Event()
    failures: list[str] = []

    def update() -> None:
        while every_s is not None and not done.wait(every_s):
            try:
                deployed.update(port)
            except (OSError, RuntimeError) as error:
                failures.append(str(error))
                return

    checker = Checker(port, expected)
    updater = threading.Thread(target=update, name="updater")
    checker.start()
    updater.start()
    try:
        result = run_load(port, request, connections=CONNECTIONS, duration_s=duration_s, rate_per_s=rate_per_s)
    finally:
        done.set()
        updater.join()
        checker.stop()
    return {
        **{name: getattr(result, name) for name in ("p50_us", "p99_us", "p99_9_us", "max_us", "rate_per_s")},
        "failed_count": failed_count(result) + len(failures),
        "first_error": result.first_error or next(iter(failures), ""),
        "checked": checker.checked,
        "versions": len(checker.versions),
        "wrong": checker.wrong,
    }


def failed_count(result: LoadResult) -> int:
    """Return how many requests were not answered right; those that were late count with their latency instead."""
    return result.error_count - result.unsent_count


def report_round(seen: dict[str, Any]) -> None:
    for kind, figures in seen.items():
        print(
            f"{kind}: p50 {number(figures['p50_us'])}, p99 {number(figures['p99_us'])}, p99.9 "
            f"{number(figures['p99_9_us'])}, max {number(figures['max_us'])} us; failed {figures['failed_count']} "
            f"{figures['first_error']}; {figures['checked']} answers checked, of {figures['versions']} versions, "
            f"{len(figures['wrong'])} wrong",
            flush=True,
        )


@contextmanager
def deployment() -> Generator[Deployment, None, None]:
    """Make a repository with the first version."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        deployed = Deployment(Path(folder))
        model = deployed.folder / "models" / MODEL
        model.mkdir(parents=True)
        config = (EXAMPLE_REPOSITORY / MODEL / "config.pbtxt").read_text()
        config = config.replace("all { }", "latest { num_versions: 1 }")
        config = config.replace("max_queue_delay_microseconds: 5000", "max_queue_delay_microseconds: 0")
        (model / "config.pbtxt").write_text(config)
        deployed.write(deployed.version)
        yield deployed


def predict(parity: int) -> float:
    """Return what versions of a parity answer to the known request, from ONNX Runtime in this process."""
    session = ort.InferenceSession(str(EXAMPLE_REPOSITORY / MODEL / str(1 + parity) / "model.onnx"))
    (prediction,) = session.run(["prediction"], {"features": FEATURES})
    return float(np.asarray(prediction).reshape(-1)[0])


def post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


if __name__ == "__main__":
    main()
