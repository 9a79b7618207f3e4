"""What clients count is added to the server's counters, as far as it can be believed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from forebay.engine.supervisor.client_counts import STEP_MAX, ClientCounts
from forebay.ipc.arena import create_memory_file
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import PRODUCER_WORDS, CountersFile, ProducerCounter

_OFFSET = 128


class Bench:
    """One client, one version, and the counters of all clients."""

    def __init__(self) -> None:
        self.counters = CountersFile()
        self.fd = create_memory_file("client", 4096)
        self.entry = ModelEntry("m", 1, "READY", route=7, counter_offset=self.counters.allocate(PRODUCER_WORDS))
        self.served = [self.entry]
        self.counts = ClientCounts(self.counters, lambda: self.served)
        self.counts.add(1, self.fd, _OFFSET, self.entry)

    def write(self, word: ProducerCounter, value: int) -> None:
        os.pwrite(self.fd, value.to_bytes(8, "little"), _OFFSET + 8 * word)

    def total(self, word: ProducerCounter) -> int:
        self.counts.add_news()
        return self.counters.block(self.entry.counter_offset, PRODUCER_WORDS)[word]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    os.close(made.fd)


def test_only_what_is_new_is_added(bench: Bench) -> None:
    for value in (3, 3, 10):
        bench.write(ProducerCounter.SUCCESS, value)
        assert bench.total(ProducerCounter.SUCCESS) == value


def test_a_client_that_leaves_has_its_last_counts_added(bench: Bench) -> None:
    bench.write(ProducerCounter.SUCCESS, 5)
    bench.counts.remove(1)
    assert not bench.counts
    assert bench.total(ProducerCounter.SUCCESS) == 5


def test_nonsense_that_adds_up_to_more_than_a_word_starts_over(bench: Bench) -> None:
    bench.counters.block(bench.entry.counter_offset, PRODUCER_WORDS)[ProducerCounter.SUCCESS] = (1 << 64) - 2
    bench.write(ProducerCounter.SUCCESS, 5)
    assert bench.total(ProducerCounter.SUCCESS) == 3


def test_what_cannot_be_is_not_added(bench: Bench) -> None:
    bench.write(ProducerCounter.SUCCESS, 5)
    assert bench.total(ProducerCounter.SUCCESS) == 5
    for nonsense in (0, STEP_MAX * 2, 1, (1 << 64) - 1):
        bench.write(ProducerCounter.SUCCESS, nonsense)
        assert bench.total(ProducerCounter.SUCCESS) == 5
    bench.write(ProducerCounter.ENSEMBLE_USES, 1)
    assert bench.total(ProducerCounter.ENSEMBLE_USES) == 0


def test_a_version_that_is_gone_is_looked_at_no_more(bench: Bench) -> None:
    bench.served.clear()
    bench.write(ProducerCounter.SUCCESS, 5)
    assert bench.total(ProducerCounter.SUCCESS) == 0
    bench.served.append(bench.entry)
    assert bench.total(ProducerCounter.SUCCESS) == 0
