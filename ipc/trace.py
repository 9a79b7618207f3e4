"""What a traced request is, between the frontends that watch it and the supervisor that writes it down.

A *span* is one request to one model: the client's, or a step's of an ensemble, which then has a parent. Times are
monotonic nanoseconds; names of events are Triton's (spec O-005).
"""

from __future__ import annotations

import msgspec

#: Levels of tracing; ``OFF`` is the absence of both.
TIMESTAMPS, TENSORS = "TIMESTAMPS", "TENSORS"


class TraceRule(msgspec.Struct, frozen=True, array_like=True):
    """Which requests of a group of models are traced. A group has the same settings and counts together."""

    group: int
    """Never used for other settings again."""
    levels: tuple[str, ...]
    rate: int
    """One of so many requests."""
    count: int = -1
    """So many at most; -1: any number."""


class TraceRules(msgspec.Struct, frozen=True, array_like=True):
    """What is traced in the whole server."""

    default: TraceRule | None = None
    """For every model that is not named; None: nothing."""
    models: dict[str, TraceRule | None] = {}
    accepts_context: bool = False
    """Requests that carry a W3C trace context are traced whatever the rate says (spec O-024)."""


class TracedTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor as the trace shows it (spec O-007)."""

    activity: str
    name: str
    data: str
    shape: str
    datatype: str


class TraceSpan(msgspec.Struct, frozen=True, array_like=True):
    """One request to one model."""

    model: str
    version: int
    request_id: str
    parent: int
    """Index of the span that it is a step of; -1: none."""
    received: tuple[tuple[str, int], ...]
    """Events of the protocol before the request was known."""
    events: tuple[tuple[str, int], ...]
    tensors: tuple[TracedTensor, ...] = ()
    span_id: int = 0
    """What models were told to name as the parent of their own spans (spec O-025); 0: in Triton's own mode."""


class TraceRecord(msgspec.Struct, frozen=True, array_like=True):
    """One traced request with everything below it."""

    group: int
    spans: tuple[TraceSpan, ...]
    """The client's request first, each step behind its parent."""
    context: str = ""
    """The ``traceparent`` that came with it."""
    trace_id: bytes = b""
    """16 bytes; empty in Triton's own mode."""
