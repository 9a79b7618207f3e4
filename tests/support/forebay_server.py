"""A real server for tests: ``python -m forebay.engine.main serve`` on free ports, with everything it prints in files.

with ForebayServer(repository) as server:
    requests.get(f"http://127.0.0.1:{server.http_port}/v2/health/ready")
    os.kill(server.pid_of("scheduler"), signal.SIGKILL)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

#: How long anything may take that a test waits for, s; a watchdog, not a speed limit.
PATIENCE_S = 60.0

CONF_MODELS = Path(__file__).resolve().parents[2] / "conf" / "models"

_STARTED = re.compile(
    r"Started ((?:Sagemaker |Vertex AI )?HTTPService|GRPCInferenceService|Metrics Service) at \S+:(\d+)"
)


class ServerEnded(AssertionError):
    """The server exited while a test waited for something else."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Poll ``condition`` until it holds; fail naming ``what`` if it never does."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.02)


class ForebayServer:
    """One server process tree. Started by ``start`` or as a context manager, which also ends it."""

    def __init__(
        self,
        repository: Path | str = CONF_MODELS,
        *arguments: str,
        environment: dict[str, str] | None = None,
        protocols: Sequence[str] = ("http", "metrics"),
        http_port: int = 0,
        settings: dict[str, dict[str, object]] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            arguments: further flags of ``forebay serve``.
            environment: added to ours.
            settings: fields of settings groups that no flag gives, as ``{"repository": {"control_mode": "poll"}}``.
            protocols: of ``http``, ``grpc`` and ``metrics``; the others are switched off.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="fb-", dir="/tmp"))
        # Also of servers that a test only launches, and without the context manager.
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.runtime_base = self.directory / "run"
        self._out = self.directory / "out.txt"
        self._err = self.directory / "err.txt"
        self._environment = {**os.environ, "FOREBAY_RUNTIME_DIRECTORY": str(self.runtime_base), **(environment or {})}
        self._protocols = tuple(protocols)
        switches = [f"--allow-{name}={str(name in protocols).lower()}" for name in ("http", "grpc", "metrics")]
        # A port may be given only where the endpoint is on.
        ports = [f"--{name}-port={http_port if name == 'http' else 0}" for name in protocols]
        program = ["-m", "forebay.engine.main"]
        if settings is not None:
            program = [str(Path(__file__).with_name("serve_with_settings.py")), json.dumps(settings)]
        self._command = [
            *(sys.executable, "-P", *program, "serve"),
            *("--model-repository", str(repository), "--http-address", "127.0.0.1"),
            *(switches + ports + list(arguments)),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        #: What it printed in all, once it has ended and its directory is gone.
        self._printed = ("", "")

    # --- life ---

    def launch(self) -> None:
        """Start the process; return at once."""
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self._environment, cwd="/"
            )

    def start(self) -> Self:
        """Start and wait until it serves."""
        self.launch()
        self.wait_serving()
        return self

    def wait_serving(self) -> None:
        """Wait until every endpoint listens."""
        self.wait_for(lambda: len(self.ports()) >= len(self._protocols), "the server to start")
        if "metrics" in self._protocols:
            # It starts last, when the server serves already; tests that count processes want it to be there.
            self.wait_for(lambda: self.pid_of("metrics") != 0, "the metrics process")

    def stop(self, timeout_s: float = PATIENCE_S) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(f"--- stdout of the server\n{self.stdout}\n--- stderr of the server\n{self.stderr}\n")
        self._end()

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop(15.0)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        self._printed = (self.stdout, self.stderr)
        self._finalizer()

    # --- looking ---

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace") if self._out.exists() else self._printed[0]

    @property
    def stderr(self) -> str:
        """Everything logged so far."""
        return self._err.read_text(errors="replace") if self._err.exists() else self._printed[1]

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for a condition as long as the server lives."""

        def holds() -> bool:
            if condition():
                return True
            if self.process.poll() is not None:
                raise ServerEnded(f"the server exited with {self.process.returncode}:\n{self.stdout}\n{self.stderr}")
            return False

        wait_until(holds, what, timeout_s)

    def wait_logged(self, text: str, *, count: int = 1) -> None:
        """Wait until ``text`` stands in the log at least ``count`` times."""
        self.wait_for(lambda: self.stderr.count(text) >= count, f"'{text}' in the log")

    def wait_ready(self, model: str) -> None:
        """Wait until the HTTP frontend takes requests to a model: it hears of a new worker after the log does."""
        self.wait_for(lambda: self.get(f"/v2/models/{model}/ready")[0] == 200, f"'{model}' to be ready")

    def ports(self) -> dict[str, int]:
        """Return service name to port, as logged."""
        return {service: int(port) for service, port in _STARTED.findall(self.stderr)}

    @property
    def http_port(self) -> int:
        return self.ports()["HTTPService"]

    @property
    def metrics_port(self) -> int:
        return self.ports()["Metrics Service"]

    @property
    def http_url(self) -> str:
        """Host and port, without a scheme, as tritonclient wants it."""
        return f"127.0.0.1:{self.http_port}"

    def pids(self) -> dict[str, int]:
        """Return the running processes by role: ``scheduler``, ``http 1``, ``worker alpha_model:1 alpha_model_0_0``."""
        return {role: pid for pid, role in roles_below(self.pid).items()}

    def pid_of(self, role: str) -> int:
        """Return the process whose role begins with ``role``; 0 if there is none at the moment."""
        return next((pid for name, pid in sorted(self.pids().items()) if name.startswith(role)), 0)

    def metrics(self) -> str:
        """Return the metrics page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=PATIENCE_S) as reply:
            return str(reply.read().decode())

    def counter(self, family: str, **labels: str) -> int:
        """Return a metric with at least these labels; 0: there is no such series."""
        for line in self.metrics().splitlines():
            shown = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if line.startswith(f"{family}{{") and labels.items() <= shown.items():
                return int(line.rpartition(" ")[2])
        return 0

    def get(self, path: str) -> tuple[int, bytes]:
        """GET from the HTTP endpoint; return status and body."""
        try:
            with urllib.request.urlopen(f"http://{self.http_url}{path}", timeout=PATIENCE_S) as reply:
                return int(reply.status), bytes(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def post(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """POST to the HTTP endpoint; return status and body."""
        request = urllib.request.Request(
            f"http://{self.http_url}{path}", data=body, headers=headers or {}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                return int(reply.status), bytes(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def roles_below(root: int) -> dict[int, str]:
    """Return pid to role of a process and everything below it, by the names shown in ps."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                text = Path(f"/proc/{name}/stat").read_text(errors="replace")
                state, parent = text.rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(name)] = int(parent)
    below = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        if not more:
            break
        below |= more
    roles: dict[int, str] = {}
    for pid in below & set(parents):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            roles[pid] = title.removeprefix("forebay: ")
    return roles


def is_running(pid: int) -> bool:
    """True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
