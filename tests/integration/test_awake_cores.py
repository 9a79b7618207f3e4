"""``--cpu-wakeup-latency-us``: the kernel is asked to keep cores awake while requests come, and no longer."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from forebay_server import CONF_MODELS, ForebayServer
from http_models import write_identity
from http_wire import infer

DEVICE = "/dev/cpu_dma_latency"
INPUT = {"name": "INPUT0", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
LONE_REQUEST = infer("alpha_model", [("features", "FP32", (1, 50), bytes(200))])
REQUEST = json.dumps({"inputs": [INPUT]}).encode()

needs_device = pytest.mark.skipif(not os.access(DEVICE, os.W_OK), reason=f"may not write to {DEVICE}")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_identity(tmp_path, "m", [("TYPE_FP32", "4")], batch=8)
    return tmp_path


@pytest.fixture
def undelayed(tmp_path: Path) -> Path:
    """A model without a delay, for which a lone client's request would have to wait: its worker is lent."""
    shutil.copytree(CONF_MODELS / "alpha_model", tmp_path / "alpha_model")
    config = tmp_path / "alpha_model" / "config.pbtxt"
    config.write_text(config.read_text().partition("instance_group")[0])
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
@pytest.mark.parametrize("flag", ["--share-cores=false", "--cpu-wakeup-latency-us=1000000"])
def test_who_does_not_want_that_can_say_so(undelayed: Path, flag: str) -> None:
    with (
        ForebayServer(undelayed, flag) as server,
        socket.create_connection(("127.0.0.1", server.http_port)) as client,
        open(DEVICE, "rb") as device,
    ):
        for _ in range(3000):
            client.sendall(LONE_REQUEST)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            (latency_us,) = struct.unpack("=i", os.pread(device.fileno(), 4, 0))
            assert latency_us != 0


@needs_device
def test_wish_is_the_kernels_own(repository: Path) -> None:
    with ForebayServer(repository, "--cpu-wakeup-latency-us=7") as server, open(DEVICE, "rb") as device:
        assert server.post("/v2/models/m/infer", REQUEST)[0] == 200
        (latency_us,) = struct.unpack("=i", device.read(4))
        assert latency_us <= 7  # Others may wish for less.


@needs_device
@pytest.mark.skipif(not 2 <= (os.cpu_count() or 1) <= 4, reason="more cores than are kept awake for one client, or one")
def test_cores_are_kept_awake_for_a_lone_client_and_no_longer(undelayed: Path) -> None:
    """At least for as long as it takes to find out what that is worth."""
    with ForebayServer(undelayed) as server, socket.create_connection(("127.0.0.1", server.http_port)) as client:
        frontend = server.pid_of("http")

        def ask() -> bool:
            for _ in range(100):  # At once: a client that takes its time is not worth it.
                client.sendall(LONE_REQUEST)
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            return _asks_the_kernel(frontend)

        server.wait_for(ask, "cores to be kept awake")
        server.wait_for(lambda: not _asks_the_kernel(frontend), "cores may sleep again")


def test_server_that_may_not_ask_does_not_start(repository: Path) -> None:
    program = (
        "import sys; from forebay.engine.main import main; from forebay.ipc import wakeup_latency;"
        " wakeup_latency._DEVICE = '/dev/absent'; sys.exit(main())"
    )
    flags = ["serve", "--model-repository", str(repository), "--cpu-wakeup-latency-us=0", "--http-port=0"]
    run = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "creating server: Unavailable - --cpu-wakeup-latency-us needs to write to /dev/absent" in run.stderr
