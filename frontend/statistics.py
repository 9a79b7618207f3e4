"""What a model version has done, summed from the counters in shared memory. HTTP, gRPC and metrics frontends.

Every word has one writer: instances' blocks are written by workers, the (frontend, route) blocks by frontends, a
route's own block by the scheduler. A reader sums them; the sum is not a snapshot across processes, and each word
only grows. Meanings: spec H-231..H-240.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import (
    LATENCY_WORDS,
    PRODUCER_WORDS,
    RESPONSE_FIELDS,
    RESPONSE_WORDS,
    RESPONSES_MAX,
    SCHEDULER_WORDS,
    InstanceCounter,
    ProducerCounter,
    counted_batch,
)

#: uint64 words of the whole counters file.
Words = memoryview

_WORD_BYTES = 8
#: Words per batch size: executions, input ns, infer ns, output ns.
_BATCH_SIZE_WORDS = 4


class BatchSizeTotals(msgspec.Struct, frozen=True):
    """Executions with one batch size and the nanoseconds they took, once per execution (spec H-235)."""

    batch_size: int
    executions: int
    input_ns: int
    infer_ns: int
    output_ns: int


def sum_blocks(words: Words, offsets: Iterable[int], count: int) -> list[int]:
    """Return ``count`` words, each summed over the blocks at these byte offsets; offset 0 means none."""
    totals = [0] * count
    for offset in offsets:
        if offset:
            first = offset // _WORD_BYTES
            totals = [total + word for total, word in zip(totals, words[first : first + count], strict=True)]
    return totals


class ModelTotals:
    """The counters of one model version, summed over its instances and over all frontends."""

    __slots__ = ("_words", "entry", "instances", "last_inference_ms", "producers", "scheduler")

    def __init__(self, words: Words, entry: ModelEntry) -> None:
        """Read now; ``words``: uint64, the whole counters file."""
        self._words = words
        self.entry = entry
        #: Sums by :class:`InstanceCounter`, up to the words per batch size.
        self.instances = sum_blocks(words, entry.instance_counter_offsets, InstanceCounter.BATCH_SIZES)
        #: Sums by :class:`ProducerCounter`.
        self.producers = sum_blocks(words, entry.producer_counter_offsets, PRODUCER_WORDS)
        #: The route's ``SchedulerCounter`` words.
        self.scheduler = sum_blocks(words, (entry.scheduler_counter_offset,), SCHEDULER_WORDS)
        #: Wall clock milliseconds of the last execution; 0: none.
        self.last_inference_ms = max(
            (
                words[offset // _WORD_BYTES + InstanceCounter.LAST_INFERENCE_MS]
                for offset in entry.instance_counter_offsets
                if offset
            ),
            default=0,
        )

    @property
    def success_count(self) -> int:
        """Requests answered, as the frontends count them."""
        return self.producers[ProducerCounter.SUCCESS]

    def batch_sizes(self) -> list[BatchSizeTotals]:
        """Return one record per batch size that occurred, smallest first."""
        sizes = counted_batch(max(self.entry.max_batch_size, 1))
        first = InstanceCounter.BATCH_SIZES
        offsets = [offset + first * _WORD_BYTES for offset in self.entry.instance_counter_offsets if offset]
        totals = sum_blocks(self._words, offsets, sizes * _BATCH_SIZE_WORDS)
        return [
            BatchSizeTotals(index + 1, *totals[index * _BATCH_SIZE_WORDS : (index + 1) * _BATCH_SIZE_WORDS])
            for index in range(sizes)
            if totals[index * _BATCH_SIZE_WORDS]
        ]


def response_statistics(words: Words, entry: ModelEntry) -> dict[str, dict[str, dict[str, int]]]:
    """Return what became of the responses of a decoupled model, by their index; empty for others (spec H-236)."""
    if not entry.decoupled or not entry.detail_offsets:
        return {}
    skipped = LATENCY_WORDS * _WORD_BYTES if entry.has_latencies else 0
    totals = sum_blocks(words, [offset + skipped for offset in entry.detail_offsets], RESPONSES_MAX * RESPONSE_WORDS)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for index in range(RESPONSES_MAX):
        own = totals[index * RESPONSE_WORDS : (index + 1) * RESPONSE_WORDS]
        if any(own):
            found[str(index)] = {
                field: {"count": own[2 * place], "ns": own[2 * place + 1]}
                for place, field in enumerate(RESPONSE_FIELDS)
            }
    return found


def model_statistics(words: Words, entry: ModelEntry) -> dict[str, object]:
    """Return one element of ``model_stats``, keys in Triton's order (spec H-231, appendix A)."""
    totals = ModelTotals(words, entry)
    instances, producers = totals.instances, totals.producers
    success = totals.success_count
    # What came from the cache was not computed (spec H-233).
    computed = max(success - producers[ProducerCounter.CACHE_HITS], 0)

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    memory_bytes = instances[InstanceCounter.MEMORY_BYTES]
    return {
        "name": entry.name,
        "version": str(entry.version),
        "last_inference": totals.last_inference_ms,
        "inference_count": instances[InstanceCounter.INFERENCES],
        "execution_count": instances[InstanceCounter.EXECUTIONS],
        "inference_stats": {
            "success": duration(success, producers[ProducerCounter.SUCCESS_NS]),
            "fail": duration(producers[ProducerCounter.FAILED], producers[ProducerCounter.FAILED_NS]),
            "queue": duration(success, instances[InstanceCounter.QUEUE_NS]),
            "compute_input": duration(computed, instances[InstanceCounter.INPUT_NS]),
            "compute_infer": duration(computed, instances[InstanceCounter.INFER_NS]),
            "compute_output": duration(computed, instances[InstanceCounter.OUTPUT_NS]),
            "cache_hit": duration(producers[ProducerCounter.CACHE_HITS], producers[ProducerCounter.CACHE_HIT_NS]),
            "cache_miss": duration(producers[ProducerCounter.CACHE_MISSES], producers[ProducerCounter.CACHE_MISS_NS]),
        },
        "response_stats": response_statistics(words, entry),
        "batch_stats": [
            {
                "batch_size": batch.batch_size,
                "compute_input": duration(batch.executions, batch.input_ns),
                "compute_infer": duration(batch.executions, batch.infer_ns),
                "compute_output": duration(batch.executions, batch.output_ns),
            }
            for batch in totals.batch_sizes()
        ],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": memory_bytes}] if memory_bytes else [],
    }
