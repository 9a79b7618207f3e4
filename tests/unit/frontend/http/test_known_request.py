"""Which requests are parsed and checked only once."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.frontend.codec.infer_request import ParsedInfer, parse_infer_request
from forebay.frontend.http.known_request import (
    PLAN_JSON_BYTES_MAX,
    PLANS_PER_HEAD_MAX,
    find_plan,
    is_repeatable,
    remember,
    uses_regions,
)

BINARY = {"name": "A", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
STRINGS = {"name": "S", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 8}}
REGION = {
    "name": "Y",
    "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8},
}


def parsed(**document: Any) -> tuple[ParsedInfer, Any]:
    """Return a request and its head."""
    text = json.dumps({"inputs": [BINARY], **document}).encode()
    request = parse_infer_request(text + bytes(8), len(text), model_name="m", max_json_bytes=1 << 20)
    return request, SimpleNamespace(is_plain=True, json_bytes=len(text), plans={})


def test_equal_json_with_binary_numbers_is_an_equal_request() -> None:
    """Whatever it says besides: it says it every time."""
    request, head = parsed(id="7", parameters={"sequence_id": 3, "sequence_start": True, "mine": "x"})
    assert is_repeatable(head, request)


def test_regions_are_named_by_the_json_but_found_anew_each_time() -> None:
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    inside = {"name": "A", "datatype": "FP32", "shape": [2], "parameters": place}
    text = json.dumps({"inputs": [inside], "outputs": [REGION]}).encode()
    request = parse_infer_request(text, len(text), model_name="m", max_json_bytes=1 << 20)
    # Without tensors in the body, clients do not say how long the JSON is.
    head: Any = SimpleNamespace(is_plain=True, json_bytes=-1, plans={})
    assert is_repeatable(head, request)
    assert uses_regions(request)
    assert not uses_regions(parsed()[0])
    remember(head, memoryview(text), "known")
    assert find_plan(head, memoryview(text)) == "known"
    remember(head, memoryview(bytes(PLAN_JSON_BYTES_MAX + 1)), "too long")
    assert len(head.plans) == 1


@pytest.mark.parametrize(
    "document",
    [
        {"inputs": [STRINGS]},
        {"inputs": [BINARY, {"name": "B", "datatype": "INT8", "shape": [1], "data": [1]}]},
    ],
    ids=["strings must be looked at", "values in the JSON"],
)
def test_requests_that_are_looked_at_every_time(document: dict[str, Any]) -> None:
    request, head = parsed(**document)
    assert not is_repeatable(head, request)


def test_long_json_and_unusual_heads_are_not_remembered() -> None:
    request, head = parsed()
    for changes in (
        {"is_plain": False},
        {"json_bytes": 0},
        {"json_bytes": -1},
        {"json_bytes": PLAN_JSON_BYTES_MAX + 1},
    ):
        assert not is_repeatable(SimpleNamespace(**{**vars(head), **changes}), request)  # type: ignore[arg-type]


def test_what_is_remembered_is_found_by_the_json_and_bounded() -> None:
    """I-6."""
    head: Any = SimpleNamespace(json_bytes=4, plans={})
    remember(head, memoryview(b"{..}tensor"), "first")
    assert find_plan(head, memoryview(b"{..}other")) == "first"
    assert find_plan(head, memoryview(b"{,,}other")) is None
    for number in range(PLANS_PER_HEAD_MAX):
        remember(head, memoryview(b"%04d" % number), number)
    assert len(head.plans) <= PLANS_PER_HEAD_MAX
