"""Whether ``--cpu-wakeup-latency-us`` can be kept, said when the server starts and not under load."""

from __future__ import annotations

from forebay.ipc.log import log
from forebay.ipc.wakeup_latency import WakeupLatency, cores_obey


def check_wakeup_latency(longest_us: int) -> None:
    """Warn where the kernel has no say in how cores idle.

    Args:
        longest_us: -1: nobody wants anything.

    Raises:
        Unavailable: this user may not ask the kernel for it.
    """
    if longest_us < 0:
        return
    latency = WakeupLatency(longest_us)
    latency.hold()
    latency.release()
    if not cores_obey():
        log.warning(
            "--cpu-wakeup-latency-us has no effect: this kernel does not decide how cores idle (no cpuidle driver)"
        )
