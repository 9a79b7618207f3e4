"""ONNX Runtime over device buffers: on the host as a device here, on CUDA where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.onnx_backend import read_signature
from forebay.engine.backends.onnx_cuda import OnnxDeviceInstance, inputs_on_host, load_on_gpu, with_stream
from forebay.engine.backends.onnx_options import CUDA_PROVIDER, Provider, tensorrt_options
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.host_device import HostDevice
from forebay.ipc.errors import BackendFailed
from forebay.ipc.worker_messages import InstanceSpec

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
    """An instance that subtracts, on the host as a device; ``on_host``: inputs that the session reads on the host."""

    def __init__(self, directory: Path, dim: int, *on_host: str) -> None:
        write_model(directory, "Sub", dims=("n", 3 if dim == 3 else "k"))
        spec = make_spec(directory, dim)
        session = ort.InferenceSession(directory / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        self.device = HostDevice()
        stream = self.device.make_stream()
        signature = read_signature(spec, session)
        self.instance = OnnxDeviceInstance(spec, session, signature, self.device, stream, frozenset(on_host))


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


@pytest.mark.parametrize("dim", [3, -1])
def test_inputs_that_are_read_on_the_host_stay_there(tmp_path: Path, dim: int) -> None:
    """ONNX Runtime copies such an input when it is bound; bound once, it would be the first batch's for ever."""
    setup = Setup(tmp_path, dim, "b")
    for start in (0, 7):
        segments = [(rows(count, start + count), {"y": np.zeros((count, 3), np.float32)}) for count in (1, 3)]
        setup.instance.run_segments(segments)
        for inputs, outputs in segments:
            np.testing.assert_array_equal(outputs["y"], inputs["a"] - inputs["b"])
    assert setup.device.traffic.copies_in == 2 * 2
    with setup.device.allocate(12) as memory:
        on_device = DeviceArray(memory.address, (1, 3), np.dtype(np.float32))
        setup.instance.stream.copy_in(memory.address, rows(1)["a"].ctypes.data, 12)
        results = setup.instance.fetch(setup.instance.compute([{"a": on_device, "b": on_device}], ("y",)))
        np.testing.assert_array_equal(results["y"], np.zeros((1, 3), np.float32))
    setup.instance.close()


def test_what_a_session_reads_on_the_host_is_told_by_it(tmp_path: Path) -> None:
    write_model(tmp_path, "Sub")
    session = ort.InferenceSession(tmp_path / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert inputs_on_host(session) == {"a", "b"}


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
            "user_compute_stream": "4711",
        }
        assert with_stream(Provider("CPUExecutionProvider", {}), stream).options == {}


def test_tensorrt_provider_gets_the_words_that_it_takes() -> None:
    """B-015. Its Python interface refuses 1 and 0 where it wants True and False."""
    given = {
        "precision_mode": "FP16",
        "trt_engine_cache_enable": "1",
        "trt_dla_enable": "false",
        "max_workspace_size_bytes": "1024",
        "trt_engine_cache_path": "/cache",
    }
    assert tensorrt_options(given) == {
        "trt_fp16_enable": "True",
        "trt_engine_cache_enable": "True",
        "trt_dla_enable": "False",
        "trt_max_workspace_size": "1024",
        "trt_engine_cache_path": "/cache",
    }


def test_gpu_instance_without_a_gpu_build_says_so(tmp_path: Path) -> None:
    if CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this is a GPU build of ONNX Runtime")
    write_model(tmp_path, "Sub")
    spec = make_spec(tmp_path, 3, kind="GPU")
    text = r"needs ONNX Runtime's CUDAExecutionProvider, which is not installed.*what puts the GPU build on top: pip"
    with pytest.raises(Exception, match=text):
        WorkerHarness(spec).__enter__()


needs_cuda_build = pytest.mark.skipif(
    CUDA_PROVIDER not in ort.get_available_providers(), reason="onnxruntime-gpu is not installed: make gpu"
)


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_answers_like_the_cpu(tmp_path: Path, graphs: bool) -> None:
    write_model(tmp_path, "Sub")
    instance = load_on_gpu(make_spec(tmp_path, 3, kind="GPU", optimization={"cuda_graphs": graphs}))
    assert isinstance(instance, OnnxDeviceInstance)
    assert instance._session.get_provider_options()[CUDA_PROVIDER]["has_user_compute_stream"] == "1"
    for count in (1, 8, 1, 8, 4):
        outputs = {"y": np.zeros((count, 3), np.float32)}
        instance.bind(rows(count), outputs)()
        np.testing.assert_array_equal(outputs["y"], rows(count)["a"] - rows(count)["b"])
    np.testing.assert_array_equal(instance.run(rows(2), ("y",))["y"], rows(2)["a"] - rows(2)["b"])
    instance.close()


def write_convolution(directory: Path) -> None:
    """Write a convolution with a matrix product behind it: image [n, 3, 32, 32] to scores [n, 10]."""
    random = np.random.default_rng(0)
    shapes = {"filters": (16, 3, 3, 3), "weights": (16, 10)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "filters"], ["maps"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
            helper.make_node("Flatten", ["means"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, 32, 32))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("n", 10))],
        [numpy_helper.from_array(random.standard_normal(shape, np.float32), name) for name, shape in shapes.items()],
    )
    (directory / "1").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, directory / "1" / "model.onnx")


@pytest.mark.gpu
@needs_cuda_build
def test_cuda_multiplies_and_convolves_like_the_cpu(tmp_path: Path) -> None:
    """With cuBLAS and cuDNN, wherever they come from."""
    write_convolution(tmp_path)
    config = {
        "backend": "onnxruntime",
        "max_batch_size": 4,
        "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [3, 32, 32]}],
        "output": [{"name": "scores", "data_type": "TYPE_FP32", "dims": [10]}],
    }
    instance = load_on_gpu(spec_from_config(config, model="m", model_path=str(tmp_path), kind="GPU"))
    session = ort.InferenceSession(tmp_path / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 4):
        images = np.random.default_rng(count).standard_normal((count, 3, 32, 32), np.float32)
        [expected] = session.run(None, {"image": images})
        found = instance.run({"image": images}, ("scores",))["scores"]
        # TF32 has ten bits of mantissa.
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * float(np.abs(expected).max()))
    instance.close()


@pytest.mark.gpu
@needs_cuda_build
@pytest.mark.parametrize("graphs", [False, True])
def test_cuda_reads_shapes_on_the_host_each_time(tmp_path: Path, graphs: bool) -> None:
    """Where a slice begins and ends is read by the CPU, before the GPU begins."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Slice", ["x", "first", "end"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, (6,)), *(value(name, TensorProto.INT64, (1,)) for name in ("first", "end"))],
        [value("y", TensorProto.FLOAT, ("n",))],
    )
    (tmp_path / "1").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "1" / "model.onnx")
    config = {
        "backend": "onnxruntime",
        "input": [
            {"name": "x", "data_type": "TYPE_FP32", "dims": [6]},
            *({"name": name, "data_type": "TYPE_INT64", "dims": [1]} for name in ("first", "end")),
        ],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [3]}],
    }
    optimization = {"cuda_graphs": graphs}
    instance = load_on_gpu(
        spec_from_config(config, model="m", model_path=str(tmp_path), kind="GPU", optimization=optimization)
    )
    x = np.arange(6, dtype=np.float32)
    for first in (0, 2, 1, 3):
        places = {"first": np.array([first], np.int64), "end": np.array([first + 3], np.int64)}
        assert instance.run({"x": x, **places}, ("y",))["y"].tolist() == x[first : first + 3].tolist()
    instance.close()
