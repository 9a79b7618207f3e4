"""Trace settings over HTTP."""

from __future__ import annotations

import json

import pytest
from fake_frontend import FakeControl, ask, entry, make_context

from forebay.frontend.handlers.trace_settings import parse_trace_settings

CURRENT = {
    "trace_level": ["TIMESTAMPS"],
    "trace_rate": "1",
    "trace_count": "2",
    "log_frequency": "0",
    "trace_file": "OUT/trace.json",
    "trace_mode": "triton",
}
CURRENT_BODY = (
    b'{"trace_level":["TIMESTAMPS"],"trace_rate":"1","trace_count":"2","log_frequency":"0",'
    b'"trace_file":"OUT/trace.json","trace_mode":"triton"}'
)


def test_get_global_and_model_settings() -> None:
    """Spec H-250, E-017, E-139."""
    context = make_context(entry("f32"), replies={"trace_get": CURRENT})
    assert ask(context, "GET", "/v2/trace/setting").triple == (200, "application/json", CURRENT_BODY)
    assert ask(context, "GET", "/v2/models/f32/trace/setting").body == CURRENT_BODY
    assert isinstance(context.control, FakeControl)
    assert context.control.commands == [("trace_get", {"model": ""}), ("trace_get", {"model": "f32"})]


def test_unknown_model() -> None:
    """Spec H-259, E-018."""
    context = make_context(entry("id_all", 1, "UNAVAILABLE"))
    for method in ("GET", "POST"):
        assert ask(context, method, "/v2/models/id_all/trace/setting", b"{}").triple == (
            400,
            "application/json",
            b'{"error":"Request for unknown model : id_all"}',
        )


def test_post_changes_and_answers_everything() -> None:
    """Spec H-251, E-134, E-138."""
    context = make_context(entry("f32"), replies={"trace_set": CURRENT})
    body = b'{"trace_rate":"7","trace_level":["TENSORS","FOO","TIMESTAMPS"],"bogus":1,"trace_count":null}'
    assert ask(context, "POST", "/v2/models/f32/trace/setting", body).triple == (200, "application/json", CURRENT_BODY)
    settings = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": 7, "trace_count": None}
    assert isinstance(context.control, FakeControl)
    assert context.control.commands == [("trace_set", {"model": "f32", "settings": settings})]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"trace_level":"TIMESTAMPS"}', 500, "attempt to access JSON non-array as array"),  # E-129
        (b'{"trace_rate":10}', 500, "attempt to access JSON non-string as string"),  # E-130
        (b'{"trace_rate":"abc"}', 400, "Unable to parse 'trace_rate', got: abc"),  # E-131
        (b'{"trace_file":"x"}', 501, "trace file location can not be updated through network protocol"),  # E-133
        (b"", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),  # E-137
        (b'{"trace_level":["OFF","TIMESTAMPS"]}', 400, "Expect only one trace level 'OFF' is specified"),  # H-254
        (
            b'{"trace_rate":"4294967296"}',
            400,
            "Unable to parse 'trace_rate', value is out of range [ 0, 4294967295 ], got: 4294967296",
        ),
        (
            b'{"log_frequency":"2147483648"}',
            400,
            "Unable to parse 'log_frequency', value is out of range [ 0, 4294967295 ], got: 2147483648",
        ),
        (b'{"trace_count":"-2"}', 400, "Unable to parse 'trace_count'. Expecting value >= -1, got:-2"),
        (
            b'{"trace_count":"2147483648"}',
            400,
            "Unable to parse 'trace_count', value is out of range [ -1, 2147483647 ], got: 2147483648",
        ),
        (b'{"trace_count":""}', 400, "Unable to parse 'trace_count', got: "),
    ],
)
def test_bad_settings(body: bytes, status: int, text: str) -> None:
    """Spec H-252, H-253."""
    answer = ask(make_context(), "POST", "/v2/trace/setting", body)
    assert answer.triple == (status, "application/json", b'{"error":"%s"}' % text.encode())


@pytest.mark.parametrize(
    ("document", "settings"),
    [
        ({}, {}),
        ({"bogus": "x"}, {}),
        ({"trace_level": ["FOO"]}, {}),  # E-135
        ({"trace_level": ["OFF"]}, {"trace_level": ["OFF"]}),
        ({"trace_level": None, "trace_rate": None}, {"trace_level": None, "trace_rate": None}),  # H-256
        ({"trace_rate": " +7x"}, {"trace_rate": 7}),  # std::stoi
        ({"trace_count": "-1", "log_frequency": "5"}, {"trace_count": -1, "log_frequency": 5}),
        ({"trace_rate": "0", "log_frequency": "-1"}, {"trace_rate": 0, "log_frequency": 2**32 - 1}),
    ],
)
def test_parsed_settings(document: dict[str, object], settings: dict[str, object]) -> None:
    assert parse_trace_settings(json.loads(json.dumps(document))) == settings
