"""The program ``forebay``: what it does before a command runs."""

from __future__ import annotations

import os
import subprocess
import sys


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
