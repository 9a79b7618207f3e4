"""What does a 600 KB image body cost the server, beside receiving the same bytes straight into a buffer?

    python -m bench.large_body [--connections 8] [--rounds 5]

forebay serves a model with one input ``image`` FP32 [3, 224, 224] (602,112 bytes) that returns the first and the last
pixel: its own work does not depend on the size of the image, so what is measured is bringing the image from the socket
to the model. The peer, in turns in the same run and under the same client, is `bench/bare_receiver.py`: uvloop and a
``BufferedProtocol`` that receives the body into shared memory, looks at nothing but Content-Length and answers at once.
Target: forebay's server CPU per request is at most 1.3 times the peer's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from bench.kserve import infer_once, infer_request
from bench.load.client import LoadFailed, LoadResult, run_load
from bench.machine import describe_machine, machine_line, save_results
from bench.processes import Usage
from bench.servers import Server, forebay, free_ports
from bench.tables import markdown_table, number

MODEL = "corner_pixels"
IMAGE_SHAPE = (3, 224, 224)
PIXEL_COUNT = 3 * 224 * 224
TARGET_RATIO = 1.3
CONFIG = f"""name: "{MODEL}"
backend: "onnxruntime"
max_batch_size: 8
input [ {{ name: "image" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] }} ]
output [ {{ name: "corners" data_type: TYPE_FP32 dims: [ 2 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ }}
"""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.large_body", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=3)
    parser.add_argument("--warmup", type=float, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    image = np.random.default_rng(0).standard_normal((1, *IMAGE_SHAPE)).astype(np.float32)
    request = infer_request(MODEL, {"image": image}, ["corners"])
    with image_repository() as repository, forebay(repository) as ours, bare_receiver() as floor:
        corners = infer_once(ours.http_port, request)["corners"]
        np.testing.assert_array_equal(corners, [[image.flat[0], image.flat[-1]]])
        costs: dict[str, list[float]] = {ours.name: [], floor.name: []}
        loads: dict[str, list[LoadResult]] = {ours.name: [], floor.name: []}
        for round_number in range(options.rounds):
            for server in (ours, floor) if round_number % 2 == 0 else (floor, ours):
                load, usage = load_and_usage(server, request, options)
                costs[server.name].append(usage.cpu_ns / 1e3 / load.completed_count)
                loads[server.name].append(load)

    machine = describe_machine()
    rows = [
        [
            name,
            number(statistics.median(load.rate_per_s for load in seen)),
            number(statistics.median(load.p50_us for load in seen)),
            number(statistics.median(load.p99_us for load in seen)),
            number(statistics.median(costs[name])),
        ]
        for name, seen in loads.items()
    ]
    ratio = statistics.median(ours / bare for ours, bare in zip(*costs.values(), strict=True))
    print(f"{machine_line(machine)}\n{machine['command']}\n")
    print(markdown_table(["server", "requests/s", "p50 us", "p99 us", "server CPU us"], rows))
    print(f"\nserver CPU, forebay / bare receiver: {number(ratio)} (target: at most {TARGET_RATIO})")
    figures = {
        "ratio": ratio,
        "cpu_us": costs,
        "load": {name: [load.as_json() for load in seen] for name, seen in loads.items()},
    }
    print(f"saved: {save_results('large_body', machine, figures, options.output)}")


def load_and_usage(server: Server, request: bytes, options: argparse.Namespace) -> tuple[LoadResult, Usage]:
    """Put load on a server; return what the client saw and what the server used meanwhile.

    Raises:
        LoadFailed: an answer was wrong.
    """
    looks: list[Usage] = []

    def look() -> None:
        looks.append(server.processes.usage())

    load = run_load(
        server.http_port,
        request,
        connections=options.connections,
        duration_s=options.duration,
        warmup_s=options.warmup,
        on_start=look,
        on_end=look,
    )
    if load.completed_count == 0 or load.error_count:
        raise LoadFailed(f"{server.name}: {load}\n{server.log_tail(10)}")
    return load, looks[1] - looks[0]


@contextmanager
def image_repository() -> Generator[Path, None, None]:
    """Make a repository with the model that returns an image's first and last pixel."""
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Reshape", ["image", "flat_shape"], ["flat"]),
            onnx.helper.make_node("Gather", ["flat", "places"], ["corners"], axis=1),
        ],
        MODEL,
        [onnx.helper.make_tensor_value_info("image", float32, ["batch", *IMAGE_SHAPE])],
        [onnx.helper.make_tensor_value_info("corners", float32, ["batch", 2])],
        [
            onnx.numpy_helper.from_array(np.array([-1, PIXEL_COUNT], np.int64), "flat_shape"),
            onnx.numpy_helper.from_array(np.array([0, PIXEL_COUNT - 1], np.int64), "places"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        version = Path(folder) / MODEL / "1"
        version.mkdir(parents=True)
        onnx.save(model, version / "model.onnx")
        (version.parent / "config.pbtxt").write_text(CONFIG)
        yield Path(folder)


def bare_receiver() -> Server:
    """Return the peer, not yet started."""
    (port,) = free_ports(1)
    return Server("bare receiver", [sys.executable, "-m", "bench.bare_receiver", str(port)], port)


if __name__ == "__main__":
    main()
