"""A client at the server's door; the test is the server."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.client.door import Door
from forebay.ipc.client_wire import DOOR_HEADER, NUMBER, DoorKind
from forebay.ipc.errors import NotFound


@contextlib.contextmanager
def door_and_server(path: Path) -> Iterator[tuple[Door, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        door = Door(str(path))
        server, _address = listener.accept()
        with server:
            yield door, server
        door.close()


def send_with_descriptor(server: socket.socket, message: bytes) -> None:
    reading, writing = os.pipe()
    server.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reading]))])
    os.close(reading)
    os.close(writing)


def test_late_answers_leave_no_descriptors(tmp_path: Path) -> None:
    """The answer to a question that was given up comes while another one is asked, or none."""
    with door_and_server(tmp_path / "door") as (door, server):
        before = len(os.listdir("/proc/self/fd"))
        send_with_descriptor(server, DOOR_HEADER.pack(DoorKind.MODEL, 0, 77) + bytes(64))
        door.look()
        send_with_descriptor(server, DOOR_HEADER.pack(DoorKind.MODEL, 0, 78) + bytes(64))
        server.send(DOOR_HEADER.pack(DoorKind.REFUSED, 0, 1) + NUMBER.pack(NotFound.code) + b"no such model")
        with pytest.raises(NotFound, match="no such model"):
            door.open_model("m", 0)
        assert len(os.listdir("/proc/self/fd")) == before
