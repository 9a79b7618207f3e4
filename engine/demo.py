"""``make demo``: serve the example repository on free ports, ask it, check every answer, say how long it took.

The client part is the program from the README, word for word but for the port; the answers are compared with the same
ONNX file run in this process. At the end one model of each backend is loaded anew: what it takes to start an instance
on a server that runs, whose zygotes have imported the backends' libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from forebay.engine.command_line import Command

#: How many requests are timed.
_REQUESTS = 500
#: Seconds that the server may take to become ready; torch alone may take several.
_READY_SECS = 60.0
_TOLERANCE = 1e-5

#: Models that are loaded anew, by backend.
_LOADED_ANEW = {"onnxruntime": "file_type_scores", "python": "file_type_features", "pytorch": "risk_model"}
#: How often.
_LOADS = 5
#: What a start may take, ms.
_START_MS_MAX = 150


def example_repository() -> Path:
    """Return the example repository: of the checkout, or as installed."""
    from importlib.resources import files

    return Path(str(files("forebay.conf"))) / "models"


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> float:
    """Wait until the server is ready; return the seconds it took.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    begin = time.monotonic()
    while time.monotonic() - begin < _READY_SECS:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/v2/health/live", timeout=2):
                return time.monotonic() - begin
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise RuntimeError(f"the server was not ready after {_READY_SECS:.0f} s")


def ask(url: str) -> tuple[Any, Any]:
    """Send the README's request; return the features and the prediction."""
    httpclient: Any = importlib.import_module("tritonclient.http")
    client = httpclient.InferenceServerClient(url=url)
    features = np.random.randn(1, 50).astype(np.float32)
    inputs = [httpclient.InferInput("features", features.shape, "FP32")]
    inputs[0].set_data_from_numpy(features)
    outputs = [httpclient.InferRequestedOutput("prediction")]
    result = client.infer("alpha_model", inputs, outputs=outputs)
    prediction = result.as_numpy("prediction")
    client.close()
    return features, prediction


def measure(url: str, version: str, session: Any) -> tuple[list[float], float]:
    """Send requests one at a time; return their latencies in µs and the largest deviation from in-process answers."""
    httpclient: Any = importlib.import_module("tritonclient.http")
    client = httpclient.InferenceServerClient(url=url)
    outputs = [httpclient.InferRequestedOutput("prediction")]
    latencies: list[float] = []
    deviation = 0.0
    rng = np.random.default_rng(7)
    for number in range(_REQUESTS):
        features = rng.standard_normal((1 + number % 4, 50), dtype=np.float32)
        inputs = [httpclient.InferInput("features", list(features.shape), "FP32")]
        inputs[0].set_data_from_numpy(features)
        begin = time.perf_counter()
        result = client.infer("alpha_model", inputs, model_version=version, outputs=outputs)
        latencies.append((time.perf_counter() - begin) * 1e6)
        (expected,) = session.run(["prediction"], {"features": features})
        deviation = max(deviation, float(np.max(np.abs(result.as_numpy("prediction") - expected))))
    client.close()
    return latencies, deviation


def start_times(url: str, metrics_url: str, model: str) -> tuple[list[float], list[float]]:
    """Unload and load a model some times.

    Returns:
        What the server took to start an instance, from the fork to the warmed-up model, and what the client waited for
        the answer to each load; ms.
    """
    httpclient: Any = importlib.import_module("tritonclient.http")
    client = httpclient.InferenceServerClient(url=url)
    starts: list[float] = []
    waits: list[float] = []
    for _ in range(_LOADS):
        client.unload_model(model)
        begin = time.perf_counter()
        client.load_model(model)
        waits.append((time.perf_counter() - begin) * 1e3)
        with urllib.request.urlopen(metrics_url, timeout=10) as reply:
            page: str = reply.read().decode()
        took = re.findall(rf'^nv_model_load_duration_secs\{{model="{model}",.*\}} (\S+)$', page, re.MULTILINE)
        starts.append(max(float(seconds) for seconds in took) * 1e3)
    client.close()
    return starts, waits


def show_start_times(url: str, metrics_url: str) -> None:
    """Print what starts of instances take, of each backend that is installed."""
    httpclient: Any = importlib.import_module("tritonclient.http")
    client = httpclient.InferenceServerClient(url=url)
    serving = {backend: model for backend, model in _LOADED_ANEW.items() if client.is_model_ready(model)}
    client.close()
    measured = {backend: start_times(url, metrics_url, model) for backend, model in serving.items()}
    print(f"\ninstance start on the running server, model files in the page cache (aim: {_START_MS_MAX} ms)")
    for backend, (starts, waits) in measured.items():
        print(
            f"  {backend} ({serving[backend]}): median {statistics.median(starts):.0f} ms, slowest "
            f"{max(starts):.0f} ms of {_LOADS}; the request to load it took {statistics.median(waits):.0f} ms"
        )
    print(flush=True)


def main(arguments: Sequence[str] = ()) -> int:
    """Run the demonstration; return 0 if every answer was right."""
    import onnxruntime

    if importlib.util.find_spec("tritonclient") is None:
        print("the demo asks as a client does; install it with: pip install 'forebay[demo]'", file=sys.stderr)
        return 1
    repository = example_repository()
    http_port, metrics_port = free_ports(2)
    url = f"localhost:{http_port}"
    command = [sys.executable, "-P", "-m", "forebay.engine.main", "serve", f"--model-repository={repository}"]
    command += [f"--http-port={http_port}", f"--metrics-port={metrics_port}", "--allow-grpc=false"]
    command += ["--model-control-mode=explicit", "--load-model=*"]
    server = subprocess.Popen([*command, *arguments], env=os.environ)
    failed = True
    try:
        seconds = wait_ready(f"http://{url}", server)
        print(
            f"\nready {seconds:.2f} s after the start of the process, imports of all libraries included\n", flush=True
        )
        features, prediction = ask(url)
        for version in ("1", "2"):
            session = onnxruntime.InferenceSession(str(repository / "alpha_model" / version / "model.onnx"))
            if version == "2":
                (expected,) = session.run(["prediction"], {"features": features})
                print(f"prediction {float(prediction[0, 0]):.6f}, in process {float(expected[0, 0]):.6f}")
            latencies, deviation = measure(url, version, session)
            p50, p99 = np.percentile(latencies, [50, 99])
            verdict = "equal" if deviation <= _TOLERANCE else "WRONG"
            print(
                f"alpha_model version {version}: {_REQUESTS} answers {verdict} to in-process ones "
                f"(largest difference {deviation:.1e}); p50 {p50:,.0f} µs, p99 {p99:,.0f} µs "
                "with tritonclient, one at a time, the model's 5 ms queue delay included",
                flush=True,
            )
            if deviation > _TOLERANCE:
                return 1
        if not any(argument.startswith("--model-control-mode") for argument in arguments):
            show_start_times(url, f"http://localhost:{metrics_port}/metrics")
        failed = False
    except RuntimeError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            exit_code = server.wait(timeout=40)
        except subprocess.TimeoutExpired:
            server.kill()
            exit_code = server.wait()
    if exit_code != 0:
        print(f"the server ended with exit code {exit_code}", file=sys.stderr)
        return 1
    return int(failed)


def run(command: Command) -> int:
    """``forebay demo``: further words are flags of ``serve``."""
    return main(command.arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
