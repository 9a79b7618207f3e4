"""What ``glance_loop.c`` makes; an optional part of the package, see ``completions.py``."""

import socket

def glance(sock: socket.socket, buffer: bytearray, glance_ns: int, /) -> tuple[int, int]:
    """Receive one message without sleeping.

    Args:
        glance_ns: how long to look for it.

    Returns:
        Its size, 0 at the end, -1 if there was none, or the socket is broken; and how long the last look took, ns.
    """
