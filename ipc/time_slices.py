"""How soon and how long a process gets a core that others want, too: wishes to the kernel's fair scheduler.

It shares out the same time to everybody; who asks for short slices gets its share in smaller pieces, and sooner when it
wakes up. Needs Linux 6.12 and no privilege; older kernels ignore it. Source: sched_setattr(2), ``sched_runtime`` of
fair tasks; the layout is ``struct sched_attr`` of its first version. A larger share is a matter of nice(2), for those
who may.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct

#: The shortest that the kernel grants.
SHORT_SLICE_NS = 100_000

#: Number of the system call, which libc has no function for.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
#: size u32, policy u32, flags u64, nice s32, priority u32, runtime u64, deadline u64, period u64
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
_libc = ctypes.CDLL(None, use_errno=True)


def ask_for_short_slices() -> None:
    """Have the calling thread, and those that it starts from now on, scheduled soon after they wake up.

    For processes that take part in every request and use little time for each. Whoever was given another scheduling
    policy keeps it as it is.
    """
    if _SCHED_SETATTR is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, SHORT_SLICE_NS, 0, 0)
    # A kernel that knows better does as it likes.
    _libc.syscall(_SCHED_SETATTR, 0, attributes, 0)


#: How much less nice than its siblings a process is that asks for a larger share: three times theirs.
LARGER_SHARE_NICE = -5


def ask_for_larger_share() -> None:
    """Have the calling thread, and those that it starts from now on, get more of a core that others want.

    For a process that is never busy for long. Without CAP_SYS_NICE, and a limit that allows it, everything stays as it
    is.
    """
    with contextlib.suppress(PermissionError):
        os.nice(LARGER_SHARE_NICE)
