"""The settings of the control endpoints, picked from what the supervisor sends."""

from __future__ import annotations

import msgspec
import pytest

from forebay.frontend.handlers.context import ControlSettings, RestrictedApi


def test_settings_come_from_the_groups_of_the_server() -> None:
    groups = {
        "server": {"id": "mine", "exit_timeout_secs": 30},
        "http": {
            "port": 8000,
            "max_input_size": 5,
            "restricted_apis": [{"apis": ["health", "trace"], "key": "k", "value": "v"}],
        },
        "memory": {"allow_client_shm": True},
    }
    assert ControlSettings.from_groups(groups) == ControlSettings(
        server_id="mine",
        max_input_size=5,
        restricted_apis=(RestrictedApi(apis=("health", "trace"), key="k", value="v"),),
        allow_client_shm=True,
    )


def test_absent_groups_leave_the_defaults() -> None:
    """Spec F-002, F-046, F-048."""
    assert ControlSettings.from_groups({}) == ControlSettings(
        server_id="triton", max_input_size=64 * 1024 * 1024, restricted_apis=(), allow_client_shm=False
    )


def test_nonsense_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        ControlSettings.from_groups({"http": {"max_input_size": "many"}})
