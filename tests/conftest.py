"""Fixtures and rules that hold for all tests."""

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest

from forebay.engine.devices.opening import has_gpu_files, played_gpu_count
from forebay.ipc.log import LogOptions, log


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what a machine cannot run, saying so, rather than fail it: CI has PyTorch, a small checkout need not."""
    has_torch = importlib.util.find_spec("torch") is not None
    for item in items:
        if item.get_closest_marker("torch") and not has_torch:
            item.add_marker(pytest.mark.skip(reason="PyTorch is not installed: pip install 'forebay[torch]'"))
        if item.get_closest_marker("gpu") and not has_cuda_device():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def has_cuda_device() -> bool:
    """Whether the driver shows any GPU; a container may have any one of a machine's."""
    return not played_gpu_count() and has_gpu_files()


@pytest.fixture(autouse=True)
def _default_log() -> Iterator[None]:
    """What one test sets for the process's log is not the next one's."""
    yield
    log.configure(LogOptions())
    log.interrupting = contextlib.nullcontext
