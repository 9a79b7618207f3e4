"""ONNX Runtime over device buffers: on the host as a device here, on CUDA where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.onnx_backend import read_signature
from forebay.engine.backends.onnx_cuda import OnnxDeviceInstance, load_on_gpu, with_stream
from forebay.engine.backends.onnx_options import CUDA_PROVIDER, Provider
from forebay.engine.devices.host_device import HostDevice
from forebay.ipc.errors import BackendFailed
from forebay.ipc.messages import InstanceSpec

Array = np.ndarray[Any, Any]


def write_model(directory: Path, operator: str, *, dims: tuple[Any, ...] = ("n", 3)) -> None:
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, kind, dims) for name in "ab"],
        [helper.make_tensor_value_info("y", kind, dims)],
    )
    (directory / "1").mkdir(exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, directory / "1" / "model.onnx")


def make_spec(directory: Path, dim: int, **overrides: Any) -> InstanceSpec:
    tensors = [{"name": name, "data_type": "TYPE_FP32", "dims": [dim]} for name in "aby"]
    config = {"backend": "onnxruntime", "max_batch_size": 8, "input": tensors[:2], "output": tensors[2:]}
    return spec_from_config(config, model="m", model_path=str(directory), **overrides)


class Setup:
    """An instance that subtracts, on the host as a device."""

    def __init__(self, directory: Path, dim: int) -> None:
        write_model(directory, "Sub", dims=("n", 3 if dim == 3 else "k"))
        spec = make_spec(directory, dim)
        session = ort.InferenceSession(directory / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        self.device = HostDevice()
        stream = self.device.make_stream()
        self.instance = OnnxDeviceInstance(spec, session, read_signature(spec, session), self.device, stream)


@pytest.fixture
def fixed(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(tmp_path, 3)
    yield setup
    setup.instance.close()


def rows(count: int, start: int = 0) -> dict[str, Array]:
    numbers = np.arange(start, start + count * 3, dtype=np.float32).reshape(count, 3)
    return {"a": numbers * 3, "b": numbers}


def test_bound_batch_is_one_copy_per_tensor(fixed: Setup) -> None:
    inputs, outputs = rows(4), {"y": np.zeros((4, 3), np.float32)}
    run = fixed.instance.bind(inputs, outputs)
    for factor in (1, 2):
        inputs["a"] *= factor
        run()
        np.testing.assert_array_equal(outputs["y"], inputs["a"] - inputs["b"])
    assert fixed.device.traffic.copies_in == 2 * 2
    assert fixed.device.traffic.copies_out == 2 * 1
    assert fixed.device.traffic.bytes_out == 2 * 4 * 3 * 4


def test_batch_of_segments_is_gathered_by_the_copies(fixed: Setup) -> None:
    """Issue 8: exactly one copy per segment and tensor, none on the host."""
    segments = [(rows(count, 10 * count), {"y": np.zeros((count, 3), np.float32)}) for count in (1, 3, 2)]
    fixed.instance.run_segments(segments)
    for inputs, outputs in segments:
        np.testing.assert_array_equal(outputs["y"], inputs["a"] - inputs["b"])
    assert fixed.device.traffic.copies_in == 3 * 2
    assert fixed.device.traffic.copies_out == 3


def test_buffers_stay_where_they_are(fixed: Setup) -> None:
    """What CUDA graphs need: the first batch makes room for the largest."""
    for count in (1, 8, 4, 1):
        outputs = {"y": np.zeros((count, 3), np.float32)}
        fixed.instance.bind(rows(count), outputs)()
        np.testing.assert_array_equal(outputs["y"], rows(count)["a"] - rows(count)["b"])
        assert fixed.instance._staging.generation == 3


def test_shapes_that_vary(tmp_path: Path) -> None:
    setup = Setup(tmp_path, -1)
    for width in (2, 500, 1, 0):
        inputs = {name: np.full((2, width), value, np.float32) for name, value in (("a", 7), ("b", 2))}
        results = setup.instance.run(inputs, ("y",))
        assert results["y"].shape == (2, width)
        assert (results["y"] == 5).all()
    setup.instance.close()


def test_failed_run_leaves_the_instance_usable(tmp_path: Path) -> None:
    setup = Setup(tmp_path, -1)
    wrong = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 4), np.float32)}
    with pytest.raises(BackendFailed, match="onnx runtime error"):
        setup.instance.run(wrong, ("y",))
    assert (setup.instance.run({"a": wrong["a"], "b": wrong["a"]}, ("y",))["y"] == 0).all()
    setup.instance.close()


def test_arena_is_page_locked_while_it_is_mapped(fixed: Setup) -> None:
    arena = np.zeros(1 << 16, np.uint8)
    fixed.instance.attach_memory(arena.ctypes.data, arena.nbytes)
    assert fixed.device._pinned == {arena.ctypes.data: arena.nbytes}
    # A second time it cannot be locked, and copies are slower.
    fixed.instance.attach_memory(arena.ctypes.data, arena.nbytes)
    fixed.instance.detach_memory(arena.ctypes.data)
    fixed.instance.detach_memory(arena.ctypes.data)
    assert not fixed.device._pinned


def test_providers_of_the_gpu_work_on_our_stream() -> None:
    with HostDevice().make_stream() as stream:
        stream.handle = 4711
        assert with_stream(Provider(CUDA_PROVIDER, {"device_id": "1"}), stream).options == {
            "device_id": "1",
            "has_user_compute_stream": "1",
            "user_compute_stream": "4711",
        }
        assert with_stream(Provider("CPUExecutionProvider", {}), stream).options == {}


def test_gpu_instance_without_a_gpu_build_says_so(tmp_path: Path) -> None:
    if CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this is a GPU build of ONNX Runtime")
    write_model(tmp_path, "Sub")
    spec = make_spec(tmp_path, 3, kind="GPU")
    with pytest.raises(Exception, match="needs ONNX Runtime's CUDAExecutionProvider, which is not installed"):
        WorkerHarness(spec).__enter__()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_answers_like_the_cpu(tmp_path: Path, graphs: bool) -> None:
    if CUDA_PROVIDER not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed: make gpu")
    write_model(tmp_path, "Sub")
    instance = load_on_gpu(make_spec(tmp_path, 3, kind="GPU", optimization={"cuda_graphs": graphs}))
    for count in (1, 8, 1, 8, 4):
        outputs = {"y": np.zeros((count, 3), np.float32)}
        instance.bind(rows(count), outputs)()
        np.testing.assert_array_equal(outputs["y"], rows(count)["a"] - rows(count)["b"])
    np.testing.assert_array_equal(instance.run(rows(2), ("y",))["y"], rows(2)["a"] - rows(2)["b"])
    instance.close()
