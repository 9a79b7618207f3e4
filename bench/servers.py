"""Start and stop the servers that are measured: forebay from this checkout, and a real Triton beside it."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from bench.machine import REPOSITORY_ROOT
from bench.processes import MARK, ProcessGroup

EXAMPLE_REPOSITORY = REPOSITORY_ROOT / "conf" / "models"
PEER_FOLDER = REPOSITORY_ROOT / ".cache" / "peer_triton"
PEER_SCRIPT = REPOSITORY_ROOT / "bench" / "peer_triton.sh"
PEER_MODEL = REPOSITORY_ROOT / "bench" / "triton_python_model.py"

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


class ServerFailed(Exception):
    """A server ended before it was ready, or was not ready in time; the text holds the end of its log."""


class Server:
    """One running server; a context manager that waits until it is ready and stops it at the end.

    Attributes:
        name: what the tables call it.
        http_port: where it answers on 127.0.0.1.
        metrics_port: where its metrics are; 0 if it has none.
        processes: all its processes.
        ready_s: seconds from its start until it first said that it is ready.
    """

    def __init__(self, name: str, command: Sequence[str], http_port: int, metrics_port: int = 0) -> None:
        self.name = name
        self.http_port = http_port
        self.metrics_port = metrics_port
        self.ready_s = 0.0
        self._command = list(command)
        self._log = tempfile.NamedTemporaryFile(prefix=f"bench-{name}-", suffix=".log")  # noqa: SIM115 closed in __exit__

    def prefix_command(self, prefix: Sequence[str]) -> None:
        """Have the server started by another program, such as a profiler."""
        self._command = [*prefix, *self._command]

    def __enter__(self) -> Self:
        mark = uuid.uuid4().hex
        started = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY_ROOT,
            env=os.environ | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes = ProcessGroup(self._process.pid, mark)
        try:
            self._wait_ready(started + START_TIMEOUT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.ready_s = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.processes.usage()  # so that processes whose parent goes first are still known as ours
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM and is killed", file=sys.stderr)
        for pid in self.processes.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        self._log.close()

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of what the server has written."""
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-lines:])

    def _wait_ready(self, deadline: float) -> None:
        while True:
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.name} ended with {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} was not ready in {START_TIMEOUT_S:.0f} s:\n{self.log_tail()}")
            if _is_ready(self.http_port):
                return
            time.sleep(0.005)


def forebay(repository: Path, *flags: str, name: str = "forebay") -> Server:
    """Return forebay of this checkout, not yet started, serving a repository on free ports."""
    http_port, metrics_port = free_ports(2)
    command = [sys.executable, "-P", "-m", "forebay.engine.main", "serve", f"--model-repository={repository}"]
    command += ["--http-address=127.0.0.1", f"--http-port={http_port}", "--allow-grpc=false"]
    command += ["--metrics-address=127.0.0.1", f"--metrics-port={metrics_port}"]
    return Server(name, [*command, *flags], http_port, metrics_port)


def triton(repository: Path, *flags: str, folder: Path = PEER_FOLDER) -> Server:
    """Return a real Triton, not yet started, serving a repository on free ports.

    Raises:
        ServerFailed: it is not installed.
    """
    if not (folder / "backends").exists():
        raise ServerFailed(f"no Triton in {folder}; install one with: bench/peer_triton.sh install {folder}")
    http_port, metrics_port = free_ports(2)
    command = [str(PEER_SCRIPT), "serve", str(folder), str(repository), str(http_port), str(metrics_port)]
    return Server("triton", [*command, *flags], http_port, metrics_port)


@contextmanager
def alpha_repository(
    backend: Literal["onnxruntime", "python"],
    *,
    delay_us: int = 0,
    instances: int = 2,
    copies: int = 1,
) -> Generator[Path, None, None]:
    """Make a repository with version 2 of ``alpha_model``, with another queue delay and number of instances.

    Args:
        backend: ``onnxruntime``, or ``python`` for the same file run by Triton's Python backend.
        copies: with more than one, the models are called ``alpha_model_000``, ``alpha_model_001``, ...
    """
    config = (EXAMPLE_REPOSITORY / "alpha_model" / "config.pbtxt").read_text()
    config = _replace(r'backend: "\w+"', f'backend: "{backend}"', config)
    config = _replace(r"max_queue_delay_microseconds: \d+", f"max_queue_delay_microseconds: {delay_us}", config)
    config = _replace(r"count: \d+", f"count: {instances}", config)
    config = _replace(r"all \{ \}", "specific { versions: 2 }", config)
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        for number in range(copies):
            name = "alpha_model" if copies == 1 else f"alpha_model_{number:03}"
            version = Path(folder) / name / "2"
            version.mkdir(parents=True)
            shutil.copy(EXAMPLE_REPOSITORY / "alpha_model" / "2" / "model.onnx", version)
            if backend == "python":
                shutil.copy(PEER_MODEL, version / "model.py")
            (version.parent / "config.pbtxt").write_text(_replace('name: "alpha_model"', f'name: "{name}"', config))
        yield Path(folder)


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports: list[int] = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def _replace(pattern: str, replacement: str, text: str) -> str:
    """Replace the one place that a pattern matches."""
    changed, count = re.subn(pattern, replacement, text)
    if count != 1:
        raise ValueError(f"{pattern!r} is {count} times in the example config.pbtxt, not once")
    return changed


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
