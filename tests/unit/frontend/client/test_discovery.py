"""Where a client looks for the server."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forebay.client.discovery import door_paths
from forebay.client.errors import NoServer
from forebay.ipc.client_wire import RUNTIME_DIRECTORY_VARIABLE


@pytest.fixture
def make_door() -> Iterator[Callable[[Path], str]]:
    sockets: list[socket.socket] = []

    def make(directory: Path) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        path = str(directory / "clients.sock")
        sockets.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sockets[-1].bind(path)
        return path

    yield make
    for sock in sockets:
        sock.close()


def test_the_newest_server_comes_first(tmp_path: Path, make_door: Callable[[Path], str]) -> None:
    old, new = make_door(tmp_path / "1-aa"), make_door(tmp_path / "2-bb")
    os.utime(old, (1, 1))
    assert door_paths(tmp_path) == [new, old]
    os.utime(new, (0, 0))
    assert door_paths(tmp_path) == [old, new]


def test_socket_and_runtime_directory_are_taken_too(tmp_path: Path, make_door: Callable[[Path], str]) -> None:
    path = make_door(tmp_path / "1-aa")
    assert door_paths(path) == [path]
    assert door_paths(tmp_path / "1-aa") == [path]


def test_environment_names_the_place(
    tmp_path: Path, make_door: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_door(tmp_path / "1-aa")
    monkeypatch.setenv(RUNTIME_DIRECTORY_VARIABLE, str(tmp_path))
    assert door_paths() == [path]
    monkeypatch.delenv(RUNTIME_DIRECTORY_VARIABLE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert path not in _try_door_paths()


def _try_door_paths() -> list[str]:
    try:
        return door_paths()
    except NoServer:
        return []


def test_what_is_no_socket_of_ours_is_not_taken(
    tmp_path: Path, make_door: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can put something into /tmp."""
    (tmp_path / "1-aa").mkdir()
    (tmp_path / "1-aa" / "clients.sock").write_text("")
    with pytest.raises(NoServer):
        door_paths(tmp_path)
    make_door(tmp_path / "2-bb")
    owner = os.stat(tmp_path).st_uid
    if owner:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        with pytest.raises(NoServer):
            door_paths(tmp_path)
