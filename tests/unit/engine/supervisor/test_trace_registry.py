"""Trace settings: inheritance, null, counting, what frontends are told (spec H-250..H-258)."""

from __future__ import annotations

import pytest

from forebay.engine.settings import ConfigEntry, TraceSettings
from forebay.engine.supervisor.trace_registry import TraceRegistry, resource_attributes
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.trace import TraceRule


def make(**settings: object) -> TraceRegistry:
    return TraceRegistry(TraceSettings(**{"file": "f", "level": ("TIMESTAMPS",), "rate": 10, **settings}))  # type: ignore[arg-type]


def test_models_follow_the_server_but_for_what_is_their_own() -> None:
    """H-257."""
    registry = make()
    registry.change("m", {"trace_rate": 5})
    registry.change("", {"trace_rate": 7, "trace_level": ["OFF"]})
    assert registry.settings("m")["trace_rate"] == "5"
    assert registry.settings("m")["trace_level"] == ["OFF"]
    assert registry.settings("other")["trace_rate"] == "7"


def test_null_takes_a_setting_back() -> None:
    """H-256: a model's to the server's, the server's to that of the start."""
    registry = make()
    before = registry.settings()
    registry.change("", {"trace_rate": 7, "trace_count": 3})
    registry.change("m", {"trace_rate": 5, "trace_count": 9})
    registry.change("m", {"trace_rate": None})
    assert (registry.settings("m")["trace_rate"], registry.settings("m")["trace_count"]) == ("7", "9")
    registry.change("m", {"trace_count": None})
    assert registry.settings("m") == registry.settings()
    registry.change("", {"trace_rate": None, "trace_count": None})
    assert registry.settings() == before


def test_each_group_counts_for_itself() -> None:
    """H-258: what is used up is traced no more, and set again it is."""
    registry = make(count=2)
    registry.change("m", {"trace_count": 1})
    rules = registry.rules()
    assert rules.default is not None
    own = rules.models["m"]
    assert own is not None
    assert registry.take(own.group) == 0
    assert registry.take(own.group) is None
    assert registry.rules().models["m"] is None
    assert registry.settings("m")["trace_count"] == "0"
    assert registry.take(rules.default.group) == 1
    registry.change("m", {"trace_count": 4})
    again = registry.rules().models["m"]
    assert again is not None
    assert (again.count, again.group != own.group) == (4, True)


def test_requests_that_began_under_former_settings_still_count() -> None:
    registry = make(count=5)
    rule = registry.rules().default
    assert rule is not None
    registry.change("", {"trace_rate": 2})
    assert registry.take(rule.group) == 4
    for rate in range(3, 9):
        registry.change("", {"trace_rate": rate})
    assert registry.take(rule.group) is None


@pytest.mark.parametrize("settings", [{"file": ""}, {"level": ("OFF", "TIMESTAMPS")}, {"level": ()}, {"count": 0}])
def test_without_a_level_a_file_or_a_count_nothing_is_traced(settings: dict[str, object]) -> None:
    assert make(**settings).rules().default is None


def test_opentelemetry_shows_its_own_options() -> None:
    """H-250, O-021, O-024, O-026."""
    options = (
        ConfigEntry("opentelemetry", "url", "http://x"),
        ConfigEntry("opentelemetry", "resource", "service.name=s"),
        ConfigEntry("opentelemetry", "resource", "a=b=c"),
    )
    registry = make(mode="opentelemetry", file="", level=("TENSORS",), config=options)
    assert registry.settings() == {
        "trace_level": ["TENSORS"],
        "trace_rate": "10",
        "trace_count": "-1",
        "trace_mode": "opentelemetry",
        "bsp_max_export_batch_size": "512",
        "bsp_max_queue_size": "2048",
        "bsp_schedule_delay": "5000",
        "resource": "service.name=s,a=b=c",
        "url": "http://x",
    }
    rules = registry.rules()
    assert rules.accepts_context
    assert rules.default == TraceRule(rules.default.group if rules.default else 0, ("TIMESTAMPS",), 10, -1)
    assert resource_attributes(options) == {"service.name": "s", "a": "b=c"}
    assert resource_attributes(()) == {"service.name": "triton-inference-server"}


def test_settings_of_a_wrong_type_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        make().change("", {"trace_rate": "x"})


def test_what_has_no_file_to_be_written_to_is_not_switched_on() -> None:
    """As in Triton 2.51: ``TraceSetting::Reason`` (spec H-253)."""
    registry = make(file="", level=("OFF",))
    for model in ("", "m"):
        with pytest.raises(
            InvalidArgument, match="Attempting to set invalid trace setting :trace file name is not given"
        ):
            registry.change(model, {"trace_level": ["TIMESTAMPS"]})
        assert registry.settings(model)["trace_level"] == ["OFF"]
        registry.change(model, {"trace_rate": 5})
    make(file="", level=("OFF",), mode="opentelemetry").change("", {"trace_level": ["TIMESTAMPS"]})
