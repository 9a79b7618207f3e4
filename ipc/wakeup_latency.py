"""How long an idle core may take to wake up: a wish to the kernel, for all cores of the machine.

An idle core sleeps, and whoever wakes it pays: with an interrupt, on a virtual machine with a trip through the
hypervisor, and then with cold caches. A latency of 0 keeps idle cores awake, looking for work. It costs power, or what
a provider charges for a busy core, so it is wished for only while there is something to do.

Source: the kernel's PM QoS interface, Documentation/power/pm_qos_interface.rst: a wish lasts as long as the file that
it was written to is open; the smallest of all wishes counts.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from forebay.ipc.errors import Unavailable

_DEVICE = "/dev/cpu_dma_latency"
_DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")

#: A 32-bit number of microseconds, in the machine's order.
_LATENCY = struct.Struct("=i")


class WakeupLatency:
    """A wish that can be made and taken back; what is held ends with the process."""

    def __init__(self, longest_us: int) -> None:
        """Wish for nothing yet.

        Args:
            longest_us: how long waking up may take, µs; 0: cores do not sleep.
        """
        self._longest_us = longest_us
        self._fd = -1

    def hold(self) -> None:
        """Make the wish, unless it is held.

        Raises:
            Unavailable: this process may not; the text says what to do.
        """
        if self._fd >= 0:
            return
        try:
            fd = os.open(_DEVICE, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(
                f"--cpu-wakeup-latency-us needs to write to {_DEVICE}: {error.strerror}; run the server as a user who"
                f" may, give a container the device (--device {_DEVICE}), or leave the flag out"
            ) from None
        try:
            os.write(fd, _LATENCY.pack(self._longest_us))
        except OSError as error:
            os.close(fd)
            raise Unavailable(
                f"--cpu-wakeup-latency-us {self._longest_us}: the kernel does not take it: {error.strerror}"
            ) from None
        self._fd = fd

    def release(self) -> None:
        """Take the wish back, if it is held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def is_held(self) -> bool:
        """Whether the wish counts now."""
        return self._fd >= 0


def may_ask() -> bool:
    """Whether this process may make such a wish, and the kernel cares."""
    return cores_obey() and os.access(_DEVICE, os.W_OK)


def cores_obey() -> bool:
    """Whether the kernel lets anybody say how cores idle; some virtual machines leave it to the host."""
    try:
        return _DRIVER.read_text().strip() not in ("", "none")
    except OSError:
        return False
