"""Traces as OpenTelemetry spans, sent to a collector by OTLP over HTTP (spec O-020..O-025). Needs the extra `tracing`.

A request is a span ``InferRequest``; below it is one per model that ran, named after it, and in that ``compute``. The
library's own thread sends them, so that a slow collector holds up nobody.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forebay.ipc.log import log
from forebay.ipc.trace import TraceRecord, TraceSpan

_DEFAULT_URL = "http://localhost:4318/v1/traces"

#: Events of an execution; the others belong to the model's own span.
_COMPUTE = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")

#: How long spans that are left may take to be sent at the end, ms.
_FLUSH_TIMEOUT_MS = 2000


class _GivenIds(RandomIdGenerator):
    """Gives the spans that models were told of the identifiers that they were told."""

    def __init__(self) -> None:
        self.trace_id = 0
        self.span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id or super().generate_trace_id()

    def generate_span_id(self) -> int:
        span_id, self.span_id = self.span_id, 0
        return span_id or super().generate_span_id()


class SpanExporter:
    """Sends traces to one collector."""

    def __init__(self, options: Mapping[str, str], resource: Mapping[str, str]) -> None:
        """Start the library's thread.

        Args:
            options: ``url`` and ``bsp_*`` of ``--trace-config opentelemetry,...``.
            resource: attributes of this server.
        """
        queue = int(options["bsp_max_queue_size"])
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            resource=Resource(dict(resource)), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=options.get("url", _DEFAULT_URL)),
                max_queue_size=queue,
                schedule_delay_millis=float(options["bsp_schedule_delay"]),
                max_export_batch_size=min(int(options["bsp_max_export_batch_size"]), queue),
            )
        )
        self._tracer = self._provider.get_tracer("triton-server")
        self._propagator = TraceContextTextMapPropagator()
        self._last_id = 0

    def write(self, records: list[tuple[TraceRecord, int]]) -> None:
        """Send traces; the frequency of files means nothing here."""
        # Spans carry wall-clock times, our events monotonic ones.
        offset_ns = time.time_ns() - time.monotonic_ns()
        for record, _frequency in records:
            self._send(record, offset_ns)

    def _send(self, record: TraceRecord, offset_ns: int) -> None:
        parent = self._propagator.extract({"traceparent": record.context}) if record.context else Context()
        first_id = self._last_id + 1
        self._last_id += len(record.spans)
        root = record.spans[0]
        events = (*root.received, *root.events)
        if not events:
            return
        self._ids.trace_id = int.from_bytes(record.trace_id)
        start_ns, end_ns = _bounds(events, ("HTTP_SEND_END", "GRPC_SEND_END"))
        request = self._tracer.start_span(
            "InferRequest", context=parent, kind=SpanKind.SERVER, start_time=start_ns + offset_ns
        )
        for name, ns in events:
            if name.startswith(("HTTP_", "GRPC_")):
                _add_event(request, name, ns, offset_ns)
        contexts: list[Context] = []
        open_spans: list[tuple[Span, int]] = []
        for index, span in enumerate(record.spans):
            context = contexts[span.parent] if span.parent >= 0 else otel.set_span_in_context(request, parent)
            parent_id = first_id + span.parent if span.parent >= 0 else 0
            model, model_end_ns = self._start_model(span, context, first_id + index, parent_id, offset_ns)
            contexts.append(otel.set_span_in_context(model, context))
            open_spans.append((model, model_end_ns))
        for model, model_end_ns in reversed(open_spans):
            model.end(model_end_ns + offset_ns)
        request.end(end_ns + offset_ns)

    def _start_model(
        self, span: TraceSpan, context: Context, number: int, parent_id: int, offset_ns: int
    ) -> tuple[Span, int]:
        events = tuple(event for event in span.events if not event[0].startswith(("HTTP_", "GRPC_")))
        start_ns, end_ns = _bounds(events, ("REQUEST_END",))
        attributes: dict[str, str | int] = {
            "triton.model_name": span.model,
            "triton.model_version": span.version,
            "triton.trace_id": number,
            "triton.trace_parent_id": parent_id,
        }
        if span.request_id:
            attributes["triton.request_id"] = span.request_id
        self._ids.span_id = span.span_id
        model = self._tracer.start_span(
            span.model, context=context, start_time=start_ns + offset_ns, attributes=attributes
        )
        compute = tuple(event for event in events if event[0] in _COMPUTE)
        for name, ns in events:
            if name not in _COMPUTE:
                _add_event(model, name, ns, offset_ns)
        if compute:
            begin_ns, done_ns = _bounds(compute, ("COMPUTE_END",))
            child = self._tracer.start_span(
                "compute", context=otel.set_span_in_context(model, context), start_time=begin_ns + offset_ns
            )
            for name, ns in compute:
                _add_event(child, name, ns, offset_ns)
            child.end(done_ns + offset_ns)
        return model, end_ns

    def close(self) -> None:
        """Send what is left, for a short while, and end the thread."""
        if not self._provider.force_flush(_FLUSH_TIMEOUT_MS):
            log.warning("some traces could not be sent to the OpenTelemetry collector")
        self._provider.shutdown()


def _add_event(span: Span, name: str, ns: int, offset_ns: int) -> None:
    # The steady time is what Triton's events carry besides (spec O-023).
    span.add_event(name, {"triton.steady_timestamp_ns": ns}, timestamp=ns + offset_ns)


def _bounds(events: tuple[tuple[str, int], ...], last: tuple[str, ...]) -> tuple[int, int]:
    """Return the first time of these events, and that of the ``last`` one, or else the latest."""
    times = [ns for _name, ns in events if ns] or [time.monotonic_ns()]
    end_ns = next((ns for name, ns in reversed(events) if name in last and ns), max(times))
    return min(times), end_ns
