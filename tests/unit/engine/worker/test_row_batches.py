"""What batches leave in an instance's block of counters."""

from __future__ import annotations

from forebay.engine.worker.row_batches import BatchCounters
from forebay.ipc.counters import COUNTED_BATCH_MAX, InstanceCounter, instance_words


def test_batches_beyond_the_sizes_that_are_told_apart_are_counted_with_the_largest() -> None:
    """Spec H-235; the block of a model with a large ``max_batch_size`` has no words for them."""
    words = instance_words(10**6)
    block = memoryview(bytearray(8 * words)).cast("Q")
    for rows in (COUNTED_BATCH_MAX, COUNTED_BATCH_MAX + 1, 10**6):
        BatchCounters(block).succeeded(1, rows, 0, 1, (1, 3, 7, 15))
    assert block[InstanceCounter.INFERENCES] == 2 * COUNTED_BATCH_MAX + 1 + 10**6
    assert list(block[words - 4 :]) == [3, 3 * 2, 3 * 4, 3 * 8]
    assert not any(block[InstanceCounter.BATCH_SIZES : words - 4])
