"""Arenas cannot be shrunk under a reader, places outside them are refused, blocks never overlap."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.ipc.arena import ALIGNMENT, Arena, BlockAllocator, align, create_memory_file
from forebay.ipc.errors import ArenaFull, Internal

SIZE = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    fd = create_memory_file("test", SIZE)
    mapped = Arena(fd, SIZE)
    os.close(fd)
    yield mapped
    mapped.close()


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128), (4096, 4096)])
def test_align_rounds_up_to_a_cache_line(size: int, expected: int) -> None:
    assert align(size) == expected


def test_memory_file_is_sealed() -> None:
    """I-2: a mapping of it can never fault because somebody truncated it."""
    fd = create_memory_file("test", SIZE)
    for size in (0, SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_two_mappings_see_the_same_bytes() -> None:
    fd = create_memory_file("test", SIZE)
    one, other = Arena(fd, SIZE), Arena(fd, SIZE)
    os.close(fd)
    one.slice(100, 3)[:] = b"abc"
    assert bytes(other.slice(100, 3)) == b"abc"
    one.close()
    other.close()


def test_file_that_is_smaller_than_announced_is_refused() -> None:
    fd = create_memory_file("test", 4096)
    with pytest.raises(Internal):
        Arena(fd, 8192)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 1), (0, -1), (SIZE, 1), (SIZE - 3, 4), (1 << 62, 1 << 62), (0, SIZE + 1)]
)
def test_places_outside_are_refused(arena: Arena, offset: int, size: int) -> None:
    """I-2: every number from another process is checked before it is used."""
    with pytest.raises(Internal, match="outside its arena"):
        arena.check(offset, size)


def test_places_at_the_edges_are_inside(arena: Arena) -> None:
    arena.check(0, SIZE)
    arena.check(SIZE, 0)


def test_discarded_pages_read_as_zero_and_neighbours_stay(arena: Arena) -> None:
    arena.slice(0, 20_000)[:] = b"x" * 20_000
    arena.discard(100, 12_188 - 100)
    assert bytes(arena.slice(0, 4096)) == b"x" * 4096
    assert bytes(arena.slice(4096, 4096)) == bytes(4096)
    assert bytes(arena.slice(8192, 20_000 - 8192)) == b"x" * (20_000 - 8192)


def test_pages_that_a_gpu_may_know_are_not_discarded() -> None:
    """A page-locked page would be the GPU's alone once everybody else has another in its place."""
    fd = create_memory_file("test", SIZE)
    mapped = Arena(fd, SIZE, keeps_pages=True)
    os.close(fd)
    mapped.slice(0, SIZE)[:] = b"x" * SIZE
    mapped.discard(0, SIZE)
    assert bytes(mapped.slice(0, SIZE)) == b"x" * SIZE
    mapped.close()


def test_closing_leaves_arrays_that_still_look_into_it_alive() -> None:
    fd = create_memory_file("test", SIZE)
    mapped = Arena(fd, SIZE)
    os.close(fd)
    view = mapped.slice(0, 4)
    mapped.close()
    assert bytes(view) == bytes(4)


def test_full_allocator_says_which_flag_to_raise() -> None:
    blocks = BlockAllocator(256)
    blocks.allocate(256)
    with pytest.raises(ArenaFull, match="--arena-byte-size"):
        blocks.allocate(1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2000)), max_size=120))
def test_blocks_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int]]) -> None:
    blocks = BlockAllocator(16_384)
    held: list[tuple[int, int]] = []
    for allocates, number in steps:
        if allocates or not held:
            try:
                offset = blocks.allocate(number)
            except ArenaFull:
                continue
            assert offset % ALIGNMENT == 0
            size = align(max(number, 1))
            assert 0 <= offset <= 16_384 - size
            assert all(offset + size <= start or start + align(max(n, 1)) <= offset for start, n in held)
            held.append((offset, number))
        else:
            blocks.free(*held.pop(number % len(held)))
        assert blocks.used_bytes == sum(align(max(number, 1)) for _offset, number in held)
    for block in held:
        blocks.free(*block)
    assert blocks.used_bytes == 0
    assert blocks.allocate(16_384) == 0
