"""Counters in shared memory: fixed layouts of unsigned 64-bit words, one writer each, read by anybody.

The supervisor owns one counters file and cuts blocks from it. A block has exactly one writing process, so no atomics
are needed; words are written through a cast memoryview, which stores all eight bytes at once (``struct.pack_into``
zero-fills first and must not be used here, FACTS 8).
"""

from __future__ import annotations

import enum
import mmap
import os

from forebay.ipc.arena import BlockAllocator, create_memory_file

#: Bytes of the counters file: sparse, pages cost nothing until used.
COUNTERS_BYTES = 256 * 1024 * 1024
#: Batch sizes that are counted one by one: configurations may allow millions, and each instance has a block for all.
COUNTED_BATCH_MAX = 4096


#: Buckets of a histogram of durations. Bucket i counts those below 1.024 us * 2**i; the last, those of 17 s and more.
#: A duration's bucket is ``(ns >> 10).bit_length()``, at most ``LAST_BUCKET``.
DURATION_BUCKETS = 26
LAST_BUCKET = DURATION_BUCKETS - 1


class InstanceCounter(enum.IntEnum):
    """Words of an instance's block, written by its worker. Durations are summed over requests (spec H-234)."""

    SUCCESS = 0
    FAILED_BACKEND = 1
    FAILED_OTHER = 2
    CANCELED = 3
    INFERENCES = 4
    EXECUTIONS = 5
    QUEUE_NS = 6
    INPUT_NS = 7
    INFER_NS = 8
    OUTPUT_NS = 9
    LAST_INFERENCE_MS = 10
    GATHERED_BYTES = 11
    SCATTERED_BYTES = 12
    SEGMENTS = 13
    FAIL_NS = 14
    BUSY_NS = 15
    BATCHES_GATHERED = 16
    MEMORY_BYTES = 17
    #: Since when the worker is executing a batch, monotonic ns; 0: it is not. Whoever forks it clears the word.
    RUNNING_SINCE_NS = 18
    #: What crossed between host and device, how long the device was busy, and how often a graph was used.
    DEVICE_COPIES_IN = 19
    DEVICE_BYTES_IN = 20
    DEVICE_BYTES_OUT = 21
    DEVICE_NS = 22
    GRAPH_LAUNCHES = 23
    #: From here, one word per bucket: requests by how long they waited, and by how long their batch was executed.
    QUEUE_BUCKETS = 24
    COMPUTE_BUCKETS = 50
    #: From here, four words per batch size (1 first): executions, input ns, infer ns, output ns.
    BATCH_SIZES = 76


class ProducerCounter(enum.IntEnum):
    """Words of a (frontend, route) block, written by that frontend."""

    SUCCESS = 0
    SUCCESS_NS = 1
    FAILED = 2
    FAILED_NS = 3
    COPIED_IN_BYTES = 4
    COPIED_OUT_BYTES = 5
    REJECTED = 6
    CANCELED = 7
    FAILED_BACKEND = 8
    FAILED_OTHER = 9
    ROWS_IN_USE = 10
    ROWS_CAPACITY = 11
    BLOCK_BYTES_IN_USE = 12
    GRANTED_BATCHES = 13
    RESUBMITTED = 14
    #: Ensemble requests in flight that use the route in one of their steps; goes down again.
    ENSEMBLE_USES = 15
    CACHE_HITS = 16
    CACHE_MISSES = 17
    CACHE_HIT_NS = 18
    CACHE_MISS_NS = 19
    #: Outputs that the next steps of an ensemble read from the GPU's memory.
    DEVICE_PASSED_BYTES = 20
    #: Requests that the frontend keeps back for an instance that it was granted; goes down again.
    REQUESTS_HELD = 21
    #: From here, one word per bucket: answered requests by how long they took.
    REQUEST_BUCKETS = 24


#: Words of a producer block.
PRODUCER_WORDS = 56


class Stage(enum.IntEnum):
    """What summaries are made of (spec M-030..M-032)."""

    REQUEST = 0
    QUEUE = 1
    INPUT = 2
    INFER = 3
    OUTPUT = 4
    FIRST_RESPONSE = 5
    CACHE_HIT = 6
    CACHE_MISS = 7


#: Buckets of a stage: single microseconds up to 16, then eight per doubling; the last ends after 71 minutes.
FINE_BUCKETS = 240
#: Words per stage: the sum in microseconds, then the buckets.
STAGE_WORDS = 1 + FINE_BUCKETS
#: Words that a (frontend, route) block has if latencies are summarised.
LATENCY_WORDS = len(Stage) * STAGE_WORDS

#: Responses of one request that are counted one by one (spec H-236).
RESPONSES_MAX = 256
#: Words per response index: count and ns of what :data:`RESPONSE_FIELDS` names.
RESPONSE_FIELDS = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")
RESPONSE_WORDS = 2 * len(RESPONSE_FIELDS)


def fine_bucket(us: int) -> int:
    """Return the bucket of a duration in microseconds."""
    bits = us.bit_length()
    if bits <= 4:
        return us
    index = 16 + (bits - 5) * 8 + ((us >> (bits - 4)) & 7)
    return index if index < FINE_BUCKETS else FINE_BUCKETS - 1


def fine_bucket_range(index: int) -> tuple[int, int]:
    """Return the microseconds from which, and below which, durations are counted in a bucket."""
    if index < 16:
        return index, index + 1
    octave, part = divmod(index - 16, 8)
    return (8 + part) << (octave + 1), (9 + part) << (octave + 1)


def detail_words(*, has_latencies: bool, is_decoupled: bool) -> int:
    """Words of a (frontend, route) block for details: latencies first, then responses; 0: there is none."""
    return (LATENCY_WORDS if has_latencies else 0) + (RESPONSES_MAX * RESPONSE_WORDS if is_decoupled else 0)


class CacheCounter(enum.IntEnum):
    """Words of a frontend's block for its part of the response cache, written by that frontend."""

    SIZE_BYTES = 0
    USED_BYTES = 1
    ENTRIES = 2
    HITS = 3
    MISSES = 4
    LOOKUPS = 5
    EVICTIONS = 6
    LOOKUP_NS = 7
    INSERTION_NS = 8


#: Words of a cache block.
CACHE_WORDS = 16


class SchedulerCounter(enum.IntEnum):
    """Words of a route's block, written by the scheduler."""

    PENDING = 0
    REJECTED = 1
    TIMED_OUT = 2
    CANCELED = 3
    BATCHES = 4
    GRANTS = 5
    REVOKES = 6
    LOST_BATCHES = 7


#: Words of a scheduler block.
SCHEDULER_WORDS = 16


def instance_words(max_batch_size: int) -> int:
    """Words of an instance's block for a model of that batch size."""
    return InstanceCounter.BATCH_SIZES + 4 * counted_batch(max(max_batch_size, 1))


def counted_batch(rows: int) -> int:
    """Return the batch size as which a batch of so many rows is counted: the largest one holds all that are larger."""
    return min(rows, COUNTED_BATCH_MAX)


class CountersFile:
    """A mapping of the counters file. The supervisor also allocates blocks in it."""

    def __init__(self, fd: int | None = None) -> None:
        """Map ``fd`` (the caller keeps it) or create a new file."""
        self.fd = create_memory_file("forebay-counters", COUNTERS_BYTES) if fd is None else os.dup(fd)
        self._map = mmap.mmap(self.fd, COUNTERS_BYTES)
        #: uint64 words of the whole file
        self.words = memoryview(self._map).cast("Q")
        self._allocator = BlockAllocator(COUNTERS_BYTES)
        # Offset 0 means "none" in messages.
        self._allocator.allocate(64)

    def allocate(self, words: int) -> int:
        """Return the byte offset of a zeroed block of ``words`` words."""
        offset = self._allocator.allocate(words * 8)
        self.words[offset // 8 : offset // 8 + words] = memoryview(bytes(words * 8)).cast("Q")
        return offset

    def free(self, offset: int, words: int) -> None:
        """Give a block back; its writer must have ended."""
        self._allocator.free(offset, words * 8)

    def block(self, offset: int, words: int) -> memoryview:
        """Return the words of one block: uint64 [words], writable."""
        first = offset // 8
        return self.words[first : first + words]
