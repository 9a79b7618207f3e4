"""The program ``forebay``: what it does before a command runs."""

from __future__ import annotations

import os
import subprocess
import sys
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
