"""The TCP sockets that clients connect to: bound by the supervisor before anything else, handed to the frontends.

A port in use is thus one clear line before anything was loaded, and a restarted frontend finds its accept queue as it
was: no connection is refused meanwhile. Nothing listens before the models are loaded (spec H-032), so a socket is bound
first and the frontend starts listening on it at ``Serve``.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from forebay.ipc.errors import Unavailable


class Listener:
    """One bound socket and what it is for."""

    def __init__(self, service: str, kind: str, sock: socket.socket) -> None:
        self.service = service
        self.kind = kind
        self.sock = sock
        name = sock.getsockname()
        self.address: tuple[str, int] = (str(name[0]), int(name[1]))

    def allow_restart(self) -> None:
        """Let the next server bind while our closed connections linger; call right before the socket listens.

        Not earlier: two sockets that both have the option and do not listen yet may be bound to one port.
        """
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def close(self) -> None:
        self.sock.close()


def bind(service: str, kind: str, address: str, port: int, *, reuse_port: bool = False) -> Listener:
    """Bind a TCP socket.

    Args:
        service: what the log line calls it, for example ``HTTPService``.
        kind: what the error calls it, for example ``HTTP``.
        port: 0 takes a free one.

    Raises:
        Unavailable: the port is in use or the address is not ours; the text is Triton's (spec H-021).
    """
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
    except (OSError, UnicodeError) as error:
        raise _refusal(kind, f"Address '{address}' cannot be resolved: {getattr(error, 'strerror', error)}") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind(sockaddr)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Perhaps only closed connections of the server before us are in the way.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise _refusal(kind, f"Socket '{address}:{port}' already in use") from None
        raise _refusal(kind, f"Socket '{address}:{port}' cannot be bound: {error.strerror}") from None
    return Listener(service, kind, sock)


def _refusal(kind: str, text: str) -> Unavailable:
    return Unavailable(f"failed to start {kind} service: Unavailable - {text}")
