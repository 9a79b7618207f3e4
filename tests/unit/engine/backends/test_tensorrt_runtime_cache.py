"""What TensorRT-RTX compiles at run time is kept, with a library that stands in for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.engine.backends.tensorrt_runtime_cache import RuntimeCache
from forebay.ipc.worker_messages import InstanceSpec

TRT: Any = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7")


class Config:
    """An IRuntimeConfig whose caches take what begins as this machine's."""

    def __init__(self, machine: bytes = b"gpu") -> None:
        self.machine = machine
        self.cache: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        return Cache(self.machine)

    def set_runtime_cache(self, cache: Cache) -> None:
        self.cache = cache


class Cache:
    def __init__(self, machine: bytes) -> None:
        self.machine = machine
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.machine):
            return False
        self.kernels = blob.removeprefix(self.machine)
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.machine + self.kernels)


def make_spec(directory: Path) -> InstanceSpec:
    return InstanceSpec(
        model="m", version=1, route=1, instance=1, instance_name="m_0", backend="tensorrt", model_path="",
        version_path="", model_file="", backend_config={"plan-cache-directory": str(directory)},
    )  # fmt: skip


def files(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.iterdir())]


def test_kernels_are_there_the_next_time(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    first = Config()
    cache = RuntimeCache(TRT, make_spec(directory), first, b"plan", "H100")
    assert first.cache is not None
    first.cache.kernels = b"compiled"
    cache.save()
    cache.save()
    second = Config()
    RuntimeCache(TRT, make_spec(directory), second, b"plan", "H100")
    assert second.cache is not None
    assert second.cache.kernels == b"compiled"
    other = Config()
    RuntimeCache(TRT, make_spec(directory), other, b"another plan", "H100")
    assert other.cache is not None
    assert other.cache.kernels == b""
    assert files(directory) == [b"gpucompiled"]


def test_kernels_of_another_machine_are_made_anew(tmp_path: Path) -> None:
    RuntimeCache(TRT, make_spec(tmp_path), Config(b"old"), b"plan", "H100").save()
    config = Config(b"new")
    cache = RuntimeCache(TRT, make_spec(tmp_path), config, b"plan", "H100")
    assert config.cache is not None
    assert config.cache.kernels == b""
    cache.save()
    assert files(tmp_path) == [b"new"]


def test_a_directory_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    RuntimeCache(TRT, make_spec(blocked / "below"), Config(), b"plan", "H100").save()


@pytest.mark.parametrize(
    "name",
    ["create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy", "set_execution_context_allocation_strategy"],
)
def test_the_real_library_has_what_is_used(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(trt.IRuntimeConfig, name)
    assert hasattr(trt.IRuntimeCache, "serialize")
    assert hasattr(trt.IRuntimeCache, "deserialize")
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
