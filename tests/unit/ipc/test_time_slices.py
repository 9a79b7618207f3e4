"""The wish for short time slices, read back from the kernel."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from forebay.ipc.time_slices import LARGER_SHARE_NICE, SHORT_SLICE_NS, ask_for_larger_share, ask_for_short_slices

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine(), 0)
_KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def attributes() -> tuple[int, int, int]:
    """Return policy, nice and slice, ns, of this thread."""
    buffer = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(_SCHED_GETATTR, 0, buffer, len(buffer), 0) == 0
    _size, policy, _flags, nice, _priority, runtime_ns, _deadline, _period = struct.unpack("=IIQiIQQQ", buffer.raw)
    return policy, nice, runtime_ns


@pytest.mark.skipif(_KERNEL < (6, 12) or not _SCHED_GETATTR, reason="needs Linux 6.12 on x86_64 or aarch64")
def test_slices_are_short_and_nothing_else_changes() -> None:
    def ask() -> tuple[int, int, int]:
        os.setpriority(os.PRIO_PROCESS, 0, 3)
        ask_for_short_slices()
        return attributes()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(ask).result() == (os.SCHED_OTHER, 3, SHORT_SLICE_NS)


def test_other_policy_is_kept() -> None:
    def ask() -> int:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        ask_for_short_slices()
        return os.sched_getscheduler(0)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(ask).result() == os.SCHED_BATCH


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_larger_share_is_one_of_those_below_it_too() -> None:
    def ask() -> tuple[int, int]:
        ask_for_short_slices()
        ask_for_larger_share()
        with ThreadPoolExecutor(1) as child:
            return os.getpriority(os.PRIO_PROCESS, 0), child.submit(os.getpriority, os.PRIO_PROCESS, 0).result()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(ask).result() == (LARGER_SHARE_NICE, LARGER_SHARE_NICE)


def test_who_may_not_have_a_larger_share_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_increment: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "nice", refuse)
    ask_for_larger_share()
