"""Blocks of counters: zeroed, apart from each other, seen by every mapping."""

from __future__ import annotations

import os

from forebay.ipc.counters import (
    COUNTED_BATCH_MAX,
    COUNTERS_BYTES,
    PRODUCER_WORDS,
    SCHEDULER_WORDS,
    CountersFile,
    InstanceCounter,
    ProducerCounter,
    SchedulerCounter,
    counted_batch,
    instance_words,
)


def test_every_counter_has_its_word_inside_the_block() -> None:
    assert max(ProducerCounter) < PRODUCER_WORDS
    assert max(SchedulerCounter) < SCHEDULER_WORDS
    assert all(counter < InstanceCounter.BATCH_SIZES for counter in InstanceCounter if counter.name != "BATCH_SIZES")
    for enum in (ProducerCounter, SchedulerCounter, InstanceCounter):
        assert len(set(enum)) == len(enum.__members__)
    assert instance_words(0) == instance_words(1) == InstanceCounter.BATCH_SIZES + 4


def test_what_one_process_writes_another_reads() -> None:
    own = CountersFile()
    offset = own.allocate(SCHEDULER_WORDS)
    other = CountersFile(os.dup(own.fd))
    other.block(offset, SCHEDULER_WORDS)[SchedulerCounter.BATCHES] += 5
    assert own.block(offset, SCHEDULER_WORDS)[SchedulerCounter.BATCHES] == 5


def test_blocks_are_apart_and_a_used_one_comes_back_zeroed() -> None:
    counters = CountersFile()
    first, second = counters.allocate(10), counters.allocate(10)
    assert first
    assert abs(first - second) >= 80
    counters.block(first, 10)[3] = 2**64 - 1
    assert list(counters.block(second, 10)) == [0] * 10
    counters.free(first, 10)
    assert counters.allocate(10) == first
    assert list(counters.block(first, 10)) == [0] * 10


def test_a_block_is_bounded_whatever_batch_size_a_model_allows() -> None:
    """Triton loads a model of any ``max_batch_size``; there may be 1024 instances of it (spec C-006, C-093)."""
    words = instance_words(2**31 - 1)
    assert words == instance_words(COUNTED_BATCH_MAX)
    assert [counted_batch(rows) for rows in (1, COUNTED_BATCH_MAX, 10**6)] == [1, COUNTED_BATCH_MAX, COUNTED_BATCH_MAX]
    counters = CountersFile()
    assert len({counters.allocate(words) for _ in range(1024)}) == 1024


def test_file_has_room_for_thousands_of_routes() -> None:
    counters = CountersFile()
    offsets = {counters.allocate(instance_words(64)) for _ in range(2000)}
    assert len(offsets) == 2000
    assert max(offsets) < COUNTERS_BYTES
