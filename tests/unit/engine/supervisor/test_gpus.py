"""Which GPUs there are and who may use them, on machines that exist here on paper only."""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

import pytest

from forebay.engine.devices.memory_limit import LIMIT_KEY, PINNED_KEY, check_memory_limit
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE
from forebay.engine.repository.config import parse_config_json
from forebay.engine.repository.normalise import normalise_defaults, normalise_instance_groups
from forebay.engine.repository.spec_reader import spec_from_config
from forebay.engine.repository.validate import check_load
from forebay.engine.settings import DeviceFraction, GpuSettings, MemorySettings, Settings
from forebay.engine.supervisor import gpus as module
from forebay.engine.supervisor.gpus import device_extra, find_gpus, gpus_of_backend, visible_gpus
from forebay.ipc.errors import InvalidArgument, Unavailable
from forebay.ipc.worker_messages import InstanceSpec

LISTING = "0, GPU-aaaa-1, 8.0\n1, GPU-bbbb-2, 9.0\n2, GPU-cccc-3, 7.5\nno line of a device\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [(0, 8.0), (1, 9.0), (2, 7.5)]),
        ("2,0", [(0, 7.5), (1, 8.0)]),
        ("GPU-bbbb", [(0, 9.0)]),
        ("1,9,0", [(0, 9.0)]),
        ("", []),
        ("-1", []),
        ("MIG-0123,MIG-4567", [(0, 8.0)]),
    ],
)
def test_devices_are_numbered_as_cuda_does(visible: str | None, expected: list[tuple[int, float]]) -> None:
    """CUDA_VISIBLE_DEVICES hides, orders and renumbers; the first entry that is no device ends the list."""
    found = visible_gpus(LISTING, visible)
    assert [(gpu.device_id, gpu.compute_capability) for gpu in found] == expected
    assert all(gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in found)


def test_a_machine_without_device_files_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(os, "listdir", lambda _path: ["null", "nvidiactl"])
    assert find_gpus(run_query=fail) == ()
    monkeypatch.setattr(os, "listdir", lambda _path: ["nvidia3"])
    assert find_gpus(cpu_only=True, run_query=fail) == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.device_id for gpu in find_gpus(run_query=lambda: LISTING)] == [0, 1, 2]


def placed(groups: str, *, gpus: str | None = None, least: float = 6.0, backend: str = "tensorrt") -> list[str]:
    """Return ``<name> <kind> <device>`` of every instance."""
    platform = "tensorrt_plan" if backend == "tensorrt" else ""
    config = parse_config_json(
        f'{{"name": "m", "backend": "{backend}", "platform": "{platform}", '
        f'"input": [{{"name": "x", "data_type": "TYPE_FP32", "dims": [1]}}], '
        f'"output": [{{"name": "y", "data_type": "TYPE_FP32", "dims": [1]}}], "instance_group": {groups}}}'
    )
    normalise_defaults(config)
    usable = gpus_of_backend(visible_gpus(LISTING, gpus), config)
    normalise_instance_groups(config, usable, min_compute_capability=least)
    check_load(config, usable, min_compute_capability=least)
    return [f"{each.name} {each.kind} {each.device_id}" for each in spec_from_config(config).instances]


def test_instances_go_to_every_gpu_that_is_named_or_to_all() -> None:
    """C-093, C-094: ``count`` is per GPU."""
    assert placed('[{"kind": "KIND_GPU", "count": 2, "gpus": [0, 2]}]') == [
        "m_0_0 GPU 0",
        "m_0_0 GPU 2",
        "m_0_1 GPU 0",
        "m_0_1 GPU 2",
    ]
    assert placed('[{"kind": "KIND_GPU"}]') == ["m_0_0 GPU 0", "m_0_0 GPU 1", "m_0_0 GPU 2"]
    assert placed('[{"kind": "KIND_GPU"}]', least=8.0) == ["m_0_0 GPU 0", "m_0_0 GPU 1"]
    assert placed('[{"kind": "KIND_MODEL", "count": 2}]') == ["m_0_0 MODEL 0", "m_0_1 MODEL 0"]


def test_auto_takes_gpus_where_the_backend_has_some() -> None:
    """C-092."""
    assert placed('[{"kind": "KIND_AUTO"}]', gpus="1") == ["m_0_0 GPU 0"]
    assert placed('[{"kind": "KIND_AUTO"}]', backend="identity") == ["m_0_0 CPU 0"]


def test_gpus_that_are_not_there_are_refused() -> None:
    """C-094."""
    with pytest.raises(InvalidArgument, match="specifies invalid or unsupported gpu id 3"):
        placed('[{"kind": "KIND_GPU", "gpus": [3]}]')
    with pytest.raises(InvalidArgument, match="specifies invalid or unsupported gpu id 2"):
        placed('[{"kind": "KIND_GPU", "gpus": [2]}]', least=8.0)
    with pytest.raises(InvalidArgument, match="has kind KIND_GPU but no GPUs are available"):
        placed('[{"kind": "KIND_GPU"}]', gpus="")


def test_a_framework_without_its_gpu_build_has_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.machinery.ModuleSpec("onnxruntime", None)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: found)
    config = parse_config_json('{"name": "m", "backend": "onnxruntime"}')
    all_gpus = visible_gpus(LISTING, None)
    assert gpus_of_backend(all_gpus, config) == ()
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    assert gpus_of_backend(all_gpus, config) == all_gpus


def test_workers_on_a_gpu_are_told_its_limits() -> None:
    """F-150, F-156."""
    settings = Settings(
        gpu=GpuSettings(model_load_limits=(DeviceFraction(1, 0.5),)), memory=MemorySettings(pinned_pool_byte_size=7)
    )
    assert device_extra(settings, "GPU", 0) == {PINNED_KEY: 7}
    assert device_extra(settings, "GPU", 1) == {PINNED_KEY: 7, LIMIT_KEY: 0.5}
    assert device_extra(settings, "CPU", 0) == {}


def test_no_model_is_loaded_on_a_gpu_that_is_too_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """F-156; the host plays the GPU."""
    monkeypatch.setenv(PLAYED_GPUS_VARIABLE, "2")

    def instance(limit: float, kind: str = "GPU") -> InstanceSpec:
        return InstanceSpec(
            model="m", version=1, route=1, instance=1, instance_name="m_0_0", backend="identity", model_path="",
            version_path="", model_file="", kind=kind, device_id=1, extra={LIMIT_KEY: limit},
        )  # fmt: skip

    check_memory_limit(instance(1.0))
    check_memory_limit(instance(0.0, kind="CPU"))
    text = "can not create model 'm_0_0': memory limit set for GPU 1 has exceeded, model loading is rejected."
    with pytest.raises(Unavailable) as raised:
        check_memory_limit(instance(0.0))
    assert raised.value.text == text
