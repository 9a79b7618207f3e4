"""The program ``forebay``: what it does before a command runs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay.engine import main as main_module
from forebay.engine.settings import Settings


def test_help_ends_quietly_when_nobody_reads_it_to_its_end() -> None:
    """``forebay --help | head``: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        program = subprocess.run(
            [sys.executable, "-P", "-m", "forebay.engine.main", "serve", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert program.stderr == b""


def test_an_interrupt_before_the_server_watches_for_it_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "serve", interrupted)
    assert main_module.main(["serve", "--model-repository", str(tmp_path)]) == 130
    assert capfd.readouterr() == ("", "")


def _run_starved(tmp_path: Path, starve: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """Start a server in a process that ``starve`` was called in; return how it ended and what it printed."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "forebay.engine.main", "serve", "--model-repository", str(tmp_path)],
        env={**os.environ, "FOREBAY_HTTP_PORT": "0", "FOREBAY_GRPC_PORT": "0", "FOREBAY_METRICS_PORT": "0"},
        capture_output=True,
        text=True,
        preexec_fn=starve,
        check=False,
    )


def test_too_few_descriptors_are_one_line(tmp_path: Path) -> None:
    ended = _run_starved(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (18, 18)))
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: creating server: Internal - 18 files may be open at a time (ulimit -n), at least 64 are needed\n"
    )


def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    ended = _run_starved(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)))
    assert ended.returncode == 1
    assert "error: creating server: Internal - Cannot allocate memory" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_without_standard_streams_says_no_more_and_takes_no_socket_for_one(tmp_path: Path) -> None:
    """As some service managers start programs: what is opened next would be standard error."""
    report = tmp_path / "report"
    program = (
        "import os, sys; from forebay.engine import main; "
        f"main.serve = lambda settings: [print('x'), open({str(report)!r}, 'w').write("
        "' '.join(os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)))] and 0; "
        f"sys.exit(main.main(['serve', '--model-repository', {str(tmp_path)!r}]))"
    )
    command = 'exec "$0" -P -c "$1" <&- >&- 2>&-'
    ended = subprocess.run(["bash", "-c", command, sys.executable, program], check=False)
    assert ended.returncode == 0
    assert report.read_text() == "/dev/null /dev/null /dev/null"
