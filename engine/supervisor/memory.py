"""Gives memory that the supervisor no longer needs back to the system.

Loading a model makes and drops many small objects (configurations, catalogs, file listings). Without a hint the C
library keeps what they took, in more and more places.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    # glibc's alone; other C libraries give memory back by themselves.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else functools.partial(trim)


def settle_memory() -> None:
    """Take everything that there is now for what stays: collections need not look at it again."""
    gc.collect()
    gc.freeze()


def return_memory() -> None:
    """Collect what is unreachable and return free pages; takes some milliseconds."""
    gc.collect()
    if (trim := _trim()) is not None:
        trim(0)
