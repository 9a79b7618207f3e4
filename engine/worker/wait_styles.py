"""How a worker waits for its doorbell: asleep, or looking for it a while first (``--wait``).

Who looks keeps a core busy and sees a message a wake-up earlier. It stops after a set time, so that an idle server
costs nothing.
"""

from __future__ import annotations

import select
import socket
import time


class Park:
    """Sleeps until there is something."""

    #: How long to look before sleeping.
    spin_ns = 0

    def receive(self, sock: socket.socket, buffer: bytearray) -> int:
        """Return the bytes of the next message, which is at the start of ``buffer``; 0: every sender is gone."""
        return sock.recv_into(buffer)

    def poll(self, poll: select.poll, timeout_ms: int | None) -> list[tuple[int, int]]:
        """Return what is ready, as ``select.poll.poll`` does."""
        return poll.poll(timeout_ms)


class Spin(Park):
    """Looks for something for a while before it sleeps."""

    def __init__(self, spin_us: int) -> None:
        self.spin_ns = spin_us * 1000

    def receive(self, sock: socket.socket, buffer: bytearray) -> int:
        end_ns = time.monotonic_ns() + self.spin_ns
        while True:
            try:
                return sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic_ns() >= end_ns:
                    return sock.recv_into(buffer)

    def poll(self, poll: select.poll, timeout_ms: int | None) -> list[tuple[int, int]]:
        end_ns = time.monotonic_ns() + self.spin_ns
        while time.monotonic_ns() < end_ns:
            ready = poll.poll(0)
            if ready:
                return ready
        return poll.poll(timeout_ms)


def wait_style(spin_us: int) -> Park:
    """Return how to wait; ``spin_us``: how long to look before sleeping, 0: not at all."""
    return Spin(spin_us) if spin_us > 0 else Park()
