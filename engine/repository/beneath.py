"""The one door to the files of a model repository: nothing outside its root is ever opened.

Python has no ``openat2(RESOLVE_BENEATH)``, so :class:`Beneath` walks a path one component at a time from an open
directory descriptor, with ``O_NOFOLLOW`` at each step, and resolves symbolic links itself: a link is followed as Triton
does (spec R-014), as long as its target stays inside the root. A renamed or swapped directory cannot move the walk
outside, because every step starts at a descriptor that is already inside.

Paths are relative and made of names: no NUL, no ``..``, not absolute, not over-long. Texts of refusals name what the
caller wrote, never a path of this machine.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import TracebackType

import msgspec

from forebay.ipc.errors import InvalidArgument, NotFound

#: Bytes of one name and of one path; the kernel's own limits.
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095

#: Components of one path at most, and symbolic links followed for one path (the kernel's number).
MAX_COMPONENTS = 64
MAX_LINKS = 40

#: Entries of one directory that are listed at most.
MAX_ENTRIES = 100_000

_STEP = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Entry(msgspec.Struct, frozen=True):
    """One name in a directory, links followed."""

    name: str
    is_directory: bool
    is_file: bool
    mtime_ns: int
    size_bytes: int
    inode: int


class Refused(InvalidArgument):
    """A path leads out of the repository, or is no path at all; the caller's or the repository's author's mistake."""


def check_name(name: str, what: str = "file name") -> str:
    """Return ``name`` if it is one path component and nothing else.

    Raises:
        Refused: empty, ``.``, ``..``, with a slash or NUL, too long, or not encodable.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise Refused(f"invalid {what} {_shown(name)}, it must not contain path traversal characters")
    if _encoded_bytes(name) > MAX_NAME_BYTES:
        raise Refused(f"invalid {what} {_shown(name)}, it must be valid text of at most {MAX_NAME_BYTES} bytes")
    return name


def check_model_name(name: str) -> str:
    """Return a model name that may be used as a directory name (spec H-223).

    Raises:
        Refused: with Triton's text.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise Refused(f"invalid model name {_shown(name)}, model name must not contain path traversal characters")
    if _encoded_bytes(name) > MAX_NAME_BYTES:
        raise Refused(f"invalid model name {_shown(name)}, model name must be text of at most {MAX_NAME_BYTES} bytes")
    return name


def check_relative(path: str, what: str = "file name") -> tuple[str, ...]:
    """Split a relative path of names, for example a label file's or an override's, into its components.

    Raises:
        Refused: absolute, empty, over-long, or a component is refused by :func:`check_name`.
    """
    if path.startswith("/"):
        raise Refused(f"invalid {what} {_shown(path)}, it must be relative to the model directory")
    if _encoded_bytes(path) > MAX_PATH_BYTES:
        raise Refused(f"invalid {what} {_shown(path)}, it must be valid text of at most {MAX_PATH_BYTES} bytes")
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    if not names or len(names) > MAX_COMPONENTS:
        raise Refused(f"invalid {what} {_shown(path)}, it must name a file in at most {MAX_COMPONENTS} steps")
    for name in names:
        if name == ".." or "\0" in name:
            raise Refused(f"invalid {what} {_shown(path)}, it must not contain path traversal characters")
        check_name(name, what)
    return names


class Beneath:
    """A directory tree below one root, held open by a descriptor.

    Owns the descriptor; use as a context manager or call :meth:`close`. Not bound to a thread; holds no other state.
    """

    def __init__(self, root: str) -> None:
        """Open the root itself, which may be a link or lie behind links: whoever started the server chose it.

        Raises:
            NotFound: there is no such directory.
        """
        self._real_root = os.path.realpath(root) if "\0" not in root else root
        self._given_root = os.path.abspath(root)
        try:
            self._fd = os.open(self._real_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"failed to open directory {root}: {_reason(error)}") from None
        except ValueError:
            raise Refused(f"invalid directory name {_shown(root)}") from None

    def close(self) -> None:
        """Close the root's descriptor; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Beneath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def real_root(self) -> str:
        """Absolute path of the root without links."""
        return self._real_root

    def entry(self, path: Sequence[str]) -> Entry | None:
        """Return what ``path`` is, or None if nothing is there; an empty path is the root.

        Raises:
            Refused: a link on the way leads out of the root, or it may not be read.
        """
        try:
            with self._opened(path) as (fd, _):
                return _entry(path[-1] if path else "", os.fstat(fd))
        except NotFound:
            return None

    def is_directory(self, path: Sequence[str]) -> bool:
        found = self.entry(path)
        return found is not None and found.is_directory

    def is_file(self, path: Sequence[str]) -> bool:
        found = self.entry(path)
        return found is not None and found.is_file

    def read(self, path: Sequence[str], max_bytes: int) -> bytes:
        """Return a regular file's content.

        Raises:
            NotFound: nothing is there, or it is no regular file.
            Refused: a link leads out of the root, or the file is larger than ``max_bytes``.
        """
        shown = "/".join(path)
        with self._opened(path) as (fd, _):
            status = _regular_file(fd, shown)
            if status.st_size > max_bytes:
                raise Refused(f"'{shown}' has {status.st_size} bytes, at most {max_bytes} are read")
            parts: list[bytes] = []
            left = max_bytes + 1  # the file may grow while it is read
            while left > 0 and (part := os.read(fd, min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
            if left <= 0:
                raise Refused(f"'{shown}' has more than {max_bytes} bytes")
            return b"".join(parts)

    def md5(self, path: Sequence[str]) -> str:
        """Return a regular file's MD5 as hexadecimal digits, however large it is.

        Raises:
            NotFound: nothing is there, or it is no regular file.
            Refused: a link leads out of the root.
        """
        digest = hashlib.md5(usedforsecurity=False)
        with self._opened(path) as (fd, _):
            _regular_file(fd, "/".join(path))
            while part := os.read(fd, 1 << 20):
                digest.update(part)
        return digest.hexdigest()

    def entries(self, path: Sequence[str] = ()) -> list[Entry]:
        """Return what a directory holds, sorted by name, links followed; leaves out what is refused and what is gone.

        Raises:
            NotFound: no such directory.
            Refused: more than ``MAX_ENTRIES`` names, or a link on the way leads out of the root.
        """
        return self.listed(path)[0]

    def listed(self, path: Sequence[str] = ()) -> tuple[list[Entry], dict[str, str]]:
        """Return :meth:`entries`, and the names that it leaves out because they are refused, with the reason.

        Raises:
            NotFound: no such directory.
            Refused: more than ``MAX_ENTRIES`` names, or a link on the way leads out of the root.
        """
        with self._opened(path) as (fd, _):
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise NotFound(f"'{'/'.join(path)}' is not a directory")
            names = os.listdir(fd)
        if len(names) > MAX_ENTRIES:
            raise Refused(f"'{'/'.join(path)}' has more than {MAX_ENTRIES} entries")
        found: list[Entry] = []
        refused: dict[str, str] = {}
        for name in sorted(names):
            try:
                item = self.entry((*path, name))
            except Refused as error:
                refused[name] = error.text
                continue
            if item is not None:
                found.append(item)
        return found, refused

    def real_path(self, path: Sequence[str]) -> str:
        """Return the absolute path without links, for a library that opens files by name.

        Raises:
            NotFound: nothing is there.
            Refused: a link leads out of the root.
        """
        with self._opened(path) as (_, names):
            return os.path.join(self._real_root, *names)

    @contextmanager
    def _opened(self, path: Sequence[str]) -> Generator[tuple[int, list[str]]]:
        """Walk to ``path``; yield its descriptor and its names below the root after links were resolved."""
        shown = "/".join(path)
        pending = list(reversed(path))
        names: list[str] = []
        stack: list[int] = [os.dup(self._fd)]
        links = 0
        try:
            while pending:
                name = pending.pop()
                if name in ("", "."):
                    continue
                if name == "..":  # only out of a link's target; the caller's own were refused
                    if not names:
                        raise Refused(f"'{shown}' leads out of the model repository")
                    names.pop()
                    os.close(stack.pop())
                    continue
                target = _read_link(name, stack[-1], shown)
                if target is None:
                    stack.append(_open_step(name, stack[-1], shown))
                    names.append(name)
                    continue
                links += 1
                if links > MAX_LINKS:
                    raise Refused(f"'{shown}' goes through more than {MAX_LINKS} symbolic links")
                if target.startswith("/"):
                    inside = self._below_root(target)
                    if inside is None:
                        raise Refused(
                            f"'{shown}' is a symbolic link out of the model repository; "
                            "its target must lie inside the repository"
                        )
                    while names:
                        names.pop()
                        os.close(stack.pop())
                    target = inside
                pending.extend(reversed(target.split("/")))
                if len(pending) > MAX_COMPONENTS * 4:
                    raise Refused(f"'{shown}' has too many components")
            yield stack[-1], names
        finally:
            for fd in stack:
                os.close(fd)

    def _below_root(self, target: str) -> str | None:
        """Return an absolute link target relative to the root, or None if it is not below it."""
        for root in (self._real_root, self._given_root):
            if target == root:
                return "."
            prefix = root.rstrip("/") + "/"
            if target.startswith(prefix):
                return target.removeprefix(prefix)
        return None


def _regular_file(fd: int, shown: str) -> os.stat_result:
    """Return what an open file is like.

    Raises:
        NotFound: it is no regular file.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotFound(f"'{shown}' is not a regular file")
    return status


def _read_link(name: str, directory: int, shown: str) -> str | None:
    """Return a link's target, or None if ``name`` is no link."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise _not_opened(shown, error) from None
    except ValueError:  # NUL or a surrogate in the name
        raise Refused(f"invalid file name {_shown(shown)}") from None


def _open_step(name: str, directory: int, shown: str) -> int:
    """Open one component below ``directory`` without following it, should it have become a link in the meantime."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise NotFound(f"'{shown}' is neither a file nor a directory")
        return os.open(name, _STEP, dir_fd=directory)
    except OSError as error:
        raise _not_opened(shown, error) from None


def _not_opened(shown: str, error: OSError) -> NotFound | Refused:
    """Tell "nothing is there" from "there is something that may not be read"."""
    kind = NotFound if error.errno in (errno.ENOENT, errno.ENOTDIR) else Refused
    return kind(f"'{shown}' cannot be opened: {_reason(error)}")


def _entry(name: str, status: os.stat_result) -> Entry:
    return Entry(
        name=name,
        is_directory=stat.S_ISDIR(status.st_mode),
        is_file=stat.S_ISREG(status.st_mode),
        mtime_ns=status.st_mtime_ns,
        size_bytes=status.st_size,
        inode=status.st_ino,
    )


def _encoded_bytes(text: str) -> int:
    """Return the length in UTF-8; what is not UTF-8 counts as too long, since no protocol could name it."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return MAX_PATH_BYTES + 1


def _reason(error: OSError) -> str:
    """Say what the kernel said without its path."""
    return os.strerror(error.errno) if error.errno else "unknown error"


def _shown(name: str) -> str:
    """Quote a name for a message: printable and short."""
    printable = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name[:64])
    return f"'{printable}{'...' if len(name) > 64 else ''}'"
