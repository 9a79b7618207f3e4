"""Only workers open CUDA: nothing that the other processes import brings it along (issue 8, 1)."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Packages that open CUDA, or may.
PACKAGES = (
    *("cupy", "cupy_backends", "cuda", "torch", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "onnxruntime"),
    "forebay.engine.devices.cuda_device",
)

SHOW = """
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(*({packages!r} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "modules",
    [
        ("forebay.frontend.http_main", "forebay.frontend.grpc_main", "forebay.frontend.courier_inference"),
        ("forebay.frontend.metrics_main", "forebay.frontend.gpu_metrics"),
        ("forebay.engine.scheduler.loop",),
        ("forebay.engine.supervisor.supervisor",),
        ("forebay.client.shm", "forebay.client.device"),
    ],
    ids=["frontends", "metrics", "scheduler", "supervisor", "clients"],
)
def test_processes_without_models_import_nothing_of_cuda(modules: tuple[str, ...]) -> None:
    code = SHOW.format(modules=modules, packages=set(PACKAGES))
    shown = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == []
