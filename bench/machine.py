"""Say on what a measurement was made, and keep its figures as data."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY_ROOT = Path(__file__).parent.parent
RESULTS_FOLDER = Path(__file__).parent / "results"
PACKAGES = ("numpy", "onnxruntime", "pyzmq", "uvloop", "httptools")


def describe_machine() -> dict[str, Any]:
    """Return date, commit, processor, cores, memory, kernel and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": " ".join(["python", "-m", *_module_and_arguments()]),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the line that stands above any figures."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['date']}, commit {machine['commit']}; {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}; Python {machine['python']}, {versions}"
    )


def save_results(name: str, machine: dict[str, Any], figures: Any, path: Path | None = None) -> Path:
    """Write figures with the machine they belong to; by default to ``bench/results/<name>-<date>-<commit>.json``."""
    if path is None:
        path = RESULTS_FOLDER / f"{name}-{machine['date'][:10]}-{machine['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    return path


def _commit() -> str:
    """Return the short commit, with ``-dirty`` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=REPOSITORY_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    """Return the processor's name as the kernel knows it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _module_and_arguments() -> list[str]:
    """Return what followed ``python -m``."""
    return [f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
