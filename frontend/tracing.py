"""Request tracing in a frontend: which requests are traced, what is noted of them, and handing it in (spec 11.1).

Nothing of this exists for a model that is not traced: its route has no sampler, and looking whether it has one is all
that its requests pay. A traced request takes the general path, where each stage notes its time; what it did goes to
the supervisor, which writes it down, on the control socket: ahead of whatever its client asks of the trace next.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from forebay.ipc.errors import ServingError
from forebay.ipc.tensor import DATATYPES, decode_bytes
from forebay.ipc.trace import (
    TENSORS,
    TIMESTAMPS,
    TracedTensor,
    TraceRecord,
    TraceRule,
    TraceRules,
    TraceSpan,
)
from forebay.ipc.wire import Times

if TYPE_CHECKING:
    from forebay.frontend.inference import Response

REQUEST_START, QUEUE_START = "REQUEST_START", "QUEUE_START"
COMPUTE_EVENTS = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")
RESPONSE_COMPLETE, REQUEST_END = "INFER_RESPONSE_COMPLETE", "REQUEST_END"
QUEUE_INPUT, BACKEND_INPUT, BACKEND_OUTPUT = "TENSOR_QUEUE_INPUT", "TENSOR_BACKEND_INPUT", "TENSOR_BACKEND_OUTPUT"

#: Elements of a tensor that a trace shows; the rest is left out.
TENSOR_ELEMENTS_MAX = 16_384
#: Traces that may wait to be handed in; beyond, they are dropped.
PENDING_MAX = 1024
#: Spans below one request that are kept (ensembles with streams could make any number).
SPANS_MAX = 256
#: Events of one request that are kept (one per response of a stream).
_EVENTS_MAX = 1024


#: W3C trace context: version, trace id, parent's span id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Sampler:
    """Counts the requests of a group of models, and says which are traced."""

    __slots__ = ("_rule", "_tracer", "_until_next", "accepts_context", "remaining")

    def __init__(self, tracer: Tracer, rule: TraceRule, *, accepts_context: bool) -> None:
        """Begin to count; the first traced request is number ``rate``, as in Triton."""
        self._tracer = tracer
        self._rule = rule
        self._until_next = rule.rate
        self.accepts_context = accepts_context
        #: Traces that this process may still begin; -1: any number.
        self.remaining = rule.count

    def skips(self) -> bool:
        """Count a request that no header asks to be traced; False: it is due, and :meth:`begin` will count it."""
        if self._until_next > 1 or self.remaining == 0:
            self._until_next -= self._until_next > 1
            return True
        return False

    def begin(self, model: str, version: int, request_id: str, context: str = "") -> Trace | None:
        """Count a request; return its trace if it is to be traced.

        Args:
            context: the ``traceparent`` that came with it.
        """
        is_asked_for = bool(context) and self.accepts_context
        is_due = not self.skips()
        if self.remaining == 0 or not (is_due or is_asked_for):
            return None
        if is_due:
            self._until_next = self._rule.rate
        if self.remaining > 0:
            self.remaining -= 1
        record = _Record(self._tracer, self._rule, context if is_asked_for else "", has_ids=self.accepts_context)
        return Trace(record, model, version, request_id)


class Trace:
    """One traced request, or one of its steps. Life: begun -> events -> ``end``, once; the root's end hands it in."""

    __slots__ = (
        "_events",
        "_index",
        "_is_ended",
        "_model",
        "_received",
        "_record",
        "_request_id",
        "_span_id",
        "_tensors",
        "_version",
    )

    def __init__(self, record: _Record, model: str, version: int, request_id: str, parent: int = -1) -> None:
        self._record = record
        self._index = record.add(self, parent)
        self._span_id = int.from_bytes(os.urandom(8)) if record.trace_id else 0
        self._model = model
        self._version = version
        self._request_id = request_id
        self._received: list[tuple[str, int]] = []
        self._events: list[tuple[str, int]] = []
        self._tensors: list[TracedTensor] = []
        self._is_ended = False

    @property
    def shows_tensors(self) -> bool:
        return self._record.shows_tensors

    @property
    def context(self) -> str:
        """What a model is told, to add spans of its own: W3C context as JSON; empty in Triton's own mode."""
        trace_id = self._record.trace_id
        return f'{{"traceparent":"00-{trace_id.hex()}-{self._span_id:016x}-01"}}' if trace_id else ""

    def note(self, name: str, ns: int | None = None) -> None:
        """Note an event, now unless said otherwise (monotonic ns)."""
        if len(self._events) < _EVENTS_MAX:
            self._events.append((name, time.monotonic_ns() if ns is None else ns))

    def received(self, name: str, ns: int) -> None:
        """Note an event of the protocol from before the request was known."""
        self._received.append((name, ns))

    def executed(self, times: Times) -> None:
        """Note what the worker said of the execution; nothing, if there was none."""
        if times.start_ns:
            self._events.extend(zip(COMPUTE_EVENTS, times, strict=True))

    def tensor(self, activity: str, name: str, datatype: str, shape: tuple[int, ...], data: memoryview | bytes) -> None:
        """Keep a tensor's value, if tensors are traced."""
        if self._record.shows_tensors and len(self._tensors) < _EVENTS_MAX:
            text = render_tensor(datatype, shape, data)
            self._tensors.append(TracedTensor(activity, name, text, ",".join(map(str, shape)), datatype))

    def step(self, model: str, version: int) -> Trace | None:
        """Begin the trace of a request that this one makes; None: there are too many of them."""
        record = self._record
        if record.span_count >= SPANS_MAX:
            return None
        child = Trace(record, model, version, self._request_id, self._index)
        child.note(REQUEST_START)
        return child

    def end(self) -> None:
        """The request is over, with or without an answer."""
        if self._is_ended:
            return
        self._is_ended = True
        if self._index == 0:
            self._record.hand_in()

    def span(self, parent: int) -> TraceSpan:
        """Return what was noted."""
        # Without the level TIMESTAMPS there are only tensors.
        has_times = TIMESTAMPS in self._record.rule.levels
        return TraceSpan(
            self._model,
            self._version,
            self._request_id,
            parent,
            tuple(self._received) if has_times else (),
            tuple(self._events) if has_times else (),
            tuple(self._tensors),
            self._span_id,
        )


class _Record:
    """A traced request with its steps."""

    __slots__ = ("_context", "_spans", "rule", "shows_tensors", "trace_id", "tracer")

    def __init__(self, tracer: Tracer, rule: TraceRule, context: str, *, has_ids: bool) -> None:
        """
        Args:
            context: the ``traceparent`` that came with the request.
            has_ids: spans have identifiers that others may refer to.
        """
        self.tracer = tracer
        known = _TRACEPARENT.match(context)
        self.trace_id = (bytes.fromhex(known[1]) if known else os.urandom(16)) if has_ids else b""
        self.rule = rule
        self.shows_tensors = TENSORS in rule.levels
        self._context = context
        self._spans: list[tuple[Trace, int]] = []

    @property
    def span_count(self) -> int:
        return len(self._spans)

    def add(self, trace: Trace, parent: int) -> int:
        self._spans.append((trace, parent))
        return len(self._spans) - 1

    def hand_in(self) -> None:
        spans = tuple(trace.span(parent) for trace, parent in self._spans)
        self.tracer.take(TraceRecord(self.rule.group, spans, self._context, self.trace_id))
        # They hold each other.
        self._spans = []


def begin_sending(trace: Trace, response: Response) -> None:
    """gRPC is about to send a response."""
    trace.note(RESPONSE_COMPLETE)
    if response.final:
        trace.note(REQUEST_END)
    trace.note("GRPC_SEND_START")


def end_sending(trace: Trace, response: Response) -> None:
    """It has been sent, as far as the kernel took it; the last one ends the trace."""
    trace.note("GRPC_SEND_END")
    if response.final:
        trace.end()


class Tracer:
    """The samplers of one frontend, and the traces that wait to be handed in. Used in its event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hand_in: Callable[[tuple[TraceRecord, ...]], None]) -> None:
        """Trace nothing yet.

        Args:
            hand_in: takes finished traces; called at the end of an event-loop turn.
        """
        self._loop = loop
        self._hand_in = hand_in
        self._default: Sampler | None = None
        self._models: dict[str, Sampler | None] = {}
        self._by_group: dict[int, Sampler] = {}
        self._pending: list[TraceRecord] = []

    def take_rules(self, rules: TraceRules) -> None:
        """Trace by these rules from now on; groups that have not changed go on counting."""
        known = self._by_group
        self._by_group = {}
        self._default = self._sampler(rules.default, rules, known)
        self._models = {model: self._sampler(rule, rules, known) for model, rule in rules.models.items()}

    def _sampler(self, rule: TraceRule | None, rules: TraceRules, known: dict[int, Sampler]) -> Sampler | None:
        if rule is None:
            return None
        found = known.get(rule.group) or Sampler(self, rule, accepts_context=rules.accepts_context)
        if rule.count >= 0:
            # Others have made traces meanwhile.
            found.remaining = min(found.remaining, rule.count)
        self._by_group[rule.group] = found
        return found

    @property
    def is_tracing(self) -> bool:
        """Whether any model is traced."""
        return bool(self._by_group)

    def sampler(self, model: str) -> Sampler | None:
        """Return what counts the requests of a model; None: it is not traced."""
        return self._models.get(model, self._default)

    def take(self, record: TraceRecord) -> None:
        """Hand a finished trace in with the others of this turn."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        if len(self._pending) < PENDING_MAX:
            self._pending.append(record)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        self._hand_in(tuple(pending))


def render_tensor(datatype: str, shape: tuple[int, ...], data: memoryview | bytes) -> str:
    """Return a tensor's elements as text, separated by commas; BYTES as they are, in quotes as in Triton's traces."""
    if datatype not in DATATYPES:
        return ""
    try:
        if datatype == "BYTES":
            elements: Iterable[object] = (
                '"' + bytes(item).decode("utf-8", "replace") + '"'
                for item in decode_bytes(memoryview(data), shape).reshape(-1)[:TENSOR_ELEMENTS_MAX]
            )
        else:
            dtype = np.dtype(DATATYPES[datatype].numpy_dtype)
            flat = np.frombuffer(data, dtype)[:TENSOR_ELEMENTS_MAX]
            if datatype == "BF16":
                flat = (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            elements = (_number(item) for item in flat.tolist())
    except (ServingError, ValueError):
        return ""
    return ",".join(str(item) for item in elements)


def _number(value: object) -> object:
    """Return a number as C++ streams print it: 1, not 1.0; true is 1."""
    if isinstance(value, bool):
        return int(value)
    return format(value, ".6g") if isinstance(value, float) else value
