"""A timer descriptor: wakes an epoll loop at a point in time with microsecond precision.

``epoll.poll`` rounds its timeout up to whole milliseconds, which is a fifth of a 5 ms queue delay; the standard library
has ``os.timerfd_create`` only from Python 3.13, so libc is called.
"""

from __future__ import annotations

import ctypes
import os
import time

_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_libc = ctypes.CDLL(None, use_errno=True)


class _ITimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Timer:
    """One alarm, re-settable."""

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _ITimerSpec()
        self._alarm_ns = 0

    def fileno(self) -> int:
        return int(self._fd)

    def set(self, alarm_ns: int) -> None:
        """Go off at ``alarm_ns`` (monotonic); 0 disarms. Setting the same time again costs nothing."""
        if alarm_ns == self._alarm_ns:
            return
        self._alarm_ns = alarm_ns
        self._spec.value_s, self._spec.value_ns = divmod(alarm_ns, 1_000_000_000)
        _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)

    def acknowledge(self) -> None:
        """Consume an alarm that went off."""
        self._alarm_ns = 0
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self._fd)
