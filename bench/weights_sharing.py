"""How much memory does one more instance of an ONNX model take, with its weights shared and without?

    python -m bench.weights_sharing [--mb 64] [--instances 4]

Serves a model of square matrix products whose weights have the given size, with several instances, first with
``share-weights=false`` and then with sharing (an empty cache, then a filled one), and sends one request to each
instance. Tables show the proportional set size (PSS) and the private memory of the median worker, what all processes
have together, and the time until the server was ready.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.kserve import infer_once, infer_request
from bench.machine import describe_machine, machine_line, save_results
from bench.servers import forebay
from bench.tables import markdown_table, number

MB = 1 << 20
#: Of each matrix: 4 MiB of float32.
WIDTH = 1024


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weights_sharing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--mb", type=int, default=64, help="size of the weights")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    machine = describe_machine()
    print(machine_line(machine))
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as folder:
        repository, cache = Path(folder, "models"), Path(folder, "cache")
        write_model(repository, options.mb, options.instances)
        figures = [
            {"weights": title, **measure_server(repository, cache, sharing, options.instances)}
            for title, sharing in (
                ("each its own", "false"),
                ("shared, copy made now", "true"),
                ("shared, copy at hand", "true"),
            )
        ]
    print(
        markdown_table(
            ["weights", "PSS per worker", "private per worker", "PSS of all", "ready after"],
            [
                [
                    str(row["weights"]),
                    f"{number(row['worker_pss_bytes'] / MB)} MB",
                    f"{number(row['worker_private_bytes'] / MB)} MB",
                    f"{number(row['total_pss_bytes'] / MB)} MB",
                    f"{number(row['ready_s'])} s",
                ]
                for row in figures
            ],
        )
    )
    path = save_results("weights_sharing", machine, {"mb": options.mb, "runs": figures}, options.output)
    print(f"saved to {path}")


def write_model(repository: Path, size_mb: int, instances: int) -> None:
    """Write a chain of matrix products, and its configuration."""
    count = max(size_mb * MB // (WIDTH * WIDTH * 4), 1)
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH, f"w{index}")
        for index in range(count)
    ]
    tensors = ["x", *(f"t{index}" for index in range(1, count)), "y"]
    nodes = [helper.make_node("MatMul", [tensors[i], f"w{i}"], [tensors[i + 1]]) for i in range(count)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        initializer=weights,
    )
    folder = repository / "chain" / "1"
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )
    (repository / "chain" / "config.pbtxt").write_text(
        f'backend: "onnxruntime"\nmax_batch_size: 4\ninstance_group [{{ count: {instances} kind: KIND_CPU }}]\n'
    )


def measure_server(repository: Path, cache: Path, sharing: str, instances: int) -> dict[str, Any]:
    """Serve the model once and look at its processes."""
    flags = [
        f"--backend-config=onnxruntime,share-weights={sharing}",
        f"--backend-config=onnxruntime,weights-cache-directory={cache}",
    ]
    with forebay(repository, *flags) as server:
        request = infer_request("chain", {"x": np.ones((1, WIDTH), np.float32)}, ["y"])
        for _ in range(4 * instances):
            infer_once(server.http_port, request)
        memory = server.processes.memory()
    workers = [process for process in memory if "worker chain" in process.name]
    assert len(workers) == instances, [process.name for process in memory]
    return {
        "worker_pss_bytes": int(statistics.median(process.pss_bytes for process in workers)),
        "worker_private_bytes": int(statistics.median(process.private_bytes for process in workers)),
        "total_pss_bytes": sum(process.pss_bytes for process in memory),
        "ready_s": server.ready_s,
    }


if __name__ == "__main__":
    main()
