"""What shared-memory clients count of their requests, added to the server's counters.

A frontend counts in the counters file. A client must not be able to write there, so it counts in a block of its own
arena, and we read that every now and then and add what is new. A client that writes nonsense falsifies the counts of
its own requests, and by no more than :data:`STEP_MAX` at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import PRODUCER_WORDS, CountersFile, InstanceCounter, ProducerCounter, instance_words

#: By how much a word may grow between two looks: far more than honest requests take, nanoseconds included.
STEP_MAX = 1 << 50

_WORD_MAX = (1 << 64) - 1

#: Words that are not sums of what has ended; those of clients mean nothing.
_GAUGES = frozenset(
    (
        ProducerCounter.ROWS_IN_USE,
        ProducerCounter.ROWS_CAPACITY,
        ProducerCounter.BLOCK_BYTES_IN_USE,
        ProducerCounter.ENSEMBLE_USES,
    )
)


def words_of(entry: ModelEntry) -> int:
    """Return the words of a client's block for a version; an ensemble's steps are counted behind its requests."""
    return PRODUCER_WORDS + (instance_words(entry.max_batch_size) if entry.is_ensemble else 0)


class CountedBlock:
    """One client's block for one version."""

    __slots__ = ("_fd", "_last", "_offset", "_raw", "route")

    def __init__(self, fd: int, offset: int, entry: ModelEntry) -> None:
        """
        Args:
            fd: of the client's arena, which stays the caller's and open.
            offset: of the block in it, inside.
        """
        self.route = entry.route
        self._fd = fd
        self._offset = offset
        self._last = [0] * words_of(entry)
        self._raw = b""

    def add_news(self, counters: CountersFile, entry: ModelEntry) -> None:
        """Add what has been counted since the last time to the clients' counters of the version."""
        raw = b""
        with contextlib.suppress(OSError):
            raw = os.pread(self._fd, 8 * len(self._last), self._offset)
        if raw == self._raw or len(raw) != 8 * len(self._last):
            return
        self._raw = raw
        words = memoryview(raw).cast("Q")
        targets = (
            (0, counters.block(entry.counter_offset, PRODUCER_WORDS), _GAUGES),
            (
                PRODUCER_WORDS,
                counters.block(entry.step_counter_offset, len(self._last) - PRODUCER_WORDS),
                frozenset((InstanceCounter.LAST_INFERENCE_MS,)),
            ),
        )
        for first, target, skipped in targets:
            for index in range(len(target)):
                now = words[first + index]
                step = now - self._last[first + index]
                if 0 < step < STEP_MAX and index not in skipped:
                    # Even the sum of nonsense is a uint64.
                    target[index] = (target[index] + step) & _WORD_MAX
                self._last[first + index] = now


class ClientCounts:
    """Every block of every client."""

    def __init__(self, counters: CountersFile, entries: Callable[[], Iterable[ModelEntry]]) -> None:
        """
        Args:
            entries: what is served now, with the offsets of the clients' own counters.
        """
        self._counters = counters
        self._entries = entries
        self._blocks: dict[int, dict[int, CountedBlock]] = {}

    def add(self, client: int, fd: int, offset: int, entry: ModelEntry) -> None:
        """A client counts the requests of a version from now on; the caller has checked the place."""
        self._blocks.setdefault(client, {})[entry.route] = CountedBlock(fd, offset, entry)

    def remove(self, client: int) -> None:
        """A client is gone; its arena is still there."""
        self.add_news(client)
        self._blocks.pop(client, None)

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add_news(self, client: int | None = None) -> None:
        """Look at the blocks of one client, or of all."""
        entries = {entry.route: entry for entry in self._entries() if entry.route}
        for number in list(self._blocks) if client is None else [client]:
            blocks = self._blocks.get(number, {})
            for route, block in list(blocks.items()):
                entry = entries.get(route)
                if entry is None:
                    del blocks[route]
                else:
                    block.add_news(self._counters, entry)
