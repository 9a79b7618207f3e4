"""Device memory where the host plays the GPU: files that processes have open."""

from __future__ import annotations

import contextlib
import os


def count_memories(pid: int | str) -> int:
    """Return how many device memories a process has open."""
    found: set[int] = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{number}"
        # It may have been closed since; the listing's own is.
        with contextlib.suppress(FileNotFoundError):
            if "forebay-device" in os.readlink(link):
                found.add(os.stat(link).st_ino)
    return len(found)
