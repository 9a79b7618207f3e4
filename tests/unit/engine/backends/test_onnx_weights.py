"""Weights shared between the instances of an ONNX model, and what happens when they cannot be."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.onnx_weights import instance_count
from forebay.ipc.worker_messages import InstanceSpec

#: One square matrix of float32: 4 MiB.
WIDTH = 1024
WEIGHT_BYTES = WIDTH * WIDTH * 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "m", seed=1)
    return tmp_path / "m"


def write_model(directory: Path, *, seed: int, external: bool = False) -> None:
    weight = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH), np.float32)
    shape = ["n", WIDTH]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializer=[numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (directory / "1").mkdir(parents=True, exist_ok=True)
    onnx.save(made, directory / "1" / "model.onnx", save_as_external_data=external, location="weights.bin")


def make_spec(model: Path, cache: Path, *, count: int = 2, **settings: str) -> InstanceSpec:
    config: dict[str, Any] = {
        "backend": "onnxruntime",
        "max_batch_size": 4,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [WIDTH]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [WIDTH]}],
        "instance_group": [{"kind": "KIND_CPU", "count": count}],
    }
    backend_config = {
        "weights-cache-directory": str(cache),
        "share-weights-min-bytes": str(WEIGHT_BYTES // 2),
        **{key.replace("_", "-"): value for key, value in settings.items()},
    }
    return spec_from_config(config, model="m", model_path=str(model), backend_config=backend_config)


def copies(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir()) if cache.exists() else []


def infer(worker: WorkerHarness) -> np.ndarray[Any, Any]:
    rows = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    [response] = worker.infer({"x": rows}, reply_bytes=1 << 16)
    assert response.error is None
    return response.outputs["y"]


def mapped_bytes(pid: int, path: Path) -> tuple[int, int]:
    """Return (resident, anonymous) bytes of a process's mappings of a file."""
    resident = anonymous = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            resident += int(line.split()[1]) * 1024
        elif inside and first == "Anonymous:":
            anonymous += int(line.split()[1]) * 1024
    return resident, anonymous


def test_instances_map_one_copy_of_the_weights(model: Path, tmp_path: Path) -> None:
    """FACTS 3: the repacked weights are pages of a file, in every instance the same ones."""
    cache = tmp_path / "cache"
    spec = make_spec(model, cache)
    plain_spec = make_spec(model, cache, share_weights="false")
    with WorkerHarness(plain_spec) as plain:
        expected = infer(plain)
    assert copies(cache) == []
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerHarness(spec)) for _ in range(2)]
        [copy] = copies(cache)
        for worker in workers:
            np.testing.assert_allclose(infer(worker), expected, rtol=1e-6)
            resident, anonymous = mapped_bytes(worker.process.pid, copy / "weights.bin")
            assert resident >= WEIGHT_BYTES
            assert anonymous == 0


def test_a_single_instance_is_loaded_plainly(model: Path, tmp_path: Path) -> None:
    with WorkerHarness(make_spec(model, tmp_path / "cache", count=1)) as worker:
        infer(worker)
    assert copies(tmp_path / "cache") == []


def test_a_small_model_is_loaded_plainly(model: Path, tmp_path: Path) -> None:
    spec = make_spec(model, tmp_path / "cache", share_weights_min_bytes=str(1 << 30))
    with WorkerHarness(spec) as worker:
        infer(worker)
    assert copies(tmp_path / "cache") == []


@pytest.mark.parametrize("external", [False, True])
def test_a_changed_model_gets_a_new_copy_in_place_of_the_old(model: Path, tmp_path: Path, external: bool) -> None:
    """Also one whose weights lie beside it. A worker of the old state keeps what it has mapped."""
    cache = tmp_path / "cache"
    write_model(model, seed=1, external=external)
    with WorkerHarness(make_spec(model, cache)) as old:
        answer = infer(old)
        [first] = copies(cache)
        write_model(model, seed=2, external=external)
        with WorkerHarness(make_spec(model, cache)) as new:
            assert not np.allclose(infer(new), answer)
        assert (infer(old) == answer).all()
    [second] = copies(cache)
    assert second != first


def test_a_damaged_copy_is_passed_over(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with WorkerHarness(make_spec(model, cache)) as worker:
        expected = infer(worker)
    [copy] = copies(cache)
    (copy / "model.onnx").write_bytes(b"damaged")
    with WorkerHarness(make_spec(model, cache)) as worker:
        np.testing.assert_allclose(infer(worker), expected, rtol=1e-6)


def test_remains_of_a_process_that_died_are_removed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with WorkerHarness(make_spec(model, cache)):
        pass
    [copy] = copies(cache)
    remains = cache / f"{copy.name}.tmp-old"
    copy.rename(remains)
    with WorkerHarness(make_spec(model, cache)) as worker:
        infer(worker)
    assert copies(cache) == [copy]


def test_a_cache_that_cannot_be_written_is_done_without(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with WorkerHarness(make_spec(model, tmp_path / "file" / "cache")) as worker:
        infer(worker)


def test_the_copy_unused_for_longest_makes_room(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = cache / "old"
    old.mkdir(parents=True)
    (old / "weights.bin").write_bytes(bytes(WEIGHT_BYTES))
    os.utime(old, (1, 1))
    limit = str(3 * WEIGHT_BYTES - 1)
    with WorkerHarness(make_spec(model, cache, weights_cache_bytes=limit)) as worker:
        infer(worker)
    assert old not in copies(cache)
    assert len(copies(cache)) == 1


def test_a_cache_without_room_is_done_without(model: Path, tmp_path: Path) -> None:
    with WorkerHarness(make_spec(model, tmp_path / "cache", weights_cache_bytes="1")) as worker:
        infer(worker)
    assert copies(tmp_path / "cache") == []


def test_a_copy_is_made_on_request_for_a_single_instance(model: Path, tmp_path: Path) -> None:
    with WorkerHarness(make_spec(model, tmp_path / "cache", count=1, share_weights="true")) as worker:
        infer(worker)
    assert len(copies(tmp_path / "cache")) == 1


def test_instances_on_gpus_do_not_count() -> None:
    config = b'{"instance_group":[{"kind":"KIND_CPU","count":3},{"kind":"KIND_GPU","count":2}]}'
    assert instance_count(InstanceSpec("m", 1, 0, 0, "m_0", "onnxruntime", "", "", "", config_json=config)) == 3
