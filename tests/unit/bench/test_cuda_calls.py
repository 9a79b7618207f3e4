"""Counting what processes ask of CUDA, as far as that goes without CUDA."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cuda_calls
from bench.cuda_calls import CALLS, CannotCount, build_counter, find_cupti, read_calls

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


def test_counts_of_all_processes_are_added_up(tmp_path: Path) -> None:
    for pid in (17, 18):
        (tmp_path / str(pid)).write_bytes(struct.pack(f"<{len(CALLS)}Q", *range(pid, pid + len(CALLS))))
    (tmp_path / "cuda_calls.so").write_bytes(b"not counts")
    assert read_calls(tmp_path) == {call: 17 + 18 + 2 * index for index, call in enumerate(CALLS)}


def test_without_processes_there_were_no_calls(tmp_path: Path) -> None:
    assert set(read_calls(tmp_path).values()) == {0}


def test_without_cupti_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_calls.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CannotCount, match="pip install nvidia-cuda-cupti"):
        find_cupti()
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcupti.so.13").write_bytes(b"")
    assert find_cupti().name == "libcupti.so.13"


@needs_compiler
def test_without_cuda_the_process_goes_on_uncounted(tmp_path: Path) -> None:
    """CUDA calls this in every process; in one where CUPTI cannot be used it must do no harm."""
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).InitializeInjection())"
    environment = {**os.environ, "BENCH_CUPTI": str(tmp_path / "none"), "BENCH_CUDA_CALLS": str(tmp_path)}
    command = [sys.executable, "-c", code, str(build_counter(tmp_path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert "nothing is counted" in done.stderr
    assert set(read_calls(tmp_path).values()) == {0}
