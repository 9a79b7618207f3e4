"""Where the server is: the path of its door, given, or found like the server itself chooses it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from forebay.client.errors import NoServer
from forebay.ipc.client_wire import DOOR_NAME, RUNTIME_DIRECTORY_VARIABLE


def door_paths(path: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the sockets to try, the most recently started server first.

    Args:
        path: the socket, a server's runtime directory, or the directory that holds those; None: the environment's
            ``FOREBAY_RUNTIME_DIRECTORY``, else ``$XDG_RUNTIME_DIR/forebay`` and ``/tmp/forebay-<uid>``.

    Raises:
        NoServer: there is none; the text names the places.
    """
    places = _places() if path is None else [os.fspath(path)]
    found: dict[str, float] = {}
    for place in places:
        for candidate in _candidates(place):
            status = _status(candidate)
            # Only what is ours: anybody can put a socket into /tmp.
            if status is not None and stat.S_ISSOCK(status.st_mode) and status.st_uid in (os.geteuid(), 0):
                found[candidate] = status.st_mtime
    if not found:
        raise NoServer(f"no forebay server is running: there is no {DOOR_NAME} of this user in {', '.join(places)}")
    return sorted(found, key=lambda name: found[name], reverse=True)


def _places() -> list[str]:
    named = os.environ.get(RUNTIME_DIRECTORY_VARIABLE, "")
    if named:
        return [named]
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    places = [os.path.join(session, "forebay")] if session else []
    return [*places, f"/tmp/forebay-{os.getuid()}"]


def _candidates(place: str) -> Iterator[str]:
    yield place
    yield os.path.join(place, DOOR_NAME)
    try:
        entries = os.listdir(place)
    except OSError:
        return
    for entry in entries:
        yield os.path.join(place, entry, DOOR_NAME)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None
