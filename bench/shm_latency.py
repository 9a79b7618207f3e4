"""How long does one inference take through shared memory, beside running the model in the same process?

    python -m bench.shm_latency [--count 20000] [--block 500] [--peer FOLDER] [--picture FILE.svg]

One request of one row of ``alpha_model`` (version 2, queue delay 0) at a time, in turns of ``--block`` requests each,
so that a slow moment of the machine falls on all of them:

- *in process*: ONNX Runtime's ``session.run`` in this process: what there is to compute, and the zero of *overhead*;
- *shm, Python*: ``forebay.client.shm``, waiting parked (its default: it looks for an answer for up to 120 us before it
  sleeps) and spinning;
- *shm, C*: ``frontend/client/c/latency.c``, one process per turn, its own warm-up left out;
- *http* and *grpc, system shm*: ``tritonclient`` with registered system shared memory, on forebay and, with ``--peer``,
  on a real Triton (its Python backend: PyPI has no other).

*Overhead* is the difference of the medians to *in process*. Then the same for a model that reads the first element only
of an input of 4 KiB and of 16 MiB: what of the overhead grows with the tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from bench.machine import REPOSITORY_ROOT, describe_machine, machine_line, save_results
from bench.servers import alpha_repository, forebay, free_ports, triton
from bench.tables import markdown_table, number
from forebay.client import shm

MODEL = "alpha_model"
C_SOURCES = REPOSITORY_ROOT / "frontend" / "client" / "c"
#: Elements of the small and the large input: 4 KiB and 16 MiB of float32.
SIZES = {"4 KiB": 1024, "16 MiB": 4 * 1024 * 1024}

Latencies = npt.NDArray[np.int64]
#: Runs so many requests and returns how long each took, ns.
Turn = Callable[[int], Latencies]


def main() -> None:
    """Measure, print and save."""
    options = _parse_options()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp")))
        repository = stack.enter_context(alpha_repository("onnxruntime"))
        sizes_are_known = write_first_element_models(repository)
        grpc_port, peer_grpc_port = free_ports(2)
        flags = [f"--runtime-directory={folder}", "--allow-client-shm=true", *on_grpc(grpc_port), *options.flags]
        server = stack.enter_context(forebay(repository, *flags))
        engine = stack.enter_context(shm.connect(folder))
        spinning = stack.enter_context(shm.connect(folder, wait="spin"))
        turns: dict[str, Turn] = {
            "in process": in_process(repository / MODEL / "2" / "model.onnx", (1, 50)),
            "shm, Python, parked": through_shm(engine, MODEL),
            "shm, Python, spinning": through_shm(spinning, MODEL),
        }
        if (program := build_c_client(folder)) is not None:
            turns["shm, C, parked"] = through_c(program, folder, "park")
            turns["shm, C, spinning"] = through_c(program, folder, "spin")
        add_protocols(stack, turns, "forebay", server.http_port, grpc_port)
        if options.peer is not None:
            peer_repository = stack.enter_context(alpha_repository("python"))
            peer = stack.enter_context(triton(peer_repository, *on_grpc(peer_grpc_port), folder=options.peer))
            add_protocols(stack, turns, "Triton", peer.http_port, peer_grpc_port)
        measured = take_turns(turns, options.count, options.block)
        sizes: dict[str, Latencies] = {}
        if sizes_are_known:
            size_turns: dict[str, Turn] = {}
            for title, elements in SIZES.items():
                name = f"first_of_{elements}"
                size_turns[f"{title}, in process"] = in_process(repository / name / "1" / "model.onnx", (elements,))
                size_turns[f"{title}, shm, Python, parked"] = through_shm(engine, name)
            sizes = take_turns(size_turns, options.count // 4, options.block)
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    print(report(measured, measured["in process"]))
    for title in SIZES:
        if sizes:
            both = {name: seen for name, seen in sizes.items() if name.startswith(title)}
            print("\n" + report(both, sizes[f"{title}, in process"]))
    if options.picture is not None:
        options.picture.write_text(histogram(measured))
        print(f"\npicture: {options.picture}")
    figures = {name: summary(seen) for name, seen in (measured | sizes).items()}
    print(f"\nsaved: {save_results('shm_latency', machine, figures, options.output)}")


# --- what is measured ---


def in_process(path: Path, shape: tuple[int, ...]) -> Turn:
    """Run a model file here, one thread, arrays in and out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    values = np.zeros(shape, np.float32)

    def turn(count: int) -> Latencies:
        took = np.empty(count, np.int64)
        for index in range(count):
            began_ns = time.perf_counter_ns()
            session.run(None, {name: values})
            took[index] = time.perf_counter_ns() - began_ns
        return took

    return turn


def through_shm(engine: shm.Engine, name: str) -> Turn:
    """Use our Python client; the input is in place, as it is for whoever computes it there."""
    model = engine.model(name)
    model.input(model.inputs[0].name, rows=1)[:] = 0
    infer = model.infer

    def turn(count: int) -> Latencies:
        took = np.empty(count, np.int64)
        for _ in range(20):
            infer()
        for index in range(count):
            began_ns = time.perf_counter_ns()
            infer()
            took[index] = time.perf_counter_ns() - began_ns
        return took

    return turn


def build_c_client(folder: Path) -> Path | None:
    """Return the C latency program; None without a compiler."""
    if shutil.which("cc") is None or shutil.which("make") is None:
        print("no C compiler: the C client is left out")
        return None
    subprocess.run(["make", "-s", "-C", str(C_SOURCES), f"BUILD={folder}"], check=True)
    return folder / "latency"


def through_c(program: Path, folder: Path, wait: str) -> Turn:
    """Use the C client, one process per turn."""

    def turn(count: int) -> Latencies:
        command = [str(program), MODEL, str(count), wait, str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return np.array([int(line) for line in done.stdout.split()], np.int64)

    return turn


def on_grpc(port: int) -> list[str]:
    """Return flags that both servers understand."""
    return ["--allow-grpc=true", "--grpc-address=127.0.0.1", f"--grpc-port={port}"]


def add_protocols(
    stack: contextlib.ExitStack, turns: dict[str, Turn], server: str, http_port: int, grpc_port: int
) -> None:
    """Add tritonclient with registered regions over both protocols."""
    import tritonclient.grpc
    import tritonclient.http

    for name, protocol, port in (("http", tritonclient.http, http_port), ("grpc", tritonclient.grpc, grpc_port)):
        turns[f"{name}, system shm, {server}"] = stack.enter_context(
            through_regions(protocol, f"127.0.0.1:{port}", f"{name}-{server}-{os.getpid()}")
        )


@contextlib.contextmanager
def through_regions(protocol: Any, address: str, key: str) -> Iterator[Turn]:
    """Use tritonclient with one region for the input and one for the output.

    Args:
        protocol: ``tritonclient.http`` or ``tritonclient.grpc``.
        key: names the regions.
    """
    import tritonclient.utils.shared_memory as regions

    client = protocol.InferenceServerClient(address)
    handles: list[Any] = []
    try:
        for name, size in ((f"{key}-in", 200), (f"{key}-out", 4)):
            handles.append(regions.create_shared_memory_region(name, f"/{name}", size))
            client.register_system_shared_memory(name, f"/{name}", size)
        regions.set_shared_memory_region(handles[0], [np.zeros((1, 50), np.float32)])
        source = protocol.InferInput("features", [1, 50], "FP32")
        source.set_shared_memory(f"{key}-in", 200)
        target = protocol.InferRequestedOutput("prediction")
        target.set_shared_memory(f"{key}-out", 4)

        def turn(count: int) -> Latencies:
            took = np.empty(count, np.int64)
            for index in range(-20, count):
                began_ns = time.perf_counter_ns()
                client.infer(MODEL, [source], outputs=[target])
                if index >= 0:
                    took[index] = time.perf_counter_ns() - began_ns
            return took

        yield turn
        for name in (f"{key}-in", f"{key}-out"):
            client.unregister_system_shared_memory(name)
    finally:
        client.close()
        for handle in handles:
            regions.destroy_shared_memory_region(handle)


def write_first_element_models(repository: Path) -> bool:
    """Write a model per size that returns the first element of its input; False without ``onnx``."""
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        print("onnx is not installed: the sizes are left out (pip install 'forebay[test]')")
        return False
    for elements in SIZES.values():
        name = f"first_of_{elements}"
        bounds = [helper.make_tensor(key, TensorProto.INT64, [1], [value]) for key, value in (("from", 0), ("to", 1))]
        graph = helper.make_graph(
            [helper.make_node("Slice", ["values", "from", "to"], ["first"])],
            name,
            [helper.make_tensor_value_info("values", TensorProto.FLOAT, [elements])],
            [helper.make_tensor_value_info("first", TensorProto.FLOAT, [1])],
            bounds,
        )
        version = repository / name / "1"
        version.mkdir(parents=True)
        opset = helper.make_opsetid("", 13)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(version / "model.onnx"))
        (version.parent / "config.pbtxt").write_text(
            f'backend: "onnxruntime"\nmax_batch_size: 0\n'
            f'input [ {{ name: "values" data_type: TYPE_FP32 dims: [ {elements} ] }} ]\n'
            f'output [ {{ name: "first" data_type: TYPE_FP32 dims: [ 1 ] }} ]\n'
        )
    return True


def take_turns(turns: dict[str, Turn], count: int, block: int) -> dict[str, Latencies]:
    """Run ``count`` requests of each kind, ``block`` at a time, each round in the other direction."""
    seen: dict[str, list[Latencies]] = {name: [] for name in turns}
    for turn in turns.values():
        turn(block)
    for number_of_round in range(max(count // block, 1)):
        names = list(turns) if number_of_round % 2 == 0 else list(reversed(turns))
        for name in names:
            seen[name].append(turns[name](block))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


# --- what is told ---


def summary(took: Latencies) -> dict[str, float]:
    """Return the figures of one kind of request, us."""
    p50, p99, p99_9, worst = (float(value) / 1e3 for value in np.percentile(took, [50, 99, 99.9, 100]))
    return {"count": len(took), "p50_us": p50, "p99_us": p99, "p99_9_us": p99_9, "max_us": worst}


def report(measured: dict[str, Latencies], zero: Latencies) -> str:
    """Return the table."""
    zero_us = summary(zero)["p50_us"]
    rows: list[list[str]] = []
    for name, took in measured.items():
        figures = summary(took)
        cells = [
            figures["p50_us"],
            figures["p50_us"] - zero_us,
            figures["p99_us"],
            figures["p99_9_us"],
            figures["max_us"],
        ]
        rows.append([name, *(number(cell) for cell in cells)])
    return markdown_table(["one request", "p50 us", "overhead p50 us", "p99 us", "p99.9 us", "max us"], rows)


def histogram(measured: dict[str, Latencies]) -> str:
    """Return an SVG picture: how often which latency was seen, one row per kind, logarithmic from 5 us to 5 ms."""
    edges = np.logspace(np.log10(5), np.log10(5000), 141)
    left, width, height = 190, 840, 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{height * len(measured) + 50}" '
        'font-family="sans-serif" font-size="12">'
    ]

    def place(value_us: float) -> float:
        return left + width * float(np.log10(value_us / 5) / 3)

    for row, (name, took) in enumerate(measured.items()):
        counts, _edges = np.histogram(took / 1e3, edges)
        floor = 10 + height * (row + 1)
        parts.append(f'<text x="5" y="{floor - 5}">{name}</text>')
        for index, count in enumerate(counts):
            if count:
                # The square root, so that the few that were slow can be seen beside the many that were not.
                tall = (height - 12) * float(np.sqrt(count / counts.max()))
                at, wide = place(float(edges[index])), width / 140
                parts.append(
                    f'<rect x="{at:.1f}" y="{floor - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="#4a78b0"/>'
                )
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{floor}" y2="{floor}" stroke="#999"/>')
    bottom = 10 + height * len(measured)
    parts += [
        f'<text x="{place(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>'
        for tick in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    ]
    parts.append(f'<text x="{left}" y="{bottom + 36}">microseconds; heights are square roots of counts</text></svg>')
    return "\n".join(parts)


class _Options(argparse.Namespace):
    """The command line."""

    count: int
    block: int
    peer: Path | None
    picture: Path | None
    output: Path | None
    flags: list[str]


def _parse_options() -> _Options:
    parser = argparse.ArgumentParser(prog="python -m bench.shm_latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="requests of each kind")
    parser.add_argument("--block", type=int, default=500, help="requests of one kind at a time")
    parser.add_argument("--peer", type=Path, help="where bench/peer_triton.sh installed Triton; without: no Triton")
    parser.add_argument("--picture", type=Path, help="SVG file for the histogram")
    parser.add_argument(
        "--output", type=Path, help="results file (default: bench/results/shm_latency-DATE-COMMIT.json)"
    )
    parser.add_argument(
        "--flags", nargs="*", default=[], help="further flags of forebay serve, for example --flags=..."
    )
    return parser.parse_args(namespace=_Options())


if __name__ == "__main__":
    main()
