"""The directory of a server's sockets, which a janitor removes when the supervisor was killed.

Layout::

    <base>/                     0700, ours
      <pid>-<random>/           0700, one per server
        lock                    flocked by the supervisor as long as it lives
        submit.sock control.sock

A directory whose lock can be taken belongs to a dead server (its janitor was killed too, for example by a machine that
went down) and is removed by the next one that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time

from forebay.engine.supervisor.janitor import Janitor
from forebay.ipc.errors import Internal

#: Longest path of a runtime directory: a socket's name must fit behind it into the 107 bytes of a socket address.
PATH_BYTES_MAX = 80

#: A directory without a lock may belong to a server that is just starting; after so long it does not.
_UNLOCKED_AGE_S = 60.0

_LOCK = "lock"


class RuntimeDirectory:
    """Owns the directory, its lock and the janitor."""

    def __init__(self, base: str = "") -> None:
        """Create a fresh directory below ``base`` (empty: where the system keeps such things); start the janitor.

        Forks: call before the process has threads or anything large in memory.

        Raises:
            Internal: no such directory can be made; the text says why.
        """
        base = _find_base(base)
        remove_stale(base)
        self.path = os.path.join(base, f"{os.getpid()}-{secrets.token_hex(3)}")
        if len(os.fsencode(self.path)) > PATH_BYTES_MAX:
            raise Internal(
                f"runtime directory '{self.path}' is longer than {PATH_BYTES_MAX} bytes, too long for the sockets "
                "in it; name a shorter one with --runtime-directory"
            )
        try:
            os.mkdir(self.path, 0o700)
            self._lock_fd = os.open(os.path.join(self.path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            self.janitor = Janitor(self.path)
        except OSError as error:
            shutil.rmtree(self.path, ignore_errors=True)
            raise Internal(f"cannot create the runtime directory '{self.path}': {error.strerror}") from None

    def remove(self) -> None:
        """Remove the directory and end the janitor."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.janitor.end()
        os.close(self._lock_fd)


def remove_stale(base: str) -> None:
    """Remove the directories of servers that are dead."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(base)):
            if entry.is_dir(follow_symlinks=False) and _is_stale(entry):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_stale(entry: os.DirEntry[str]) -> bool:
    pid, dash, _ = entry.name.partition("-")
    if not dash or not pid.isdigit():
        return False
    try:
        fd = os.open(os.path.join(entry.path, _LOCK), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _UNLOCKED_AGE_S
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        # Between another server's creation of the file and its flock, the file is a few microseconds old.
        return time.time() - os.fstat(fd).st_mtime > 1.0 or not os.path.exists(f"/proc/{pid}")
    finally:
        os.close(fd)


def _find_base(wanted: str) -> str:
    """Return the directory that holds servers' directories, created and checked."""
    if wanted:
        return _prepare(wanted)
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session and len(os.fsencode(session)) + 40 < PATH_BYTES_MAX and os.access(session, os.W_OK):
        try:
            return _prepare(os.path.join(session, "forebay"))
        except Internal:
            # A session directory that is there in name only, as in many containers.
            pass
    return _prepare(f"/tmp/forebay-{os.getuid()}")


def _prepare(path: str) -> str:
    path = os.path.abspath(path)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise Internal(f"cannot create the runtime directory '{path}': {error.strerror}") from None
    # Who may write here may replace our sockets by theirs.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise Internal(f"runtime directory '{path}' belongs to somebody else")
    if status.st_mode & 0o022:
        raise Internal(f"runtime directory '{path}' is writable for others; chmod it to 0700 or name another")
    return path
