"""Send the same requests to a real Triton and to this server, and show where their answers differ.

    bench/peer_triton.sh install                                        # once: Triton 2.51 from PyPI, CPU only
    python -P tests/support/compare_with_triton.py [--groups inputs,traces] [--triton .cache/peer_triton]
    python -P tests/support/compare_with_triton.py --answers FILE       # keeps Triton's answers there, or uses them

Status, headers (names, values and order) and body are compared byte for byte, but for what differs from run to run. It
is a tool for whoever changes the protocol, not a test: several differences are there on purpose, see
``docs/compatibility.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from forebay_server import ForebayServer
from http_wire import Ended, WireClient
from triton_probes import GROUPS
from triton_probes.models import make_repository
from triton_probes.probe import Probe

ROOT = Path(__file__).resolve().parents[2]

#: Of both servers.
FLAGS = (
    *("--model-control-mode=explicit", "--load-model=*", "--exit-on-error=false", "--strict-readiness=false"),
    *(
        "--cache-config=local,size=1048576",
        "--http-restricted-api=logging:lk=lv",
        "--http-header-forward-pattern=X-Fwd.*",
    ),
    *("--trace-config=mode=triton", "--trace-config=level=OFF", "--trace-config=rate=1"),
)
#: A region for the shared-memory probes: name in /dev/shm, bytes.
REGION, REGION_BYTES = "triton_probe", 64
#: A probe that is not answered in this time is recorded so.
ANSWER_S = 10.0

#: What differs from run to run, and the names that belong to a place.
_VOLATILE = (
    (re.compile(rb'("(?:ns|last_inference)"):\d+'), rb"\1:0"),
    (re.compile(rb'"version":"[0-9.]+","extensions'), b'"version":"","extensions'),
    (re.compile(rb'("trace_file":")[^"]*/'), rb"\1"),
    (re.compile(rb"/[^ \"']*/models/"), b""),
    (re.compile(rb"object at 0x[0-9a-f]+"), b"object"),
)


@dataclass(frozen=True)
class Heard:
    """An answer as far as it can be compared."""

    head: str
    body: str

    def __str__(self) -> str:
        return f"{self.head}\n{self.body}"


def hear(port: int, probe: Probe) -> Heard:
    """Send one probe on a connection of its own."""
    try:
        with WireClient(port, timeout_s=ANSWER_S) as wire:
            wire.send(probe.message)
            answer = wire.answer()
    except Ended:
        return Heard("connection closed", "")
    except TimeoutError:
        return Heard("no answer", "")
    except (OSError, ValueError) as error:
        return Heard(f"{type(error).__name__}", "")
    headers = [f"{name}: {value}" for name, value in answer.headers.items() if name != "content-length"]
    body = answer.body
    for pattern, replacement in _VOLATILE:
        body = pattern.sub(replacement, body)
    return Heard("\n".join([str(answer.status), *headers]), body.decode("latin-1"))


class Triton:
    """The peer, started again whenever a probe has killed it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self._folder = folder
        self._repository = repository
        self._process: subprocess.Popen[bytes] | None = None
        self.http_port = self.metrics_port = 0

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.http_port, self.metrics_port = free_ports(2)
        caches = next(self._folder.glob("venv/lib/*/site-packages/pytriton/tritonserver/caches"))
        with open(self._repository.parent / "triton.log", "ab") as out:
            self._process = subprocess.Popen(
                [
                    *(str(ROOT / "bench" / "peer_triton.sh"), "serve", str(self._folder), str(self._repository)),
                    *(str(self.http_port), str(self.metrics_port), *FLAGS, f"--cache-directory={caches}"),
                    f"--trace-config=triton,file={self._repository.parent / 'trace.json'}",
                ],
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        end_s = time.monotonic() + 90
        while not self.is_serving():
            if time.monotonic() > end_s or self._process.poll() is not None:
                raise SystemExit(f"Triton does not start, see {out.name}")
            time.sleep(0.2)

    def is_serving(self) -> bool:
        """Whether somebody listens."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.http_port)) == 0

    def hear(self, probe: Probe) -> Heard:
        """Send a probe; a crash is an answer too."""
        heard = hear(self.metrics_port if probe.metrics else self.http_port, probe)
        if self._process is not None and heard.head in ("connection closed", "ConnectionResetError"):
            time.sleep(0.5)
            if not self.is_serving():
                self.stop()
                self.start()
                return Heard("Triton crashed", "")
        return heard

    def stop(self) -> None:
        """End it with everything that it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


@contextmanager
def shared_region() -> Iterator[None]:
    """Make the memory that the probes register."""
    path = Path("/dev/shm") / REGION
    path.write_bytes(bytes(REGION_BYTES))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def ask_triton(folder: Path, probes: Sequence[Probe]) -> list[Heard]:
    """Return Triton's answers."""
    with tempfile.TemporaryDirectory() as directory, shared_region():
        repository = Path(directory) / "models"
        make_repository(repository)
        triton = Triton(folder, repository)
        try:
            triton.start()
            return [triton.hear(probe) for probe in probes]
        finally:
            triton.stop()


def ask_forebay(probes: Sequence[Probe]) -> list[Heard]:
    """Return our answers."""
    with tempfile.TemporaryDirectory() as directory, shared_region():
        repository = Path(directory) / "models"
        make_repository(repository)
        trace = f"--trace-config=triton,file={directory}/trace.json"
        with ForebayServer(repository, *FLAGS, trace, "--allow-client-shm=true") as server:
            return [hear(server.metrics_port if probe.metrics else server.http_port, probe) for probe in probes]


def read_answers(path: Path) -> dict[str, list[Heard]]:
    """Return kept answers by group."""
    if not path.exists():
        return {}
    kept: dict[str, list[list[str]]] = json.loads(path.read_text())
    return {group: [Heard(*pair) for pair in pairs] for group, pairs in kept.items()}


def main() -> int:
    """Compare; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", type=Path, default=ROOT / ".cache" / "peer_triton")
    parser.add_argument("--groups", default=",".join(group.__name__ for group in GROUPS))
    parser.add_argument("--answers", type=Path, help="file with Triton's answers; what is missing is asked and added")
    options = parser.parse_args()
    kept = read_answers(options.answers) if options.answers is not None else {}
    differing = total = 0
    for group in GROUPS:
        name = group.__name__
        if name not in options.groups.split(","):
            continue
        probes = list(group())
        if len(kept.get(name, [])) != len(probes):
            kept[name] = ask_triton(options.triton.resolve(), probes)
            if options.answers is not None:
                options.answers.write_text(
                    json.dumps({key: [[one.head, one.body] for one in heard] for key, heard in kept.items()}, indent=0)
                )
        for probe, theirs, ours in zip(probes, kept[name], ask_forebay(probes), strict=True):
            total += 1
            if theirs != ours:
                differing += 1
                print(f"\n=== {name}: {probe.what}\n--- Triton {theirs}\n--- forebay {ours}")
    print(f"\n{differing} of {total} answers differ", file=sys.stderr)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
