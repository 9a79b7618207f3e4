"""What the GPU benchmark measures with, where it needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from bench.gpu import Copies, open_gpu, read_copies, with_overheads
from bench.gpu_models import CLASSES, RESNET50, SMALL, write_image_model
from bench.gpu_ways import Model, region_request, timed
from forebay.engine.devices.opening import has_gpu_files


def test_image_model_is_as_large_as_resnet50(tmp_path: Path) -> None:
    assert write_image_model(tmp_path / "resnet50.onnx", RESNET50, 224) == pytest.approx(25_530_472, rel=0.001)


def test_image_model_runs(tmp_path: Path) -> None:
    write_image_model(tmp_path / "small.onnx", SMALL, 32)
    session = ort.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    [scores] = session.run(None, {"image": np.ones((3, 3, 32, 32), np.float32)})
    assert scores.shape == (3, CLASSES)
    assert np.isfinite(scores).all()


def test_overhead_is_the_difference_to_what_there_is_to_compute() -> None:
    def entry(way: str, p50_us: float, rate: float) -> dict[str, object]:
        return {"way": way, "p50_us": p50_us, "inferences_per_s": rate}

    found = with_overheads(
        [
            entry("in process, host", 100.0, 1000.0),
            entry("in process, device", 60.0, 2000.0),
            entry("HTTP", 180.0, 900.0),
            entry("CUDA shm", 130.0, 1900.0),
        ]
    )
    assert {each["way"]: each["overhead_us"] for each in found} == {
        "in process, host": 0.0,
        "in process, device": -40.0,
        "HTTP": 80.0,
        "CUDA shm": 70.0,
    }
    assert found[-1]["of_in_process"] == pytest.approx(0.95)


def test_tensors_of_a_region_request_lie_behind_one_another(tmp_path: Path) -> None:
    model = Model("m", tmp_path, "x", "y", (2,), 3)
    request = region_request(8000, model, 4, 32, 48)
    assert b'"shape": [4, 2]' in request
    assert b'"shared_memory_offset": 32, "shared_memory_byte_size": 48' in request


def test_copies_are_counted_for_each_segment() -> None:
    page = (
        'forebay_batch_segments_total{gpu_uuid="GPU-0",model="a",version="1"} 10\n'
        'forebay_batch_segments_total{model="cpu",version="1"} 3\n'
        'forebay_device_copies_total{gpu_uuid="GPU-0",model="a",version="1"} 9\n'
    )
    assert read_copies(page, "a") == (9, 10)
    assert read_copies(page, "cpu") == (0, 3)


def test_copies_are_those_since_it_was_asked_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = iter([(5, 5), (25, 15), (7, 7), (7, 7)])
    monkeypatch.setattr(Copies, "_read", lambda _self: next(found))
    server: Any = None
    model = Model("m", tmp_path, "x", "y", (2,), 3)
    assert Copies(server, model).per_segment() == 2
    assert Copies(server, model).per_segment() is None


def test_missing_measurements_leave_the_others_alone() -> None:
    found = with_overheads([{"way": "HTTP", "p50_us": 1.0, "inferences_per_s": 1.0}])
    assert found == [{"way": "HTTP", "p50_us": 1.0, "inferences_per_s": 1.0}]


def test_calls_are_timed_for_as_long_as_told() -> None:
    calls: list[None] = []
    figures = timed(lambda: calls.append(None), 0.01)
    assert figures.count == len(calls) - 3
    assert 0 < figures.p50_us <= figures.p99_us


def test_without_a_gpu_it_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREBAY_TEST_GPUS", raising=False)
    if has_gpu_files():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match=r"bench\.gpu measures an NVIDIA GPU, and there is none"):
        open_gpu("cuda")
