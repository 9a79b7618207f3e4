"""Sockets that are bound before they listen."""

from __future__ import annotations

import socket

import pytest

from forebay.engine.supervisor.listeners import bind
from forebay.ipc.errors import Unavailable


def test_bound_port_is_in_use_before_it_listens() -> None:
    """Spec H-021: two servers that start at the same time must not share a port."""
    first = bind("HTTPService", "HTTP", "127.0.0.1", 0)
    port = first.address[1]
    text = f"failed to start HTTP service: Unavailable - Socket '127.0.0.1:{port}' already in use"
    with pytest.raises(Unavailable) as refused:
        bind("HTTPService", "HTTP", "127.0.0.1", port)
    assert refused.value.text == text
    first.close()


def test_nobody_can_connect_before_it_listens() -> None:
    """Spec H-032."""
    listener = bind("HTTPService", "HTTP", "127.0.0.1", 0)
    with socket.socket() as client:
        assert client.connect_ex(listener.address) != 0
    listener.allow_restart()
    listener.sock.listen()
    with socket.socket() as client:
        assert client.connect_ex(listener.address) == 0
    listener.close()


def test_port_is_free_again_while_closed_connections_linger() -> None:
    listener = bind("HTTPService", "HTTP", "127.0.0.1", 0)
    address = listener.address
    listener.allow_restart()
    listener.sock.listen()
    with socket.socket() as client:
        client.connect(address)
        accepted, _ = listener.sock.accept()
        # The side that closes first keeps the connection in TIME_WAIT.
        accepted.close()
        assert client.recv(1) == b""
    listener.close()
    bind("HTTPService", "HTTP", *address).close()


def test_address_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(Unavailable, match="cannot be bound"):
        bind("HTTPService", "HTTP", "192.0.2.1", 0)
    with pytest.raises(Unavailable, match="cannot be resolved"):
        bind("HTTPService", "HTTP", "no such host", 0)
