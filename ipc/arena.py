"""One shared mapping per producer, and the blocks it is cut into.

An arena is an anonymous memory file, sealed against shrinking and growing and handed over by descriptor: it has no name
that could leak or be guessed, and a mapping of it can never fault because somebody truncated it. The producer alone
decides which bytes are free (:class:`BlockAllocator`, private memory); every other process sees places in messages and
checks them with :meth:`Arena.check`.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import mmap
import os

from forebay.ipc.errors import ArenaFull, Internal

#: Every block, slab area and tensor starts at a multiple of this (a cache line, and what AVX-512 wants).
ALIGNMENT = 64

_FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def align(size: int) -> int:
    """Round up to :data:`ALIGNMENT`."""
    return (size + ALIGNMENT - 1) & -ALIGNMENT


def create_memory_file(name: str, byte_size: int) -> int:
    """Return the descriptor of a zeroed anonymous file of fixed size; pages cost nothing until touched."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, byte_size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Arena:
    """A mapping of one arena file in this process. Owns the mapping and its duplicate of the descriptor."""

    def __init__(self, fd: int, byte_size: int, *, keeps_pages: bool = False) -> None:
        """Map ``fd``; the caller keeps ownership of ``fd`` itself.

        Args:
            keeps_pages: workers may page-lock it: nothing is ever discarded.
        """
        if os.fstat(fd).st_size < byte_size:
            raise Internal("arena file is smaller than announced")
        self._fd = os.dup(fd)
        self.byte_size = byte_size
        #: Nothing is ever discarded.
        self.keeps_pages = keeps_pages
        self._map = mmap.mmap(self._fd, byte_size)
        #: uint8 [byte_size], writable, shared
        self.view = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        #: Where the mapping starts in this process.
        self.address = ctypes.addressof(anchor)
        del anchor

    def check(self, offset: int, byte_size: int) -> None:
        """Raise ``Internal`` unless ``[offset, offset + byte_size)`` lies inside the arena."""
        if offset < 0 or byte_size < 0 or offset + byte_size > self.byte_size:
            raise Internal("message names a place outside its arena")

    def slice(self, offset: int, byte_size: int) -> memoryview:
        """Return the checked place as a writable view."""
        self.check(offset, byte_size)
        return self.view[offset : offset + byte_size]

    def discard(self, offset: int, byte_size: int) -> None:
        """Give whole pages inside a free range back to the kernel; they read as zero afterwards.

        A GPU would go on reading and writing the pages that it knows, when everybody else has others in their place.
        """
        if self.keeps_pages:
            return
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + byte_size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            _libc.fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, first, last - first)

    def close(self) -> None:
        """Unmap, unless arrays still look into the mapping: then the mapping lives until they are gone."""
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass
        os.close(self._fd)


class BlockAllocator:
    """First fit with coalescing over ``[0, byte_size)``; low addresses first, so that few pages are ever touched."""

    def __init__(self, byte_size: int) -> None:
        self.byte_size = byte_size
        self.used_bytes = 0
        self._starts = [0]
        self._sizes = [byte_size]

    def allocate(self, byte_size: int) -> int:
        """Return the offset of a free block of ``align(byte_size)`` bytes.

        Raises:
            ArenaFull: no hole is large enough.
        """
        size = align(max(byte_size, 1))
        sizes = self._sizes
        for index, hole in enumerate(sizes):
            if hole >= size:
                start = self._starts[index]
                if hole == size:
                    del self._starts[index], sizes[index]
                else:
                    self._starts[index] = start + size
                    sizes[index] = hole - size
                self.used_bytes += size
                return start
        raise ArenaFull(
            f"no room for {byte_size} bytes of tensors in shared memory, {self.used_bytes} of {self.byte_size} bytes "
            "are in use by requests in flight; raise --arena-byte-size or send fewer requests at a time"
        )

    def free(self, offset: int, byte_size: int) -> None:
        """Give a block back; ``byte_size`` as it was asked for."""
        size = align(max(byte_size, 1))
        self.used_bytes -= size
        index = bisect.bisect_left(self._starts, offset)
        if index < len(self._starts) and offset + size == self._starts[index]:
            self._starts[index] = offset
            self._sizes[index] += size
        else:
            self._starts.insert(index, offset)
            self._sizes.insert(index, size)
        if index > 0 and self._starts[index - 1] + self._sizes[index - 1] == offset:
            self._sizes[index - 1] += self._sizes[index]
            del self._starts[index], self._sizes[index]
