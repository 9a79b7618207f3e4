"""Shared memory that clients own: opened by name once, then read and written by descriptor.

A client may truncate, unlink or overwrite its region at any moment, and touching a mapping of a truncated file kills
the process. So nothing of ours ever maps one: tensors are copied by ``preadv`` and ``pwritev``, where the kernel
answers with a short count or an error instead. It costs one copy per tensor (inside the kernel) and nothing else; for
tensors that are never copied, clients use an arena of ours (``forebay.client.shm``), which they cannot truncate.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from forebay.ipc.errors import Internal, InvalidArgument
from forebay.ipc.log import log

#: Where POSIX shared memory objects are files (``shm_open(3)``).
DIRECTORY = "/dev/shm"

#: Keys that start so belong to the server's own workers in Triton, and no client may register them (spec H-193).
RESERVED_PREFIX = "triton_python_backend_shm_region_"

#: Bytes of a file name on Linux at most.
_NAME_BYTES_MAX = 255

#: Usual causes, by errno.
_NOT_OURS = "; the server has to be allowed to read and write it"
_HINTS = {
    errno.ENOENT: (
        "; a client in a container needs the server's IPC namespace: share it (docker run --ipc=host or "
        "--ipc=container:...)"
    ),
    errno.EACCES: _NOT_OURS,
    errno.EPERM: _NOT_OURS,
}


def open_shared_memory(name: str, key: str) -> int:
    """Open the POSIX shared memory object ``key`` for reading and writing, as ``shm_open`` does.

    Args:
        name: of the region, for texts.
        key: as registered; slashes at the beginning do not count.

    Returns:
        Its descriptor, which the caller owns.

    Raises:
        InvalidArgument: the key is reserved.
        Internal: there is no such object, or it is none; the text begins as Triton's does (spec H-193) and goes on with
            why and with the usual cause, which is what its users ask for most.
    """
    file_name = key.lstrip("/")
    if file_name.startswith(RESERVED_PREFIX):
        raise InvalidArgument(
            f"cannot register shared memory region '{name}' with key '{key}' as the key contains the reserved prefix "
            f"'{RESERVED_PREFIX}'"
        )
    failure = f"Unable to open shared memory region: '{key}'"
    try:
        raw = os.fsencode(file_name)
    except UnicodeError:
        raise Internal(failure) from None
    if not raw or raw in (b".", b"..") or b"/" in raw or b"\0" in raw or len(raw) > _NAME_BYTES_MAX:
        raise Internal(f"{failure}: a key is the name of an object, with or without a slash before it")
    path = os.path.join(os.fsencode(DIRECTORY), raw)
    try:
        # What is no regular file must neither block us nor lead us elsewhere.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, str(error.errno))})"
        log.warning(f"{failure}: {DIRECTORY}/{file_name}: {reason}{_owner(path, error.errno)}")
        raise Internal(f"{failure}: {reason}{_HINTS.get(error.errno or 0, '')}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Internal(f"{failure}: it is no shared memory object")
    return fd


def _owner(path: bytes, number: int | None) -> str:
    """Return whose an object is that may not be opened: for the log, no client is told of users."""
    if number not in (errno.EACCES, errno.EPERM):
        return ""
    try:
        status = os.lstat(path)
    except OSError:
        return ""
    return (
        f"; it belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, the server runs as user "
        f"{os.geteuid()} and has to read and write it"
    )


def check_place(name: str, region_bytes: int, offset: int, byte_size: int) -> None:
    """Raise InvalidArgument unless a place lies in a region (spec H-200)."""
    if offset < 0 or offset >= max(region_bytes, 1):
        raise InvalidArgument(f"Invalid offset for shared memory region: '{name}'")
    # Nothing at the beginning of a region is refused too: Triton looks at the last byte.
    if byte_size < 0 or offset + byte_size > region_bytes or offset + byte_size == 0:
        raise InvalidArgument(f"Invalid offset + byte size for shared memory region: '{name}'")


class Region:
    """A registered part of a client's shared memory in one process. Owns its descriptor.

    ``uses`` counts requests; a region that is taken away keeps its descriptor until the last of them has ended
    (spec H-194).
    """

    __slots__ = ("_fd", "_is_gone", "_uses", "byte_size", "kind", "name", "offset")

    def __init__(self, name: str, kind: str, fd: int, offset: int, byte_size: int) -> None:
        """Take ownership of ``fd``; bytes ``[offset, offset + byte_size)`` of it are the region."""
        self.name = name
        self.kind = kind
        self.offset = offset
        self.byte_size = byte_size
        self._fd = fd
        self._uses = 0
        self._is_gone = False

    def check(self, offset: int, byte_size: int) -> None:
        """Raise InvalidArgument unless the place lies in the region (spec H-200)."""
        check_place(self.name, self.byte_size, offset, byte_size)

    def read_into(self, place: memoryview, offset: int) -> None:
        """Fill ``place`` from a checked place in the region.

        Raises:
            InvalidArgument: the owner has truncated it.
        """
        done = 0
        while done < len(place):
            try:
                count = os.preadv(self._fd, [place[done:]], self.offset + offset + done)
            except OSError as error:
                raise InvalidArgument(f"shared memory region '{self.name}' cannot be read: {error.strerror}") from None
            if count == 0:
                raise self._truncated(offset + len(place))
            done += count

    def write_from(self, buffers: Sequence[memoryview | bytes], offset: int) -> None:
        """Write to a checked place in the region.

        Raises:
            InvalidArgument: the owner has truncated or sealed it.
        """
        total = sum(map(len, buffers))
        # Writing past the end would make a truncated object grow again.
        if os.fstat(self._fd).st_size < self.offset + offset + total:
            raise self._truncated(offset + total)
        data = memoryview(buffers[0] if len(buffers) == 1 else b"".join(buffers))
        done = 0
        while done < total:
            try:
                done += os.pwritev(self._fd, [data[done:]], self.offset + offset + done)
            except OSError as error:
                raise InvalidArgument(
                    f"shared memory region '{self.name}' cannot be written: {error.strerror}"
                ) from None

    def _truncated(self, end: int) -> InvalidArgument:
        size = max(os.fstat(self._fd).st_size - self.offset, 0)
        return InvalidArgument(
            f"shared memory region '{self.name}' has {size} bytes left, {end} are needed: it was truncated after it "
            "had been registered"
        )

    # --- life ---

    def acquire(self) -> None:
        """A request uses the region."""
        self._uses += 1

    def release(self) -> None:
        """A request has ended."""
        self._uses -= 1
        self._close_unused()

    def retire(self) -> None:
        """It is not registered any more."""
        self._is_gone = True
        self._close_unused()

    def _close_unused(self) -> None:
        if self._is_gone and not self._uses and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
