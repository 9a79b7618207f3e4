"""Trace settings: for the whole server, and for single models that have some of their own (spec H-250..H-260).

A model's settings are those of the server but for what was set for the model itself; what was never set, or was set to
null, follows the server's (H-256, H-257). Models with settings of their own count their traces for themselves, all
others together (H-258).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from forebay.engine.settings import ConfigEntry
from forebay.engine.settings import TraceSettings as StartSettings
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.trace import TENSORS, TIMESTAMPS, TraceRule, TraceRules

_OFF = "OFF"

#: What the OpenTelemetry exporter does unless told otherwise (spec O-021).
_EXPORT_DEFAULTS = {
    "bsp_max_export_batch_size": "512",
    "bsp_max_queue_size": "2048",
    "bsp_schedule_delay": "5000",
}


class TraceOverride(msgspec.Struct, frozen=True):
    """What was set; None: follow what is above (the server for a model, the start-up for the server)."""

    trace_level: tuple[str, ...] | None = None
    trace_rate: int | None = None
    trace_count: int | None = None
    log_frequency: int | None = None


class _Group:
    """Models that are traced alike and counted together."""

    def __init__(self, number: int, override: TraceOverride) -> None:
        self.number = number
        #: Its number before the last change: traces of requests that began then still count.
        self.former_number = 0
        self.override = override
        #: Traces that may still be made; -1: any number.
        self.remaining = -1
        self.levels: tuple[str, ...] = ()
        self.rate = 1
        self.log_frequency = 0


class TraceRegistry:
    """All trace settings and counts. Used in the supervisor's event loop only."""

    def __init__(self, start: StartSettings) -> None:
        self.mode = start.mode
        self.file = start.file
        self._options = start.config
        levels = tuple(level for level in (TIMESTAMPS, TENSORS) if level in start.level)
        self._start = TraceOverride(
            trace_level=() if _OFF in start.level else levels,
            trace_rate=start.rate,
            trace_count=start.count,
            log_frequency=start.log_frequency,
        )
        self._last_group = 0
        self._by_number: dict[int, _Group] = {}
        self._server = self._new_group(TraceOverride())
        self._server.remaining = start.count
        self._models: dict[str, _Group] = {}
        self._derive()

    # --- settings ---

    def settings(self, model: str = "") -> dict[str, Any]:
        """Return what applies to a model, or to the server, as clients see it (spec H-250)."""
        group = self._models.get(model, self._server)
        found: dict[str, Any] = {
            "trace_level": list(group.levels) or [_OFF],
            "trace_rate": str(group.rate),
            "trace_count": str(group.remaining),
        }
        if self.mode == "opentelemetry":
            return {**found, "trace_mode": self.mode, **self.export_options()}
        return {
            **found,
            "log_frequency": str(group.log_frequency),
            "trace_file": self.file,
            "trace_mode": self.mode,
        }

    def change(self, model: str, settings: Mapping[str, Any]) -> None:
        """Set what is named, for a model or (empty) for the server; None takes a setting back.

        Raises:
            InvalidArgument: a setting has the wrong type, or nothing would become of what is to be traced (spec H-253);
                a frontend has checked everything else.
        """
        group = self._models.get(model) if model else self._server
        so_far = group.override if group is not None else TraceOverride()
        try:
            changed = msgspec.convert({**msgspec.structs.asdict(so_far), **_known(settings)}, TraceOverride)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"invalid trace setting: {error}") from None
        self._check(model, changed)
        if not model:
            self._renew(self._server, changed)
            if "trace_count" in settings:
                self._server.remaining = self._value(changed, "trace_count")
                for other in self._models.values():
                    if other.override.trace_count is None:
                        other.remaining = self._server.remaining
        elif changed == TraceOverride():
            self._models.pop(model, None)
        else:
            if group is None:
                group = self._models[model] = self._new_group(changed)
                group.remaining = self._server.remaining
            else:
                self._renew(group, changed)
            if "trace_count" in settings:
                count = changed.trace_count
                group.remaining = self._server.remaining if count is None else count
        self._derive()

    def _check(self, model: str, changed: TraceOverride) -> None:
        """Raise InvalidArgument if something is to be traced, but at no rate or to no file (`TraceSetting::Reason`)."""
        above = self._server.override if model else TraceOverride()
        level, rate = (
            self._value(above, name) if getattr(changed, name) is None else getattr(changed, name)
            for name in ("trace_level", "trace_rate")
        )
        if not _levels(level):
            return
        if rate == 0:
            raise InvalidArgument("Attempting to set invalid trace setting :sample rate must be non-zero")
        if self.mode == "triton" and not self.file:
            raise InvalidArgument("Attempting to set invalid trace setting :trace file name is not given")

    def _new_group(self, override: TraceOverride) -> _Group:
        self._last_group += 1
        return _Group(self._last_group, override)

    def _renew(self, group: _Group, override: TraceOverride) -> None:
        """Give a group new settings under a new number, so that frontends begin to count anew."""
        group.override = override
        self._last_group += 1
        group.former_number, group.number = group.number, self._last_group

    def _value(self, override: TraceOverride, name: str) -> Any:
        """Return a setting of the server: as it was changed, else as it was at start-up."""
        changed = getattr(override, name)
        return getattr(self._start, name) if changed is None else changed

    def _derive(self) -> None:
        server = self._server
        server.levels = _levels(self._value(server.override, "trace_level"))
        server.rate = self._value(server.override, "trace_rate")
        server.log_frequency = self._value(server.override, "log_frequency")
        for group in self._models.values():
            own = group.override
            group.levels = server.levels if own.trace_level is None else _levels(own.trace_level)
            group.rate = server.rate if own.trace_rate is None else own.trace_rate
            group.log_frequency = server.log_frequency if own.log_frequency is None else own.log_frequency
        self._by_number = {
            number: group
            for group in (server, *self._models.values())
            for number in (group.number, group.former_number)
            if number
        }

    # --- what frontends do ---

    def rules(self) -> TraceRules:
        """Return what frontends are to trace."""
        return TraceRules(
            default=self._rule(self._server),
            models={model: self._rule(group) for model, group in self._models.items()},
            accepts_context=self.mode == "opentelemetry",
        )

    def _rule(self, group: _Group) -> TraceRule | None:
        has_place = bool(self.file) if self.mode == "triton" else True
        if not group.levels or group.remaining == 0 or not has_place:
            return None
        levels = group.levels
        if self.mode == "opentelemetry":
            # Spans have no room for tensors (spec O-026).
            levels = (TIMESTAMPS,)
        return TraceRule(group.number, levels, group.rate, group.remaining)

    def take(self, number: int) -> int | None:
        """Count one finished trace of a group.

        Returns:
            How many more the group may have (-1: any number), or None: it had all of its traces already, or is gone.
        """
        group = self._by_number.get(number)
        if group is None or group.remaining == 0:
            return None
        if group.remaining > 0:
            group.remaining -= 1
        return group.remaining

    def log_frequency(self, number: int) -> int:
        """Return after how many traces a group begins a new file; 0: never."""
        group = self._by_number.get(number)
        return self._server.log_frequency if group is None else group.log_frequency

    def export_options(self) -> dict[str, str]:
        """Return the options of OpenTelemetry mode as they were given, with the defaults of the exporter's."""
        found = dict(_EXPORT_DEFAULTS)
        resources: list[str] = []
        for entry in self._options:
            if entry.name != "opentelemetry":
                continue
            if entry.setting == "resource":
                resources.append(entry.value)
            else:
                found[entry.setting] = entry.value
        if resources:
            found["resource"] = ",".join(resources)
        return dict(sorted(found.items()))


def resource_attributes(options: tuple[ConfigEntry, ...]) -> dict[str, str]:
    """Return the attributes that ``opentelemetry,resource=<key>=<value>`` gives, with Triton's default (spec O-021)."""
    found = {"service.name": "triton-inference-server"}
    for entry in options:
        if entry.name == "opentelemetry" and entry.setting == "resource":
            key, _, value = entry.value.partition("=")
            if key:
                found[key] = value
    return found


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in TraceOverride.__struct_fields__}


def _levels(levels: tuple[str, ...]) -> tuple[str, ...]:
    return () if _OFF in levels else tuple(level for level in (TIMESTAMPS, TENSORS) if level in levels)
