"""Count what a server's processes ask of CUDA: waits for a whole context or a stream, copies, allocations, launches.

``counted`` builds ``cuda_calls.c`` and returns what must stand in the server's environment; ``read_calls`` adds up the
counts of all its processes. Needs a C compiler and CUPTI, which comes with the CUDA toolkit, with PyTorch, or as
``pip install nvidia-cuda-cupti``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "cuda_calls.c"

#: In the order of cuda_calls.c.
CALLS = (
    "waits for a context",
    "waits for a stream",
    "copies",
    "copies that wait",
    "allocations",
    "frees",
    "launches",
)

_COUNTS = struct.Struct(f"<{len(CALLS)}Q")


class CannotCount(Exception):
    """Something that counting needs is missing; the text says what."""


def find_cupti() -> Path:
    """Return CUPTI's library.

    Raises:
        CannotCount: there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec is not None else ())]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    patterns = [(folder, "*/lib/libcupti.so.*") for folder in folders]
    patterns += [(toolkit, "lib64/libcupti.so*"), (toolkit, "extras/CUPTI/lib64/libcupti.so*")]
    found = [path for folder, pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        raise CannotCount("no libcupti.so: pip install nvidia-cuda-cupti")
    return found[0]


def build_counter(folder: Path) -> Path:
    """Compile the library that counts.

    Raises:
        CannotCount: there is no C compiler, or it failed.
    """
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise CannotCount("no C compiler: apt-get install gcc libc6-dev, or set CC")
    library = folder / "cuda_calls.so"
    command = [compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotCount(f"{' '.join(command)} failed:\n{done.stderr}")
    return library


def counted(folder: Path) -> dict[str, str]:
    """Return the environment of processes whose calls shall be counted in files below ``folder``.

    Raises:
        CannotCount: see :func:`find_cupti` and :func:`build_counter`.
    """
    cupti = find_cupti()
    return {
        "CUDA_INJECTION64_PATH": str(build_counter(folder)),
        "BENCH_CUPTI": str(cupti),
        "BENCH_CUDA_CALLS": str(folder),
    }


def read_calls(folder: Path) -> dict[str, int]:
    """Return how often each call was made so far, by all processes together."""
    counts = [_COUNTS.unpack(path.read_bytes()) for path in folder.iterdir() if path.name.isdigit()]
    return dict(zip(CALLS, map(sum, zip(*counts, strict=True)), strict=True)) if counts else dict.fromkeys(CALLS, 0)
