"""A server on a GPU as a whole: sharing it, giving its memory back. The host plays the GPU where that can be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient
from device_models import add_chain, add_doubler
from forebay_server import ForebayServer

from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]

#: Of an input; blocks of this size are given back to the kernel where no GPU may know their pages.
LARGE_BYTES = 72 << 20

#: What a driver may keep of a process's memory for a while, bytes.
TOLERANCE_BYTES = 64 << 20


@contextmanager
def serving(root: Path, kind: str, *flags: str) -> Iterator[ForebayServer]:
    environment = {PLAYED_GPUS_VARIABLE: "1"} if kind == "host" else {}
    with ForebayServer(root, *flags, environment=environment) as server:
        yield server


def workers(server: ForebayServer) -> set[int]:
    return {pid for role, pid in server.pids().items() if role.startswith("worker ")}


def infer_side_by_side(server: ForebayServer, model: str, count: int) -> None:
    """Send requests at the same time and check every answer."""
    with httpclient.InferenceServerClient(server.http_url, concurrency=count) as client:
        sent: list[tuple[int, Any]] = []
        for number in range(count):
            tensor = httpclient.InferInput("X", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.full((1, 4), number, np.float32))
            sent.append((number, client.async_infer(model, [tensor])))
        for number, request in sent:
            np.testing.assert_array_equal(request.get_result().as_numpy("Y"), np.full((1, 4), 2 * number))


@pytest.mark.parametrize("kind", KINDS)
def test_only_workers_have_the_driver_mapped(tmp_path: Path, kind: str) -> None:
    """Issue 8, 1: neither frontends nor scheduler, also while steps of an ensemble pass tensors on the GPU."""
    add_doubler(tmp_path, "gpu", "KIND_GPU")
    add_chain(tmp_path, "chain")
    with serving(tmp_path, kind) as server:
        server.wait_for(lambda: server.pid_of("worker courier") != 0, "the courier")
        infer_side_by_side(server, "gpu", 4)
        others = {role: pid for role, pid in server.pids().items() if not role.startswith(("worker ", "zygote"))}
        assert {role.split()[0] for role in others} >= {"http", "scheduler"}
        for role, pid in others.items():
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert not re.search(r"libcuda\.|libcudart|/cupy", maps), role


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_process", [1, 2])
def test_instances_on_one_gpu_share_processes_as_told(tmp_path: Path, kind: str, per_process: int) -> None:
    add_doubler(tmp_path, "gpu", "KIND_GPU", count=2)
    with serving(tmp_path, kind, f"--instances-per-process={per_process}") as server:
        assert len(workers(server)) == 2 // per_process
        for _ in range(5):
            infer_side_by_side(server, "gpu", 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_gpu_takes_no_model(tmp_path: Path, kind: str) -> None:
    """F-156."""
    add_doubler(tmp_path, "gpu", "KIND_GPU")
    with serving(tmp_path, kind, "--model-load-gpu-limit=0:0.0", "--exit-on-error=false") as server:
        status, body = server.post("/v2/repository/index", b"{}")
        assert status == 200
        assert b"memory limit set for GPU 0 has exceeded, model loading is rejected." in body


@pytest.mark.gpu
def test_large_requests_after_one_another(tmp_path: Path) -> None:
    """Their pages are locked for the GPU: when a block is free again it must go on using the same ones."""
    add_large_requests_model(tmp_path)
    with serving(tmp_path, "cuda") as server:
        check_large_requests(server)


def add_large_requests_model(root: Path) -> None:
    add_doubler(root, "gpu", "KIND_GPU", dim=-1)


def check_large_requests(server: ForebayServer) -> None:
    with httpclient.InferenceServerClient(server.http_url) as client:
        for number in (1, 2, 3):
            values = np.full((1, LARGE_BYTES // 4), number, np.float32)
            values[0, -1] = -number
            tensor = httpclient.InferInput("X", list(values.shape), "FP32")
            tensor.set_data_from_numpy(values)
            np.testing.assert_array_equal(client.infer("gpu", [tensor]).as_numpy("Y"), 2 * values)


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_worker_whose_context_is_lost_is_replaced(tmp_path: Path) -> None:
    """Issue 8, 6: an index outside of its table is an assertion on the device; nothing works there afterwards."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    add_lookup(tmp_path, torch)
    before = used_bytes()
    with serving(tmp_path, "cuda") as server:
        assert look_up(server, 2) == (200, [4.0])
        loaded = used_bytes()
        status, _body = look_up(server, 1 << 20)
        assert status >= 500
        # Its request was tried once elsewhere, which was the same instance in a new process.
        server.wait_logged("the CUDA context is poisoned, the worker ends", count=2)
        server.wait_for(lambda: look_up(server, 3) == (200, [6.0]), "answers again")
        wait_used_below(loaded + TOLERANCE_BYTES)
    wait_used_below(before + TOLERANCE_BYTES)


def add_lookup(root: Path, torch: Any) -> None:
    """Add a TorchScript model that looks rows of [0, 2, 4, 6] up."""

    class Lookup(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4, dtype=torch.float32) * 2)

        def forward(self, index: Any) -> Any:
            return self.table[index]

    (root / "lookup" / "1").mkdir(parents=True)
    traced = torch.jit.trace(Lookup(), (torch.zeros(1, 1, dtype=torch.int64),))
    traced.save(str(root / "lookup" / "1" / "model.pt"))
    (root / "lookup" / "config.pbtxt").write_text(
        """
        backend: "pytorch"
        max_batch_size: 8
        input { name: "index__0" data_type: TYPE_INT64 dims: [ 1 ] }
        output { name: "value__0" data_type: TYPE_FP32 dims: [ 1 ] }
        instance_group { kind: KIND_GPU count: 1 }
        """
    )


def look_up(server: ForebayServer, index: int) -> tuple[int, Any]:
    """Return the status, and the value or whatever else the server answered."""
    tensor = {"name": "index__0", "shape": [1, 1], "datatype": "INT64", "data": [index]}
    status, body = server.post("/v2/models/lookup/infer", json.dumps({"inputs": [tensor]}).encode())
    return status, json.loads(body)["outputs"][0]["data"] if status == 200 else body


@pytest.mark.gpu
def test_workers_under_a_daemon_of_our_own_serve(tmp_path: Path) -> None:
    if shutil.which("nvidia-cuda-mps-control") is None:
        pytest.skip("nvidia-cuda-mps-control is not installed")
    add_doubler(tmp_path, "gpu", "KIND_GPU", count=2)
    with serving(tmp_path, "cuda", "--mps=on") as server:
        infer_side_by_side(server, "gpu", 8)


def used_bytes() -> int:
    """Return the first GPU's memory in use, by NVML."""
    nvml = pytest.importorskip("pynvml")
    nvml.nvmlInit()
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        nvml.nvmlShutdown()


def wait_used_below(limit_bytes: int) -> None:
    end_s = time.monotonic() + 30
    while used_bytes() > limit_bytes:
        assert time.monotonic() < end_s, f"{used_bytes()} bytes are in use, more than {limit_bytes}"
        time.sleep(0.1)


@pytest.mark.gpu
def test_device_memory_comes_back_from_workers_that_end(tmp_path: Path) -> None:
    """Issue 8, 6; P1: unloading gives everything back, and so does a worker that is killed."""
    add_doubler(tmp_path, "gpu", "KIND_GPU")
    before = used_bytes()
    with serving(tmp_path, "cuda", "--model-control-mode=explicit", "--load-model=gpu") as server:
        infer_side_by_side(server, "gpu", 4)
        loaded = used_bytes()
        assert loaded > before
        [victim] = workers(server)
        os.kill(victim, signal.SIGKILL)
        server.wait_logged("is back")
        infer_side_by_side(server, "gpu", 4)
        wait_used_below(loaded + TOLERANCE_BYTES)
        assert server.post("/v2/repository/models/gpu/unload", b"{}")[0] == 200
        server.wait_for(lambda: not workers(server), "the worker to end")
        wait_used_below(before + TOLERANCE_BYTES)
