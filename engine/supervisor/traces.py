"""The supervisor's part of tracing: settings for clients, rules for frontends, and where finished traces go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from forebay.engine.settings import TraceSettings
from forebay.engine.supervisor.trace_file import TraceFile
from forebay.engine.supervisor.trace_registry import TraceRegistry, resource_attributes
from forebay.ipc.errors import InvalidArgument, Unsupported
from forebay.ipc.log import log
from forebay.ipc.trace import TraceRecord, TraceRules


class TraceSink(Protocol):
    """Where finished traces go."""

    def write(self, records: list[tuple[TraceRecord, int]]) -> None:
        """Take traces, each with the number of traces after which a new file begins (0: never)."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Traces:
    """Answers ``trace_get`` and ``trace_set``, and takes what frontends have traced."""

    def __init__(self, settings: TraceSettings, publish: Callable[[], Awaitable[None]]) -> None:
        """Trace as the settings say.

        Args:
            publish: tells the frontends of changed rules.

        Raises:
            Unsupported: OpenTelemetry mode without its libraries.
        """
        self._registry = TraceRegistry(settings)
        self._publish = publish
        self._sink = self._open_sink(settings)

    def _open_sink(self, settings: TraceSettings) -> TraceSink:
        if settings.mode == "triton":
            return TraceFile(settings.file)
        if "TENSORS" in settings.level:
            log.warning("trace level TENSORS is not supported in opentelemetry mode; only timestamps are sent")
        try:
            from forebay.engine.supervisor.span_exporter import SpanExporter
        except ImportError:
            raise Unsupported(
                "trace mode 'opentelemetry' needs the OpenTelemetry libraries: pip install 'forebay[tracing]'"
            ) from None
        return SpanExporter(self._registry.export_options(), resource_attributes(settings.config))

    def rules(self) -> TraceRules:
        """Return what frontends are to trace."""
        return self._registry.rules()

    async def get(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer ``trace_get``: ``{"model": str}``, empty for the server."""
        return self._registry.settings(_model(arguments))

    async def set(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer ``trace_set``: change settings, tell the frontends, return what is in force.

        Raises:
            InvalidArgument: the settings cannot be read.
        """
        model = _model(arguments)
        try:
            settings = msgspec.convert(arguments.get("settings"), dict[str, Any])
        except msgspec.ValidationError as error:
            raise InvalidArgument(str(error)) from None
        self._registry.change(model, settings)
        await self._publish()
        return self._registry.settings(model)

    def take(self, records: tuple[TraceRecord, ...]) -> bool:
        """Write finished traces down; return whether a group has now had all of its own, which frontends must know."""
        registry = self._registry
        accepted: list[tuple[TraceRecord, int]] = []
        is_used_up = False
        for record in records:
            left = registry.take(record.group)
            if left is not None:
                accepted.append((record, registry.log_frequency(record.group)))
                is_used_up = is_used_up or left == 0
        if accepted:
            self._sink.write(accepted)
        return is_used_up

    def close(self) -> None:
        """Write what is left."""
        self._sink.close()


def _model(arguments: dict[str, Any]) -> str:
    model = arguments.get("model", "")
    if not isinstance(model, str):
        raise InvalidArgument("'model' must be a string")
    return model
