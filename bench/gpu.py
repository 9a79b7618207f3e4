"""What does serving from a GPU cost beside running the model in process, by every way to hand tensors over?

    python -m bench.gpu [--device cuda|cpu] [--batches 1,8,32,64] [--parts ways,layouts,calls] [--duration 2]
                        [--connections 8] [--minutes 9] [--save FILE]

Two models, ``alpha_model``'s network (50 to 1) and one of ResNet-50's size made here, each at every batch size:

- *in process, host* and *in process, device*: ONNX Runtime alone, tensors in host memory or bound in GPU memory: what
  there is to compute, and the upper bound of what can be served;
- *HTTP*, *system shm*, *CUDA shm*: the same HTTP request with the tensors in its body, in ``/dev/shm``, or in GPU
  memory that this process has registered by its CUDA IPC handle;
- *native client*: ``forebay.client.shm``;
- *plain server*: ONNX Runtime behind aiohttp, ``bench/peer_onnx_server.py``.

Latency is of one request after the other; throughput is of ``--connections`` at a time (in process and of the native
client: of one thread). *Overhead* is the difference of the medians to *in process*: of CUDA shm to *device*, of the
others to *host*. Aims: CUDA-shm overhead at most 80 us; throughput at batch 32 at least 95 % of in process; exactly one
copy from host to device for each segment of a batch and input (counted by the server).

cuDNN chooses by its heuristics everywhere: to try all it has takes seconds for each new size of a batch. Part
``layouts`` compares two instances of the large model in two processes, in two with MPS, and in two threads of one. Part
``calls`` counts what the server's processes ask of CUDA while requests run (``bench/cuda_calls.py``); none may wait for
a whole context. What fails is named at the end, and the rest is measured all the same; figures are saved as they come,
and nothing new is begun after ``--minutes``. ``--device cpu`` lets the host play the GPU, to try this file;
its figures mean nothing and are not saved.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort

from bench import gpu_ways as ways
from bench.cuda_calls import CannotCount, counted, read_calls
from bench.gpu_models import RESNET50, SMALL, write_image_model
from bench.gpu_ways import Model, Way
from bench.machine import describe_machine, machine_line, save_results
from bench.peer_onnx_server import provider
from bench.servers import EXAMPLE_REPOSITORY, Server, forebay, free_ports
from bench.tables import markdown_table, number
from forebay.client import shm
from forebay.engine.devices.base import Device
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE, open_device
from forebay.ipc.errors import Unsupported

PARTS = ("ways", "layouts", "calls")

_HOST, _DEVICE = "in process, host", "in process, device"

#: Aims of the issue.
OVERHEAD_US_MAX, SATURATION_MIN = 80.0, 0.95

#: Bytes of shared memory of a frontend, all page-locked: for ``--connections`` of the largest request at a time.
ARENA_BYTES = 1 << 30

#: Requests whose calls of CUDA are counted.
_COUNTED_S = 1.0

#: Whose versions matter to what is measured, besides those that every benchmark names.
_PACKAGES = ("onnxruntime-gpu", "cupy-cuda13x", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-runtime")

CONFIG = """
backend: "onnxruntime"
max_batch_size: 64
input {{ name: "{input}" data_type: TYPE_FP32 dims: [ {dims} ] }}
output {{ name: "{output}" data_type: TYPE_FP32 dims: [ {classes} ] }}
instance_group {{ kind: KIND_GPU count: {count} gpus: [ 0 ] }}
dynamic_batching {{ }}
parameters {{ key: "cudnn_conv_algo_search" value {{ string_value: "1" }} }}
"""


class Bench:
    """One run: a device, servers, and this process as their client."""

    def __init__(self, options: argparse.Namespace, device: Device, folder: Path, machine: dict[str, Any]) -> None:
        self.options = options
        self.device = device
        self.stream = device.make_stream()
        self.folder = folder
        self.machine = machine
        self.is_real = options.device == "cuda"
        self.models = write_models(folder, is_real=self.is_real)
        self.provider = provider("CUDAExecutionProvider" if self.is_real else "CPUExecutionProvider")
        self.figures: dict[str, Any] = {"ways": [], "layouts": [], "calls": []}
        #: What could not be measured, and why.
        self.failures: list[str] = []
        self._end_s = time.monotonic() + 60 * options.minutes

    def attempt(self, what: str, action: Callable[[], None]) -> None:
        """Do something; note what fails, and go on."""
        try:
            if time.monotonic() > self._end_s:
                raise TimeoutError("no time was left")
            action()
        except Exception as error:  # whatever it is, the other figures are wanted
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
            print(f"FAILED {self.failures[-1]}", flush=True)

    def save(self) -> None:
        """Write what there is so far."""
        if self.is_real or self.options.save is not None:
            figures = {**self.figures, "failures": self.failures}
            path = save_results("gpu", self.machine, figures, self.options.save)
            print(f"saved: {path}", flush=True)

    # --- ways ---

    def measure_ways(self) -> None:
        """Measure each model, batch and way."""
        with self.start_server() as server, self.start_plain_server() as plain, shm.connect(str(self.folder)) as engine:
            for model in self.models:
                session = ort.InferenceSession(model.file, providers=[self.provider])
                for batch in self.options.batches:
                    self._measure_batch(server, plain, engine, session, model, batch)
                    self.save()
            if self.failures:
                print(f"\nthe end of the server's log:\n{server.log_tail()}")

    def _measure_batch(
        self,
        server: Server,
        plain: Server,
        engine: shm.Engine,
        session: ort.InferenceSession,
        model: Model,
        batch: int,
    ) -> None:
        connections, port = self.options.connections, server.http_port
        openers: dict[str, Callable[[], contextlib.AbstractContextManager[Way]]] = {
            _HOST: lambda: ways.in_process(session, model, batch, on_device=False),
            _DEVICE: lambda: ways.in_process(session, model, batch, on_device=True),
            "native client": lambda: ways.by_native_client(engine, model, batch),
            "HTTP": lambda: ways.by_http(port, model, batch, connections),
            "system shm": lambda: ways.by_system_shm(port, model, batch, connections),
            "CUDA shm": lambda: ways.by_cuda_shm(port, model, batch, connections, self.device, self.stream),
            "plain server": lambda: ways.by_plain_server(plain.http_port, model, batch, connections),
        }
        if not self.is_real:
            del openers[_DEVICE]
        found: list[dict[str, Any]] = []

        def measure(name: str) -> None:
            before = Copies(server, model)
            with openers[name]() as way:
                found.append({"model": model.name, "batch": batch, "way": name, **self._figures(way, batch)})
            # Of what the server did; nothing for ways that do not ask it.
            found[-1]["copies_per_segment"] = before.per_segment()

        for name in openers:
            self.attempt(f"{model.name}, batch {batch}, {name}", functools.partial(measure, name))
        self.figures["ways"] += with_overheads(found)
        print_batch(model, batch, found)

    def _figures(self, way: Way, batch: int) -> dict[str, Any]:
        alone = way.alone(self.options.duration)
        loaded = alone if way.load is None else way.load(self.options.duration)
        return {
            "p50_us": alone.p50_us,
            "p99_us": alone.p99_us,
            "count": alone.count,
            "inferences_per_s": loaded.calls_per_s * batch,
            "loaded_p50_us": loaded.p50_us,
            "loaded_p99_us": loaded.p99_us,
        }

    # --- servers ---

    def start_server(self, *flags: str, environment: dict[str, str] | None = None) -> Server:
        """Return a server of the models, not yet started."""
        memory = [f"--{name}-byte-size={ARENA_BYTES}" for name in ("arena", "pinned-memory-pool")]
        own = ["--allow-client-shm=true", f"--runtime-directory={self.folder}", *(memory if self.is_real else ())]
        server = forebay(self.folder / "models", *own, *flags)
        if environment:
            server.prefix_command(("env", *(f"{name}={value}" for name, value in environment.items())))
        return server

    def start_plain_server(self) -> Server:
        """Return the peer, not yet started."""
        [port] = free_ports(1)
        models = [argument for model in self.models for argument in ("--model", f"{model.name}={model.file}")]
        command = [sys.executable, "-m", "bench.peer_onnx_server", f"--port={port}", *models]
        return Server("plain server", [*command, f"--provider={self.provider[0]}"], port)

    # --- layouts ---

    def compare_layouts(self) -> None:
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
        figures = self.figures["layouts"]
        write_config(self.folder / "models", model, count=2)

        def measure(layout: str) -> None:
            with self.start_server(*layouts[layout]) as server:
                for batch in self.options.batches:
                    with ways.by_http(server.http_port, model, batch, self.options.connections) as way:
                        assert way.load is not None
                        rate = way.load(self.options.duration).calls_per_s
                    figures.append({"layout": layout, "batch": batch, "inferences_per_s": rate * batch})

        for layout in layouts:
            self.attempt(f"layout {layout}", functools.partial(measure, layout))
        write_config(self.folder / "models", model, count=1)
        rows = [(each["layout"], str(each["batch"]), number(each["inferences_per_s"])) for each in figures]
        print(f"\n{model.name}, two instances by HTTP\n")
        print(markdown_table(("layout", "batch", "inferences/s"), rows))
        self.save()

    # --- calls ---

    def count_calls(self) -> None:
        """Count what a server asks of CUDA for each request, once everything is warm."""
        folder = self.folder / "calls"
        folder.mkdir()
        with self.start_server(environment=counted(folder)) as server:
            for model in self.models:
                for name, opener in {
                    "HTTP": ways.by_http(server.http_port, model, 8, 1),
                    "CUDA shm": ways.by_cuda_shm(server.http_port, model, 8, 1, self.device, self.stream),
                }.items():
                    action = functools.partial(self._count_calls, folder, model, name, opener)
                    self.attempt(f"calls of CUDA, {model.name} by {name}", action)
            print(f"\nthe end of the server's log:\n{server.log_tail(5)}")
        self.save()

    def _count_calls(
        self, folder: Path, model: Model, name: str, opener: contextlib.AbstractContextManager[Way]
    ) -> None:
        with opener as way:
            way.alone(_COUNTED_S)
            before = read_calls(folder)
            # Its own warm-up is counted too: per request there is a little less than is shown.
            requests = way.alone(_COUNTED_S).count
            calls = {call: count - before[call] for call, count in read_calls(folder).items()}
        self.figures["calls"].append({"model": model.name, "way": name, "requests": requests, **calls})
        print(f"\n{model.name} by {name}, {requests} requests, calls of CUDA: {calls}")
        if self.is_real and not calls["launches"]:
            raise CannotCount("CUPTI saw no launch; the server's log says why")
        if waits := calls["waits for a context"]:
            raise RuntimeError(f"{waits} waits for a whole context")


class Copies:
    """A model's counters of copies and segments, as of now."""

    def __init__(self, server: Server, model: Model) -> None:
        self._server = server
        self._name = model.name
        self._before = self._read()

    def _read(self) -> tuple[int, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._server.metrics_port}/metrics", timeout=30) as reply:
            return read_copies(reply.read().decode(), self._name)

    def per_segment(self) -> float | None:
        """Return copies from host to device for each segment since then; None: there were no segments."""
        copies, segments = (after - before for after, before in zip(self._read(), self._before, strict=True))
        return round(copies / segments, 3) if segments else None


def read_copies(page: str, model: str) -> tuple[int, int]:
    """Return a model's copies from host to device and its segments, from a metrics page."""

    def read(name: str) -> int:
        pattern = rf'^forebay_{name}_total\{{[^}}]*model="{re.escape(model)}"[^}}]*\}} (\d+)$'
        return sum(map(int, re.findall(pattern, page, re.M)))

    return read("device_copies"), read("batch_segments")


def with_overheads(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each entry what it takes longer than in process, where that was measured."""
    by_way = {each["way"]: each for each in found}
    host = by_way.get(_HOST)
    device = by_way.get(_DEVICE, host)
    for each in found:
        base = device if each["way"] == "CUDA shm" else host
        if base is not None:
            each["overhead_us"] = each["p50_us"] - base["p50_us"]
            each["of_in_process"] = each["inferences_per_s"] / base["inferences_per_s"]
    return found


def print_batch(model: Model, batch: int, found: list[dict[str, Any]]) -> None:
    """Print the table of one batch size."""
    print(f"\n{model.name}, batch {batch}\n")
    columns = ("p50_us", "p99_us", "overhead_us", "inferences_per_s", "of_in_process", "copies_per_segment")
    rows = [
        (each["way"], *("-" if each.get(name) is None else number(each[name]) for name in columns)) for each in found
    ]
    titles = ("way", "p50 us", "p99 us", "overhead us", "inferences/s", "of in process", "copies/segment")
    print(markdown_table(titles, rows), flush=True)


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
    """Write a model's configuration with so many instances."""
    dims = ", ".join(map(str, model.dims))
    text = CONFIG.format(input=model.input, output=model.output, dims=dims, classes=model.classes, count=count)
    (repository / model.name / "config.pbtxt").write_text(text)


# --- the device ---


def open_gpu(kind: str) -> Device:
    """Return the device to measure; end with a sentence if there is none."""
    if kind == "cpu":
        os.environ[PLAYED_GPUS_VARIABLE] = "1"
        return open_device("host")
    # As the server's workers number them.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        device = open_device("cuda")
    except Unsupported as error:
        sys.exit(f"bench.gpu measures an NVIDIA GPU, and there is none: {error.text}\n(--device cpu tries this file.)")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        sys.exit("bench.gpu needs ONNX Runtime's GPU build: make gpu")
    ort.preload_dlls()
    return device


def describe_gpu(device: Device) -> dict[str, Any]:
    """Return what figures of a GPU belong to."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    found: dict[str, Any] = {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "gpu_packages": packages,
    }
    with contextlib.suppress(Exception):  # only for the record: NVML may be missing, or not allowed
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return found


def print_aims(figures: dict[str, Any]) -> None:
    """Say how what was measured compares with what was to be reached."""
    by_cuda = [each for each in figures["ways"] if each["way"] == "CUDA shm" and "overhead_us" in each]
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
    copies = {each["copies_per_segment"] for each in figures["ways"] if each.get("copies_per_segment")}
    print(f"\ncopies from host to device per segment: {sorted(copies)}; to be 1")


def read_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description="Serve from a GPU, beside running in process.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", default="1,8,32,64", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--parts", default=",".join(PARTS), type=lambda text: text.split(","))
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--duration", type=float, default=2.0, help="seconds of each measurement")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after so long")
    parser.add_argument("--save", type=Path, default=None, help="another file for the results")
    return parser.parse_args()


def main() -> int:
    """Measure, print and save; 1 if anything could not be measured."""
    options = read_options()
    device = open_gpu(options.device)
    machine = describe_machine() | describe_gpu(device)
    print(f"{machine_line(machine)}; GPU: {device.name}, driver {machine.get('driver')}\n{machine['command']}")
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp") as name:
        bench = Bench(options, device, Path(name), machine)
        parts = {"ways": bench.measure_ways, "layouts": bench.compare_layouts, "calls": bench.count_calls}
        for part in options.parts:
            bench.attempt(part, parts[part])
    print_aims(bench.figures)
    bench.save()
    if bench.failures:
        print("\nNot measured, or not as it should be:\n" + "\n".join(f"- {text}" for text in bench.failures))
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
