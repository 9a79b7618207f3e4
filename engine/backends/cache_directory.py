"""Where backends keep what is expensive to make: copies of models with shared weights, TensorRT plans.

What lies there is loaded like a model, so that nobody else may be able to write it.
"""

from __future__ import annotations

import os
import stat
import tempfile


def default_cache_directory(kind: str) -> str:
    """Return ``$XDG_CACHE_HOME/forebay/<kind>``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "forebay", kind)


def make_private_directory(path: str) -> None:
    """Make a directory for this user alone, or check that the one that is there belongs to nobody else.

    Raises:
        OSError: it cannot be made, or others may write into it.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"the cache directory '{path}' belongs to another user")
    if status.st_mode & stat.S_IWOTH:
        raise PermissionError(f"everybody may write into the cache directory '{path}'")


def replace_file(path: str, data: bytes) -> None:
    """Write a file under another name first: a process that dies leaves no half of it.

    Raises:
        OSError: it cannot be written.
    """
    fd, temporary = tempfile.mkstemp(prefix=f"{os.path.basename(path)}.tmp-", dir=os.path.dirname(path))
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    os.rename(temporary, path)
