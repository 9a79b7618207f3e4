"""The settings of the HTTP port."""

from __future__ import annotations

import msgspec

from forebay.engine.settings import Settings
from forebay.frontend.http.settings import HttpView


def test_defaults_are_those_of_the_server() -> None:
    assert HttpView.from_groups(msgspec.to_builtins(Settings())) == HttpView()
    assert HttpView.from_groups({}) == HttpView()


def test_keys_of_restricted_inference() -> None:
    """H-010."""
    groups = {
        "http": {
            "max_connections": 5,
            "restricted_apis": [
                {"apis": ["inference", "health"], "key": "a", "value": "1"},
                {"apis": ["logging"], "key": "b", "value": "2"},
            ],
        }
    }
    view = HttpView.from_groups(groups)
    assert (view.max_connections, view.inference_keys) == (5, (("a", "1"),))
