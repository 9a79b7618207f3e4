"""What does serving from a GPU cost beside running the model in process, by every way to hand tensors over?

    python -m bench.gpu [--device cuda|cpu] [--batches 1,8,32,64] [--count 400] [--connections 8] [--duration 4]
                        [--layouts] [--profile] [--save]

Two models, ``alpha_model``'s network (50 to 1) and one of ResNet-50's size made here, each at every batch size:

- *in process, host* and *in process, device*: ONNX Runtime alone, tensors in host memory or bound in GPU memory: what
  there is to compute, and the upper bound of what can be served;
- *HTTP*, *system shm*, *CUDA shm*: the same HTTP request with the tensors in its body, in ``/dev/shm``, or in GPU
  memory that this process has registered by its CUDA IPC handle;
- *native client*: ``forebay.client.shm``;
- *plain server*: ONNX Runtime behind aiohttp, ``bench/peer_onnx_server.py``.

Latency is of one request after the other; throughput is of ``--connections`` at a time for ``--duration`` seconds
(in process: of one thread). *Overhead* is the difference of the medians to *in process*: of CUDA shm to *device*, of
the others to *host*. Aims: CUDA-shm overhead at most 80 us; throughput at batch 32 at least 95 % of in process; exactly
one copy from host to device for each segment of a batch and input (counted by the server).

``--layouts`` compares two instances of the large model in two processes, in two with MPS, and in two threads of one.
``--profile`` runs the server under ``nsys`` and counts calls that wait for a whole context; there must be none.
``--device cpu`` lets the host play the GPU, to try this file; its figures mean nothing and are not saved.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import tritonclient.utils.shared_memory as system_shm

from bench.gpu_models import RESNET50, SMALL, write_image_model
from bench.kserve import infer_request
from bench.load.client import run_load
from bench.machine import describe_machine, machine_line, save_results
from bench.servers import EXAMPLE_REPOSITORY, Server, forebay, free_ports
from bench.tables import markdown_table, number
from forebay.client import shm
from forebay.engine.devices.base import Device
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE, open_device
from forebay.ipc.errors import Unsupported

Array = npt.NDArray[np.float32]
Latencies = npt.NDArray[np.int64]

#: Runs so many requests and returns how long each took, ns.
Turn = Callable[[int], Latencies]

#: Aims of the issue.
OVERHEAD_US_MAX, SATURATION_MIN = 80.0, 0.95

CONFIG = """
backend: "onnxruntime"
max_batch_size: 64
input {{ name: "{input}" data_type: TYPE_FP32 dims: [ {dims} ] }}
output {{ name: "{output}" data_type: TYPE_FP32 dims: [ {classes} ] }}
instance_group {{ kind: KIND_GPU count: {count} gpus: [ 0 ] }}
dynamic_batching {{ }}
"""


class Model(NamedTuple):
    """One model that is measured."""

    name: str
    file: Path
    input: str
    output: str
    dims: tuple[int, ...]
    classes: int

    def rows(self, batch: int) -> Array:
        return np.random.default_rng(batch).standard_normal((batch, *self.dims), np.float32)


class Way(NamedTuple):
    """One way to have a model run."""

    turn: Turn
    load: Callable[[], float] | None
    """Returns inferences per second of many at a time; None: as one after the other."""


class Bench:
    """One run: a device, a server, and this process as its client."""

    def __init__(self, options: argparse.Namespace, device: Device, folder: Path) -> None:
        self.options = options
        self.device = device
        self.stream = device.make_stream()
        self.folder = folder
        self.is_real = options.device == "cuda"
        self.models = write_models(folder, is_real=self.is_real)
        self.provider = "CUDAExecutionProvider" if self.is_real else "CPUExecutionProvider"

    # --- in process ---

    def in_process(self, model: Model, batch: int, *, on_device: bool) -> Way:
        """Run the model here; on the device its input and output are bound once."""
        session = ort.InferenceSession(model.file, providers=[self.provider])
        rows = model.rows(batch)
        if not on_device:
            return Way(timed(lambda: session.run([model.output], {model.input: rows})), None)
        binding = session.io_binding()
        binding.bind_ortvalue_input(model.input, ort.OrtValue.ortvalue_from_numpy(rows, "cuda", 0))
        binding.bind_output(model.output, "cuda", 0)
        return Way(timed(lambda: session.run_with_iobinding(binding)), None)

    # --- by HTTP ---

    def by_http(self, server: Server, model: Model, batch: int) -> Way:
        request = infer_request(model.name, {model.input: model.rows(batch)}, [model.output], server.http_port)
        return self._requests(server.http_port, request, batch)

    @contextlib.contextmanager
    def by_system_shm(self, server: Server, model: Model, batch: int) -> Iterator[Way]:
        rows = model.rows(batch)
        out_bytes = 4 * batch * model.classes
        key = f"/forebay-bench-{os.getpid()}"
        region = system_shm.create_shared_memory_region("bench", key, rows.nbytes + out_bytes)
        try:
            system_shm.set_shared_memory_region(region, [rows])
            body = {"key": key, "offset": 0, "byte_size": rows.nbytes + out_bytes}
            post(server.http_port, "/v2/systemsharedmemory/region/bench/register", body)
            request = region_request(server.http_port, model, batch, rows.nbytes, out_bytes)
            yield self._requests(server.http_port, request, batch)
            post(server.http_port, "/v2/systemsharedmemory/region/bench/unregister", {})
        finally:
            system_shm.destroy_shared_memory_region(region)

    @contextlib.contextmanager
    def by_cuda_shm(self, server: Server, model: Model, batch: int) -> Iterator[Way]:
        rows = model.rows(batch)
        out_bytes = 4 * batch * model.classes
        with self.device.allocate(rows.nbytes + out_bytes) as memory:
            self.stream.copy_in(memory.address, rows.ctypes.data, rows.nbytes)
            self.stream.synchronize()
            handle = base64.b64encode(self.device.export_memory(memory)).decode()
            body = {"raw_handle": {"b64": handle}, "device_id": 0, "byte_size": rows.nbytes + out_bytes}
            post(server.http_port, "/v2/cudasharedmemory/region/bench/register", body)
            request = region_request(server.http_port, model, batch, rows.nbytes, out_bytes)
            yield self._requests(server.http_port, request, batch)
            # Before the memory goes: nobody has it open any more when this is answered.
            post(server.http_port, "/v2/cudasharedmemory/region/bench/unregister", {})

    def by_native_client(self, engine: shm.Engine, model: Model, batch: int) -> Way:
        handle = engine.model(model.name)
        handle.input(model.input, rows=batch)[:] = model.rows(batch)
        return Way(timed(handle.infer), None)

    def by_plain_server(self, server: Server, model: Model, batch: int) -> Way:
        body = model.rows(batch).tobytes()
        head = f"POST /{model.name} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        return self._requests(server.http_port, head.encode() + body, batch)

    def _requests(self, port: int, request: bytes, batch: int) -> Way:
        options = self.options

        def load() -> float:
            found = run_load(port, request, connections=options.connections, duration_s=options.duration)
            return found.rate_per_s * batch

        return Way(one_connection(port, request), load)

    # --- all of it ---

    def measure(self, server: Server, plain: Server, engine: shm.Engine) -> list[dict[str, Any]]:
        """Return one entry for each model, batch and way."""
        figures: list[dict[str, Any]] = []
        for model in self.models:
            for batch in self.options.batches:
                with contextlib.ExitStack() as stack:
                    ways = {"in process, host": self.in_process(model, batch, on_device=False)}
                    if self.is_real:
                        ways["in process, device"] = self.in_process(model, batch, on_device=True)
                    ways["HTTP"] = self.by_http(server, model, batch)
                    ways["native client"] = self.by_native_client(engine, model, batch)
                    ways["plain server"] = self.by_plain_server(plain, model, batch)
                    ways["system shm"] = stack.enter_context(self.by_system_shm(server, model, batch))
                    found = [self._figures(model, batch, name, way) for name, way in ways.items()]
                with self.by_cuda_shm(server, model, batch) as way:
                    found.append(self._figures(model, batch, "CUDA shm", way))
                figures += with_overheads(found)
                print_batch(model, batch, found)
        return figures

    def _figures(self, model: Model, batch: int, name: str, way: Way) -> dict[str, Any]:
        way.turn(max(self.options.count // 10, 3))
        took = way.turn(self.options.count) / 1e3
        rate = way.load() if way.load is not None else batch / float(np.mean(took)) * 1e6
        return {
            "model": model.name,
            "batch": batch,
            "way": name,
            "p50_us": float(np.percentile(took, 50)),
            "p99_us": float(np.percentile(took, 99)),
            "inferences_per_s": rate,
        }

    def start_server(self, *flags: str, prefix: tuple[str, ...] = ()) -> Server:
        """Return a server of the models, not yet started."""
        all_flags = ("--allow-client-shm=true", f"--runtime-directory={self.folder}", *flags)
        server = forebay(self.folder / "models", *all_flags)
        server.prefix_command(prefix)
        return server

    def start_plain_server(self) -> Server:
        [port] = free_ports(1)
        models = [argument for model in self.models for argument in ("--model", f"{model.name}={model.file}")]
        command = [sys.executable, "-m", "bench.peer_onnx_server", f"--port={port}", *models]
        return Server("plain server", [*command, f"--provider={self.provider}"], port)

    def compare_layouts(self) -> list[dict[str, Any]]:
        """Measure two instances of the large model: two processes, two with MPS, two threads of one process."""
        model = self.models[-1]
        layouts = {
            "two processes": ("--mps=off",),
            "two processes, MPS": ("--mps=on",),
            "two threads": ("--mps=off", "--instances-per-process=2"),
        }
        if shutil.which("nvidia-cuda-mps-control") is None:
            print("nvidia-cuda-mps-control is not installed: MPS is left out")
            del layouts["two processes, MPS"]
        figures: list[dict[str, Any]] = []
        write_config(self.folder / "models", model, count=2)
        for layout, flags in layouts.items():
            with self.start_server(*flags) as server:
                for batch in self.options.batches:
                    way = self.by_http(server, model, batch)
                    assert way.load is not None
                    rate = way.load()
                    figures.append({"layout": layout, "batch": batch, "inferences_per_s": rate})
        write_config(self.folder / "models", model, count=1)
        rows = [(each["layout"], str(each["batch"]), number(each["inferences_per_s"])) for each in figures]
        print(f"\n{model.name}, two instances by HTTP\n")
        print(markdown_table(("layout", "batch", "inferences/s"), rows))
        return figures

    def count_context_waits(self) -> dict[str, int]:
        """Serve under nsys, and return how often which call that waits for a whole context was made after the start."""
        if shutil.which("nsys") is None:
            print("nsys is not installed: no profile")
            return {}
        report = self.folder / "profile"
        prefix = ("nsys", "profile", "--trace=cuda", "--delay=30", f"--output={report}", "--force-overwrite=true")
        with self.start_server(prefix=prefix) as server:
            time.sleep(max(0.0, 35 - server.ready_s))
            for model in self.models:
                self.by_http(server, model, 1).turn(self.options.count)
        command = ["nsys", "stats", "--report=cuda_api_sum", "--format=csv", f"{report}.nsys-rep"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        waits = dict.fromkeys(("cudaDeviceSynchronize", "cuCtxSynchronize"), 0)
        for line in found.splitlines():
            cells = line.split(",")
            for name in waits:
                if cells[-1].startswith(name):
                    waits[name] += int(cells[2])
        print(f"\nCalls that wait for a whole context, while requests ran: {waits}; there must be none")
        return waits


def with_overheads(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each entry what it takes longer than in process."""
    by_way = {each["way"]: each for each in found}
    host = by_way["in process, host"]
    device = by_way.get("in process, device", host)
    for each in found:
        base = device if each["way"] == "CUDA shm" else host
        each["overhead_us"] = each["p50_us"] - base["p50_us"]
        each["of_in_process"] = each["inferences_per_s"] / base["inferences_per_s"]
    return found


def print_batch(model: Model, batch: int, found: list[dict[str, Any]]) -> None:
    print(f"\n{model.name}, batch {batch}\n")
    rows = [
        (
            each["way"],
            *(number(each[name]) for name in ("p50_us", "p99_us", "overhead_us", "inferences_per_s")),
            f"{each['of_in_process']:.0%}",
        )
        for each in found
    ]
    print(markdown_table(("way", "p50 us", "p99 us", "overhead us", "inferences/s", "of in process"), rows))


def copies_per_segment(server: Server) -> dict[str, float]:
    """Return, for each model, copies from host to device for each segment of a batch; each has one input."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as reply:
        return read_copies(reply.read().decode())


def read_copies(page: str) -> dict[str, float]:
    """Return the same from a metrics page."""
    found: dict[str, dict[str, int]] = {}
    pattern = r'^forebay_(device_copies|batch_segments)_total\{[^}]*model="([^"]+)"[^}]*\} (\d+)$'
    for name, model, value in re.findall(pattern, page, re.M):
        found.setdefault(model, {})[name] = int(value)
    return {
        model: values["device_copies"] / values["batch_segments"]
        for model, values in found.items()
        if values.get("device_copies") and values.get("batch_segments")
    }


# --- models ---


def write_models(folder: Path, *, is_real: bool) -> list[Model]:
    """Make a repository of both models below ``folder``; on a CPU the large one is small."""
    pixels = 224 if is_real else 32
    alpha = folder / "models" / "alpha" / "1" / "model.onnx"
    alpha.parent.mkdir(parents=True)
    shutil.copyfile(EXAMPLE_REPOSITORY / "alpha_model" / "2" / "model.onnx", alpha)
    image = folder / "models" / "image" / "1" / "model.onnx"
    parameters = write_image_model(image, RESNET50 if is_real else SMALL, pixels)
    print(f"image: {parameters / 1e6:.1f} million parameters, {pixels} x {pixels} pixels")
    models = [
        Model("alpha", alpha, "features", "prediction", (50,), 1),
        Model("image", image, "image", "scores", (3, pixels, pixels), 1000),
    ]
    for model in models:
        write_config(folder / "models", model, count=1)
    return models


def write_config(repository: Path, model: Model, *, count: int) -> None:
    dims = ", ".join(map(str, model.dims))
    text = CONFIG.format(input=model.input, output=model.output, dims=dims, classes=model.classes, count=count)
    (repository / model.name / "config.pbtxt").write_text(text)


# --- requests ---


def timed(call: Callable[[], object]) -> Turn:
    """Return a turn of calls in this thread."""

    def turn(count: int) -> Latencies:
        took = np.empty(count, np.int64)
        for index in range(count):
            began_ns = time.perf_counter_ns()
            call()
            took[index] = time.perf_counter_ns() - began_ns
        return took

    return turn


def one_connection(port: int, request: bytes) -> Turn:
    """Return a turn of requests, one after the other over one connection."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    method, path, _version = first.split()
    headers = dict(line.split(": ", 1) for line in rest)

    def turn(count: int) -> Latencies:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

        def once() -> None:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise RuntimeError(f"{path} answered {response.status}: {answer[:200]!r}")

        try:
            return timed(once)(count)
        finally:
            connection.close()

    return turn


def region_request(port: int, model: Model, batch: int, in_bytes: int, out_bytes: int) -> bytes:
    """Return a request whose tensors lie in the region ``bench``, one behind the other."""

    def place(offset: int, size: int) -> dict[str, object]:
        return {"shared_memory_region": "bench", "shared_memory_offset": offset, "shared_memory_byte_size": size}

    shape = [batch, *model.dims]
    document = {
        "inputs": [{"name": model.input, "shape": shape, "datatype": "FP32", "parameters": place(0, in_bytes)}],
        "outputs": [{"name": model.output, "parameters": place(in_bytes, out_bytes)}],
    }
    body = json.dumps(document).encode()
    head = (
        f"POST /v2/models/{model.name}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def post(port: int, path: str, document: dict[str, object]) -> None:
    data = json.dumps(document).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, method="POST")
    with urllib.request.urlopen(request, timeout=60):
        pass


def open_gpu(kind: str) -> Device:
    """Return the device to measure; end with a sentence if there is none."""
    if kind == "cpu":
        os.environ[PLAYED_GPUS_VARIABLE] = "1"
        return open_device("host")
    try:
        device = open_device("cuda")
    except Unsupported as error:
        sys.exit(f"bench.gpu measures an NVIDIA GPU, and there is none: {error.text}\n(--device cpu tries this file.)")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        sys.exit("bench.gpu needs ONNX Runtime's GPU build: make gpu")
    ort.preload_dlls()
    return device


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description="Serve from a GPU, beside running in process.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", default="1,8,32,64", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--count", type=int, default=400, help="requests one after the other")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--duration", type=float, default=4.0, help="seconds of many requests at a time")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--save", type=Path, default=None, help="another file for the results")
    options = parser.parse_args()
    device = open_gpu(options.device)
    machine = describe_machine() | {"gpu": device.name}
    print(f"{machine_line(machine)}; GPU: {device.name}\n{machine['command']}")
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as name:
        bench = Bench(options, device, Path(name))
        with bench.start_server() as server, bench.start_plain_server() as plain, shm.connect(name) as engine:
            figures: dict[str, Any] = {"ways": bench.measure(server, plain, engine)}
            figures["copies_per_segment"] = copies_per_segment(server)
        if options.layouts:
            figures["layouts"] = bench.compare_layouts()
        if options.profile:
            figures["context_waits"] = bench.count_context_waits()
    print_aims(figures)
    if options.device == "cuda" or options.save is not None:
        print(f"saved: {save_results('gpu', machine, figures, options.save)}")


def print_aims(figures: dict[str, Any]) -> None:
    """Say how what was measured compares with what was to be reached."""
    by_cuda = [each for each in figures["ways"] if each["way"] == "CUDA shm"]
    rows = [
        (
            f"{each['model']}, batch {each['batch']}",
            f"{each['overhead_us']:.0f} us of {OVERHEAD_US_MAX:.0f}",
            f"{each['of_in_process']:.0%} of {SATURATION_MIN:.0%}" if each["batch"] >= 32 else "-",
        )
        for each in by_cuda
    ]
    print("\nAims\n")
    print(markdown_table(("CUDA shm", "overhead", "throughput"), rows))
    print(f"\ncopies from host to device per segment: {figures['copies_per_segment']}; to be at most 1")


if __name__ == "__main__":
    main()
