"""``--cpu-wakeup-latency-us``: the kernel is asked to keep cores awake while requests come, and no longer."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from forebay_server import ForebayServer
from http_models import write_identity

DEVICE = "/dev/cpu_dma_latency"
INPUT = {"name": "INPUT0", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
REQUEST = json.dumps({"inputs": [INPUT]}).encode()

needs_device = pytest.mark.skipif(not os.access(DEVICE, os.W_OK), reason=f"may not write to {DEVICE}")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_identity(tmp_path, "m", [("TYPE_FP32", "4")], batch=8)
    return tmp_path


def _asks_the_kernel(pid: int) -> bool:
    descriptors = f"/proc/{pid}/fd"
    return DEVICE in (os.path.realpath(f"{descriptors}/{fd}") for fd in os.listdir(descriptors))


@needs_device
def test_cores_are_kept_awake_while_requests_come(repository: Path) -> None:
    with ForebayServer(repository, "--cpu-wakeup-latency-us=0") as server:
        frontend = server.pid_of("http")
        assert not _asks_the_kernel(frontend)
        assert server.post("/v2/models/m/infer", REQUEST)[0] == 200
        assert _asks_the_kernel(frontend)
        server.wait_for(lambda: not _asks_the_kernel(frontend), "cores may sleep again")


@needs_device
def test_wish_is_the_kernels_own(repository: Path) -> None:
    with ForebayServer(repository, "--cpu-wakeup-latency-us=7") as server, open(DEVICE, "rb") as device:
        assert server.post("/v2/models/m/infer", REQUEST)[0] == 200
        (latency_us,) = struct.unpack("=i", device.read(4))
        assert latency_us <= 7  # Others may wish for less.


def test_server_that_may_not_ask_does_not_start(repository: Path) -> None:
    program = (
        "import sys; from forebay.engine.main import main; from forebay.ipc import wakeup_latency;"
        " wakeup_latency._DEVICE = '/dev/absent'; sys.exit(main())"
    )
    flags = ["serve", "--model-repository", str(repository), "--cpu-wakeup-latency-us=0", "--http-port=0"]
    run = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "creating server: Unavailable - --cpu-wakeup-latency-us needs to write to /dev/absent" in run.stderr
