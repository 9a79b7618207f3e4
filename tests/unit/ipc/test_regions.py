"""Memory that clients own: which keys open what, and what happens when it changes under us."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator

import pytest

from forebay.ipc import regions
from forebay.ipc.errors import Internal, InvalidArgument
from forebay.ipc.regions import Region, open_shared_memory


@pytest.fixture
def key() -> Iterator[str]:
    name = f"forebay-unit-{os.getpid()}-{secrets.token_hex(4)}"
    with open(f"/dev/shm/{name}", "wb") as file:
        file.write(bytes(range(100)))
    yield f"/{name}"
    if os.path.lexists(f"/dev/shm/{name}"):
        os.unlink(f"/dev/shm/{name}")


def region(key: str, offset: int = 0, byte_size: int = 100) -> Region:
    return Region("r", "system", open_shared_memory("r", key), offset, byte_size)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_slashes_before_the_name_do_not_count(key: str, slashes: str) -> None:
    fd = open_shared_memory("r", slashes + key.lstrip("/"))
    assert os.read(fd, 3) == b"\x00\x01\x02"
    os.close(fd)


@pytest.mark.parametrize("wrong", ["", "/", ".", "..", "/../shm/x", "a/b", "a\0", "x" * 256, "\udcff\ud800"])
def test_keys_that_name_no_object(wrong: str) -> None:
    """H-193: the text begins as Triton's."""
    with pytest.raises(Internal, match=r"^Unable to open shared memory region: '"):
        open_shared_memory("r", wrong)


def test_reserved_prefix() -> None:
    with pytest.raises(InvalidArgument, match="reserved prefix 'triton_python_backend_shm_region_'"):
        open_shared_memory("r", "/triton_python_backend_shm_region_7")


def test_links_directories_and_pipes_are_refused(key: str) -> None:
    path = f"/dev/shm{key}"
    os.unlink(path)
    os.symlink("/etc/hostname", path)
    with pytest.raises(Internal, match="Unable to open shared memory region"):
        open_shared_memory("r", key)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(Internal, match="Unable to open shared memory region"):
        open_shared_memory("r", key)
    os.unlink(path)
    os.mkdir(path)
    try:
        with pytest.raises(Internal, match="Unable to open shared memory region"):
            open_shared_memory("r", key)
    finally:
        os.rmdir(path)


def test_reads_and_writes_at_offsets(key: str) -> None:
    part = region(key, 10, 50)
    place = bytearray(4)
    part.read_into(memoryview(place), 2)
    assert place == bytes([12, 13, 14, 15])
    part.write_from([b"ab", memoryview(b"cd")], 5)
    with open(f"/dev/shm{key}", "rb") as file:
        assert file.read()[14:20] == b"\x0eabcd\x13"


@pytest.mark.parametrize(
    ("offset", "byte_size", "text"),
    [
        (100, 0, "Invalid offset for"),
        (2**63, 1, "Invalid offset for"),
        (-1, 1, "Invalid offset for"),
        (99, 2, r"Invalid offset \+ byte size for"),
        (0, 2**63, r"Invalid offset \+ byte size for"),
        (0, -1, r"Invalid offset \+ byte size for"),
    ],
)
def test_places_outside(key: str, offset: int, byte_size: int, text: str) -> None:
    """H-200."""
    with pytest.raises(InvalidArgument, match=f"^{text} shared memory region: 'r'$"):
        region(key).check(offset, byte_size)


def test_truncated(key: str) -> None:
    part = region(key)
    os.truncate(f"/dev/shm{key}", 20)
    with pytest.raises(InvalidArgument, match="has 20 bytes left, 30 are needed"):
        part.read_into(memoryview(bytearray(20)), 10)
    with pytest.raises(InvalidArgument, match="has 20 bytes left, 30 are needed"):
        part.write_from([bytes(20)], 10)
    assert os.stat(f"/dev/shm{key}").st_size == 20
    part.read_into(memoryview(bytearray(10)), 10)


def test_descriptor_lives_as_long_as_requests(key: str) -> None:
    """H-194."""
    fd = open_shared_memory("r", key)
    part = Region("r", "system", fd, 0, 100)
    part.acquire()
    part.acquire()
    part.retire()
    part.release()
    assert is_open(fd)
    part.read_into(memoryview(bytearray(1)), 0)
    part.release()
    assert not is_open(fd)


@pytest.mark.parametrize(
    ("number", "told", "logged"),
    [
        (errno.ENOENT, "IPC namespace", "No such file"),
        (errno.EACCES, "has to be allowed", "it belongs to user"),
        (errno.EISDIR, "", ""),
    ],
)
def test_why_an_object_cannot_be_opened(
    key: str, monkeypatch: pytest.MonkeyPatch, number: int, told: str, logged: str
) -> None:
    """P4: errno and the usual cause; whose the object is stands in the log alone."""
    warnings: list[str] = []
    monkeypatch.setattr(regions.log, "warning", warnings.append)

    def refuse(*_arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(Internal, match="Unable to open shared memory region") as raised:
            open_shared_memory("r", key)
    assert errno.errorcode[number] in raised.value.text
    assert told in raised.value.text
    assert "user" not in raised.value.text
    [warning] = warnings
    assert errno.errorcode[number] in warning
    assert f"/dev/shm/{key.lstrip('/')}" in warning
    assert logged in warning
