"""PyTorch over device buffers: on the host as a device here, on CUDA where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_harness import spec_from_config

from forebay.engine.backends.device_instance import DeviceInstance
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]


class Affine(torch.nn.Module):
    def forward(self, a: Any, b: Any) -> Any:
        return a * 2 + b, a.sum(1)


def write_package(directory: Path, device: str) -> InstanceSpec:
    """Compile :class:`Affine` for a device, and return a model of it; skip the test where that cannot be done."""
    (directory / "1").mkdir()
    rows = torch.export.Dim("rows", max=8)
    examples = tuple(torch.zeros(2, 3, device=device) for _ in range(2))
    exported = torch.export.export(Affine(), examples, dynamic_shapes=({0: rows}, {0: rows}))
    path = str(directory / "1" / "model.pt2")
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
    except Exception as error:  # it takes compilers that a machine need not have
        pytest.skip(f"no package can be compiled here: {error}")
    config = {
        "backend": "pytorch",
        "platform": "torch_aoti",
        "max_batch_size": 8,
        "input": [{"name": f"INPUT__{index}", "data_type": "TYPE_FP32", "dims": [3]} for index in range(2)],
        "output": [
            {"name": f"OUTPUT__{index}", "data_type": "TYPE_FP32", "dims": dims} for index, dims in enumerate(([3], []))
        ],
    }
    return spec_from_config(config, model="m", model_path=str(directory), kind="GPU")


class Half(torch.nn.Module):
    def forward(self, a: Any) -> Any:
        return a + 1


def make_spec(directory: Path, module: Any, names: dict[str, str], outputs: dict[str, list[int]]) -> InstanceSpec:
    (directory / "1").mkdir(exist_ok=True)
    examples = tuple(torch.zeros(2, 3) for _ in names)
    torch.jit.trace(module, examples).save(str(directory / "1" / "model.pt"))
    config = {
        "backend": "pytorch",
        "max_batch_size": 8,
        "input": [{"name": name, "data_type": kind, "dims": [3]} for name, kind in names.items()],
        "output": [
            {"name": name, "data_type": next(iter(names.values())), "dims": dims} for name, dims in outputs.items()
        ],
    }
    return spec_from_config(config, model="m", model_path=str(directory), kind="GPU")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "host":
        monkeypatch.setenv(PLAYED_GPUS_VARIABLE, "1")
    elif not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return str(request.param)


def load(spec: InstanceSpec) -> DeviceInstance:
    from forebay.engine.backends.torch_backend import TorchBackend

    instance = TorchBackend().load(spec)
    assert isinstance(instance, DeviceInstance)
    return instance


@pytest.fixture
def affine(kind: str, tmp_path: Path) -> Iterator[DeviceInstance]:
    names = {"a__0": "TYPE_FP32", "b__1": "TYPE_FP32"}
    instance = load(make_spec(tmp_path, Affine(), names, {"y__0": [3], "s__1": []}))
    yield instance
    instance.close()


def rows(count: int, start: float = 0) -> np.ndarray[Any, Any]:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3) + np.float32(start)


def test_run_and_bound_run(affine: DeviceInstance) -> None:
    results = affine.run({"a__0": rows(2), "b__1": rows(2, 5)}, ("y__0", "s__1"))
    np.testing.assert_array_equal(results["y__0"], rows(2) * 2 + rows(2, 5))
    np.testing.assert_array_equal(results["s__1"], rows(2).sum(1))
    outputs = {"y__0": np.zeros((4, 3), np.float32)}
    inputs = {"a__0": rows(4), "b__1": rows(4)}
    run = affine.bind(inputs, outputs)
    for _ in range(4):
        inputs["a__0"] += 1
        run()
        np.testing.assert_array_equal(outputs["y__0"], inputs["a__0"] * 2 + inputs["b__1"])


def test_segments_are_gathered_by_the_copies(affine: DeviceInstance) -> None:
    segments = [
        ({"a__0": rows(count), "b__1": rows(count, 9)}, {"y__0": np.zeros((count, 3), np.float32)})
        for count in (1, 3, 2)
    ]
    before = affine.device.traffic.copies_in
    affine.run_segments(segments)
    for inputs, outputs in segments:
        np.testing.assert_array_equal(outputs["y__0"], inputs["a__0"] * 2 + inputs["b__1"])
    assert affine.device.traffic.copies_in - before == 2 * 3
    assert affine.device.traffic.device_ns > 0


def test_inputs_on_the_device_are_not_copied_from_the_host(affine: DeviceInstance) -> None:
    with affine.device.allocate(24) as memory:
        affine.stream.copy_in(memory.address, rows(2).ctypes.data, 24)
        affine.stream.synchronize()
        before = affine.device.traffic.copies_in
        placed = DeviceArray(memory.address, (2, 3), np.dtype(np.float32))
        results = affine.compute([{"a__0": placed, "b__1": placed}], ("y__0",))
        assert affine.device.traffic.copies_in == before
        np.testing.assert_array_equal(affine.fetch(results)["y__0"], rows(2) * 3)


def test_bfloat16_goes_through_as_bits(kind: str, tmp_path: Path) -> None:
    instance = load(make_spec(tmp_path, Half(), {"a__0": "TYPE_BF16"}, {"y__0": [3]}))
    values = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    bits = values.view(torch.int16).numpy().view(np.uint16)
    got = instance.run({"a__0": bits}, ("y__0",))["y__0"]
    expected = (values + 1).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, expected)
    instance.close()


def test_what_the_model_answers_wrongly_is_said(kind: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, Half(), {"a__0": "TYPE_FP32"}, {"y__0": [3], "z__1": [3]})
    instance = load(spec)
    with pytest.raises(InvalidArgument, match="input 'a__0' is missing"):
        instance.run({}, ("y__0",))
    with pytest.raises(BackendFailed, match="The output z__1 in the model configuration refers to an output index"):
        instance.run({"a__0": rows(1)}, ("z__1",))
    instance.close()


@pytest.mark.gpu
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")
def test_package_runs_on_our_stream(tmp_path: Path) -> None:
    """B-050: what AOTInductor compiled takes the stream that is PyTorch's current one."""
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    check_package(load(write_package(tmp_path, "cuda")))


def check_package(instance: DeviceInstance) -> None:
    for count in (1, 8, 3):
        inputs = {"INPUT__0": rows(count), "INPUT__1": rows(count, 5)}
        results = instance.run(inputs, ("OUTPUT__0", "OUTPUT__1"))
        np.testing.assert_array_equal(results["OUTPUT__0"], rows(count) * 2 + rows(count, 5))
        np.testing.assert_array_equal(results["OUTPUT__1"], rows(count).sum(1))
    instance.close()


def test_a_model_is_tried_before_its_first_request(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled at a first call is compiled by the load; requests that are counted come afterwards."""
    from forebay.engine.backends.torch_device import TorchDeviceInstance

    runs: list[tuple[int, ...]] = []

    class Watched(TorchDeviceInstance):
        def compute(self, batch: Any, outputs: Any) -> Any:
            runs.append(batch[0]["a__0"].shape)
            return super().compute(batch, outputs)

    monkeypatch.setattr("forebay.engine.backends.torch_backend.TorchDeviceInstance", Watched)
    load(make_spec(tmp_path, Half(), {"a__0": "TYPE_FP32"}, {"y__0": [3]})).close()
    assert runs == [(1, 3)] * 3
