"""The three forms of the statistics URL, and explain."""

from __future__ import annotations

import json

import pytest
from fake_frontend import FakeControl, ask, entry, make_context


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/models/stats", [("a", "1"), ("m", "1"), ("m", "3"), ("stats", "1")]),
        ("/v2/models/m/stats", [("m", "1"), ("m", "3")]),
        ("/v2/models/m/versions/3/stats", [("m", "3")]),
        ("/v2/models/stats/stats", [("stats", "1")]),
    ],
)
def test_ready_versions_only(path: str, expected: list[tuple[str, str]]) -> None:
    """Spec H-230, H-006: ``/v2/models/stats`` is never the model of that name."""
    context = make_context(
        entry("m", 3),
        entry("m", 1),
        entry("a"),
        entry("stats"),
        entry("m", 4, "LOADING"),
        entry("bad", 1, "UNAVAILABLE"),
    )
    answer = ask(context, "GET", path)
    assert answer.headers["content-type"] == "application/json"
    found = json.loads(answer.body)
    assert list(found) == ["model_stats"]
    assert [(model["name"], model["version"]) for model in found["model_stats"]] == expected


def test_no_models_give_an_empty_array() -> None:
    assert ask(make_context(), "GET", "/v2/models/stats").body == b'{"model_stats":[]}'


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v2/models/nope/stats", "requested model 'nope' is not available"),  # E-078
        ("/v2/models/bad/stats", "requested model 'bad' is not available"),
        ("/v2/models/m/versions/2/stats", "requested model version is not available for model 'm'"),  # E-077
    ],
)
def test_unknown_models_are_400(path: str, text: str) -> None:
    """Spec H-239."""
    answer = ask(make_context(entry("m"), entry("bad", 1, "UNAVAILABLE")), "GET", path)
    assert answer.triple == (400, "application/json", b'{"error":"%s"}' % text.encode())


def test_explain_shows_the_last_batches() -> None:
    context = make_context(entry("m", 3), replies={"explain": [{"rows": 3, "reason": "preferred"}]})
    assert ask(context, "GET", "/forebay/explain/m").triple == (
        200,
        "application/json",
        b'{"model":"m","version":"3","batches":[{"rows":3,"reason":"preferred"}]}',
    )
    assert isinstance(context.control, FakeControl)
    assert context.control.commands == [("explain", {"model": "m", "version": 3})]
    assert ask(context, "GET", "/forebay/explain/nope").status == 404
