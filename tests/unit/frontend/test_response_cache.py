"""The response cache by itself: keys, eviction, memory, requests that wait for an equal one (spec 6.10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeRoute, spec, words

from forebay.frontend.inference import OutputView, RequestMeta
from forebay.frontend.response_cache import ENTRY_BYTES, KeyInput, ResponseCache, request_key
from forebay.ipc.counters import CACHE_WORDS, CacheCounter
from forebay.ipc.messages import ParameterValue

ENTRY_OF_64 = 64 + ENTRY_BYTES


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def route(engine: FakeEngine) -> FakeRoute:
    return engine.add("m", (spec("X"),), (spec("Y"),))


def make_cache(engine: FakeEngine, size_bytes: int) -> ResponseCache:
    return ResponseCache(engine.client, size_bytes, words(CACHE_WORDS))


def key(route: int = 1, data: bytes = b"12345678", **more: Any) -> bytes:
    tensor = KeyInput(more.pop("name", "X"), more.pop("datatype", "FP32"), more.pop("shape", (1, 2)), memoryview(data))
    return request_key(route, RequestMeta(**more), [tensor])


def output(size: int, fill: int = 1) -> list[OutputView]:
    return [OutputView("Y", "UINT8", (size,), bytes([fill]) * size)]


def test_equal_requests_have_equal_keys_whatever_their_ids() -> None:
    assert key(id="a") == key(id="b")
    assert len(key()) == 16
    two = [KeyInput("A", "FP32", (1,), b"1234"), KeyInput("B", "FP32", (1,), b"5678")]
    assert request_key(1, RequestMeta(), two) == request_key(1, RequestMeta(), two[::-1])
    assert key(outputs=("a", "b")) == key(outputs=("b", "a"))


@pytest.mark.parametrize(
    "other",
    [
        {"route": 2},
        {"data": b"12345679"},
        {"shape": (2, 1)},
        {"datatype": "INT32"},
        {"name": "Z"},
        {"outputs": ("Y",)},
        {"parameters": {"a": 1}},
        {"sequence_id": 3},
        {"sequence_start": True},
    ],
)
def test_what_a_model_can_see_changes_the_key(other: dict[str, Any]) -> None:
    """L-008."""
    assert key(**other) != key()


def test_parameters_differ_by_type() -> None:
    keys = {key(parameters={"a": value}) for value in (1, True, 1.0, "1")}
    assert len(keys) == 4


def test_bytes_cannot_move_from_one_input_to_the_next() -> None:
    one = [KeyInput("A", "BYTES", (1,), b"ab"), KeyInput("B", "BYTES", (1,), b"c")]
    two = [KeyInput("A", "BYTES", (1,), b"a"), KeyInput("B", "BYTES", (1,), b"bc")]
    assert request_key(1, RequestMeta(), one) != request_key(1, RequestMeta(), two)


def test_an_answer_is_found_where_it_was_put(engine: FakeEngine, route: FakeRoute) -> None:
    cache = make_cache(engine, 10_000)
    assert cache.find(key(), route.client, 0) is None
    cache.insert(key(), route.client, output(10, 7), {"p": 1})
    entry = cache.find(key(), route.client, 0)
    assert entry is not None
    (view,) = entry.views()
    assert (view.name, view.datatype, view.shape, bytes(view.data)) == ("Y", "UINT8", (10,), b"\x07" * 10)
    assert entry.parameters == {"p": 1}


def test_the_least_recently_used_go_first_and_the_size_is_never_exceeded(engine: FakeEngine, route: FakeRoute) -> None:
    """S-173."""
    cache = make_cache(engine, 3 * ENTRY_OF_64)
    keys = [key(data=bytes([number])) for number in range(4)]
    for number in range(3):
        cache.insert(keys[number], route.client, output(64), {})
    cache.find(keys[0], route.client, 0)
    cache.insert(keys[3], route.client, output(64), {})
    assert [cache.find(found, route.client, 0) is not None for found in keys] == [True, False, True, True]
    assert cache.used_bytes == 3 * ENTRY_OF_64
    cache.insert(key(data=b"large"), route.client, output(2 * 64 + ENTRY_BYTES), {})
    assert cache.used_bytes <= cache.size_bytes


def test_an_answer_larger_than_the_cache_is_not_kept(engine: FakeEngine, route: FakeRoute) -> None:
    cache = make_cache(engine, ENTRY_OF_64)
    cache.insert(key(), route.client, output(64), {})
    cache.insert(key(data=b"other"), route.client, output(65), {})
    assert cache.entry_count == 1
    assert cache.find(key(), route.client, 0) is not None


def test_answers_of_models_that_are_gone_are_dropped(engine: FakeEngine, route: FakeRoute) -> None:
    """Better than S-176: the key names the loaded version, and nothing of an old one stays."""
    cache = make_cache(engine, 10_000)
    used_bytes = engine.blocks.used_bytes
    cache.insert(key(), route.client, output(64), {})
    del engine.routes[route.route]
    cache.forget_retired()
    assert (cache.entry_count, cache.used_bytes) == (0, 0)
    assert engine.blocks.used_bytes == used_bytes


def test_a_held_answer_outlives_its_eviction(engine: FakeEngine, route: FakeRoute) -> None:
    cache = make_cache(engine, ENTRY_OF_64)
    cache.insert(key(), route.client, output(64, 5), {})
    entry = cache.find(key(), route.client, 0)
    assert entry is not None
    entry.hold()
    (view,) = entry.views()
    cache.insert(key(data=b"next"), route.client, output(64, 6), {})
    assert bytes(view.data) == b"\x05" * 64
    used_bytes = engine.blocks.used_bytes
    entry.release()
    assert engine.blocks.used_bytes == used_bytes - 64


def test_a_full_arena_keeps_no_answers(engine: FakeEngine, route: FakeRoute) -> None:
    cache = make_cache(engine, 1 << 21)
    taken = engine.allocate(engine.blocks.byte_size)
    cache.insert(key(), route.client, output(64), {})
    assert cache.entry_count == 0
    engine.free(taken, engine.blocks.byte_size)


def test_counters(engine: FakeEngine, route: FakeRoute) -> None:
    """M-054."""
    counters = words(CACHE_WORDS)
    cache = ResponseCache(engine.client, 2 * ENTRY_OF_64, counters)
    for number in (0, 1, 2):
        cache.find(key(data=bytes([number])), route.client, 0)
        cache.insert(key(data=bytes([number])), route.client, output(64), {})
    cache.find(key(data=b"\x02"), route.client, 0)
    assert counters[CacheCounter.LOOKUPS] == 4
    assert counters[CacheCounter.HITS] == 1
    assert counters[CacheCounter.MISSES] == 3
    assert counters[CacheCounter.EVICTIONS] == 1
    assert counters[CacheCounter.ENTRIES] == 2
    assert counters[CacheCounter.USED_BYTES] == counters[CacheCounter.SIZE_BYTES] == 2 * ENTRY_OF_64


class Waiting:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def leader_answered(self, outputs: Sequence[OutputView], parameters: Mapping[str, ParameterValue]) -> None:
        self.told.append(f"answered {len(outputs)} {dict(parameters)}")

    def leader_failed(self) -> None:
        self.told.append("failed")


def test_equal_requests_wait_for_the_one_that_runs(engine: FakeEngine, route: FakeRoute) -> None:
    """S-177, L-009."""
    cache = make_cache(engine, 10_000)
    leader, second, third = Waiting(), Waiting(), Waiting()
    assert cache.join(key(), leader) is False
    assert cache.join(key(), second) is True
    assert cache.join(key(), third) is True
    cache.leave(key(), third)
    cache.answered(key(), output(1), {"p": 1})
    assert (leader.told, second.told, third.told) == ([], ["answered 1 {'p': 1}"], [])
    assert cache.join(key(), leader) is False
    cache.join(key(), second)
    cache.failed(key())
    assert second.told[-1] == "failed"


def test_values_are_copied_in_whole(engine: FakeEngine, route: FakeRoute) -> None:
    cache = make_cache(engine, 100_000)
    first, second = np.arange(100, dtype=np.float32), np.arange(7, dtype=np.int64)
    views = [
        OutputView("A", "FP32", (100,), memoryview(first).cast("B")),
        OutputView("B", "INT64", (7,), memoryview(second).cast("B")),
    ]
    cache.insert(key(), route.client, views, {})
    entry = cache.find(key(), route.client, 0)
    assert entry is not None
    found = entry.views()
    assert [bytes(view.data) for view in found] == [first.tobytes(), second.tobytes()]
