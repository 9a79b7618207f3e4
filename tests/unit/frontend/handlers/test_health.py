"""Liveness and readiness, over a real socket."""

from __future__ import annotations

import pytest
from fake_frontend import ask, entry, make_context


@pytest.mark.parametrize(("live", "ready"), [(True, True), (True, False), (False, False)])
def test_server_health_is_an_empty_200_or_400(live: bool, ready: bool) -> None:
    """Spec H-030, H-031, E-003."""
    context = make_context(live=live, ready=ready)
    assert ask(context, "GET", "/v2/health/live").triple == (200 if live else 400, "text/plain", b"")
    assert ask(context, "GET", "/v2/health/ready").triple == (200 if ready else 400, "text/plain", b"")


@pytest.mark.parametrize(
    ("path", "is_ready"),
    [
        ("/v2/models/m/ready", True),
        ("/v2/models/m/versions/1/ready", True),
        ("/v2/models/m/versions/01/ready", True),
        ("/v2/models/m/versions/2/ready", False),  # loading
        ("/v2/models/m/versions/9/ready", False),  # E-031
        ("/v2/models/nope/ready", False),  # E-011
        ("/v2/models/bad/ready", False),
    ],
)
def test_model_ready(path: str, is_ready: bool) -> None:
    """Spec H-033."""
    context = make_context(entry("m"), entry("m", 2, "LOADING"), entry("bad", 1, "UNAVAILABLE"))
    expected = (200, "text/plain", b"") if is_ready else (400, "text/plain", b'{"error":"Model version not ready"}')
    assert ask(context, "GET", path).triple == expected


def test_a_version_beyond_64_bits_is_a_clear_error() -> None:
    answer = ask(make_context(entry("m")), "GET", f"/v2/models/m/versions/{'9' * 5000}/ready")
    assert answer.status == 400
    assert b"version should be an integral value > 0" in answer.body
