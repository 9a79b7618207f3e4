"""Sums of counter blocks, and the shape of ``model_stats``."""

from __future__ import annotations

import msgspec
from fake_frontend import entry

from forebay.frontend.statistics import model_statistics, sum_blocks
from forebay.ipc.counters import (
    PRODUCER_WORDS,
    CountersFile,
    InstanceCounter,
    ProducerCounter,
    instance_words,
)


def test_blocks_are_summed_and_absent_ones_skipped() -> None:
    words = memoryview(bytearray(8 * 8)).cast("Q")
    words[2:4] = memoryview(bytearray((1).to_bytes(8, "little") + (2).to_bytes(8, "little"))).cast("Q")
    words[6:8] = memoryview(bytearray((2**63).to_bytes(8, "little") + (5).to_bytes(8, "little"))).cast("Q")
    assert sum_blocks(words, (16, 0, 48), 2) == [2**63 + 1, 7]
    assert sum_blocks(words, (), 2) == [0, 0]


def test_a_new_model_has_every_field_at_zero() -> None:
    """Spec H-231, H-232, H-240, E-075: keys, order and values."""
    words = CountersFile().words
    zero = b'{"count":0,"ns":0}'
    names = (
        b"success",
        b"fail",
        b"queue",
        b"compute_input",
        b"compute_infer",
        b"compute_output",
        b"cache_hit",
        b"cache_miss",
    )
    expected = (
        b'{"name":"cached","version":"1","last_inference":0,"inference_count":0,"execution_count":0,"inference_stats":{'
        + b",".join(b'"%s":%s' % (name, zero) for name in names)
        + b'},"response_stats":{},"batch_stats":[],"memory_usage":[]}'
    )
    assert msgspec.json.encode(model_statistics(words, entry("cached"))) == expected


def test_counters_of_all_instances_and_frontends_add_up() -> None:
    """Spec H-233, H-235: requests from the frontends, work from the instances, executions per batch size."""
    counters = CountersFile()
    instances = [counters.allocate(instance_words(4)) for _ in range(2)]
    producers = [counters.allocate(PRODUCER_WORDS) for _ in range(2)]
    for number, offset in enumerate(instances, 1):
        block = counters.block(offset, instance_words(4))
        block[InstanceCounter.INFERENCES] = 10 * number
        block[InstanceCounter.EXECUTIONS] = number
        block[InstanceCounter.QUEUE_NS] = 100
        block[InstanceCounter.INPUT_NS] = 200
        block[InstanceCounter.INFER_NS] = 300
        block[InstanceCounter.OUTPUT_NS] = 400
        block[InstanceCounter.LAST_INFERENCE_MS] = 1000 + number
        block[InstanceCounter.MEMORY_BYTES] = 5
        for word, value in enumerate((number, 7, 8, 9)):
            block[InstanceCounter.BATCH_SIZES + 4 * 1 + word] = value  # batch size 2
    block = counters.block(instances[1], instance_words(4))
    block[InstanceCounter.BATCH_SIZES + 4 * 3] = 1  # batch size 4, one instance only
    for offset in producers:
        block = counters.block(offset, PRODUCER_WORDS)
        block[ProducerCounter.SUCCESS] = 6
        block[ProducerCounter.SUCCESS_NS] = 600
        block[ProducerCounter.FAILED] = 1
        block[ProducerCounter.FAILED_NS] = 50
    model = entry(
        "m", max_batch_size=4, instance_counter_offsets=tuple(instances), producer_counter_offsets=tuple(producers)
    )
    assert model_statistics(counters.words, model) == {
        "name": "m",
        "version": "1",
        "last_inference": 1002,
        "inference_count": 30,
        "execution_count": 3,
        "inference_stats": {
            "success": {"count": 12, "ns": 1200},
            "fail": {"count": 2, "ns": 100},
            "queue": {"count": 12, "ns": 200},
            "compute_input": {"count": 12, "ns": 400},
            "compute_infer": {"count": 12, "ns": 600},
            "compute_output": {"count": 12, "ns": 800},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": 2,
                "compute_input": {"count": 3, "ns": 14},
                "compute_infer": {"count": 3, "ns": 16},
                "compute_output": {"count": 3, "ns": 18},
            },
            {
                "batch_size": 4,
                "compute_input": {"count": 1, "ns": 0},
                "compute_infer": {"count": 1, "ns": 0},
                "compute_output": {"count": 1, "ns": 0},
            },
        ],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 10}],
    }


def test_a_model_without_batching_has_batch_size_one() -> None:
    counters = CountersFile()
    offset = counters.allocate(instance_words(0))
    counters.block(offset, instance_words(0))[InstanceCounter.BATCH_SIZES] = 3
    statistics = model_statistics(counters.words, entry("m", max_batch_size=0, instance_counter_offsets=(offset,)))
    batch_stats = statistics["batch_stats"]
    assert isinstance(batch_stats, list)
    assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in batch_stats] == [(1, 3)]


def test_cache_hits_are_successes_that_were_not_computed() -> None:
    """Spec H-233, H-238."""
    counters = CountersFile()
    producer = counters.allocate(PRODUCER_WORDS)
    block = counters.block(producer, PRODUCER_WORDS)
    block[ProducerCounter.SUCCESS] = 5
    block[ProducerCounter.CACHE_HITS] = 2
    block[ProducerCounter.CACHE_HIT_NS] = 70
    block[ProducerCounter.CACHE_MISSES] = 3
    block[ProducerCounter.CACHE_MISS_NS] = 90
    model = entry("m", producer_counter_offsets=(producer,))
    stats = model_statistics(counters.words, model)["inference_stats"]
    assert isinstance(stats, dict)
    assert stats["queue"]["count"] == 5
    assert stats["compute_infer"]["count"] == 3
    assert stats["cache_hit"] == {"count": 2, "ns": 70}
    assert stats["cache_miss"] == {"count": 3, "ns": 90}
