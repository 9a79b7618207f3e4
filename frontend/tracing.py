"""Request tracing in a frontend: which requests are traced, what is noted of them, and handing it in (spec 11.1).

Nothing of this exists for a model that is not traced: its route has no sampler, and looking whether it has one is all
that its requests pay. A traced request takes the general path, where each stage notes its time; what it did goes to
the supervisor, which writes it down, on the control socket: ahead of whatever its client asks of the trace next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from forebay.ipc.spans import REQUEST_END, REQUEST_START, RESPONSE_COMPLETE, SpanTree, Trace, trace_id_of
from forebay.ipc.trace import TraceRecord, TraceRule, TraceRules

if TYPE_CHECKING:
    from forebay.frontend.data_plane.route_client import RouteClient
    from forebay.frontend.inference import Response

#: Traces that may wait to be handed in; beyond, they are dropped.
PENDING_MAX = 1024


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
        given = context if is_asked_for else ""

        def hand_in(tree: SpanTree) -> None:
            self._tracer.take(TraceRecord(self._rule.group, tree.take(), given, tree.trace_id))

        trace_id = trace_id_of(given) if self.accepts_context else b""
        return Trace(SpanTree(self._rule.levels, trace_id, hand_in), model, version, request_id)


def begin_trace(
    route: RouteClient, request_id: str, context: str, received: tuple[str, str], began_ns: int = 0, ended_ns: int = 0
) -> Trace | None:
    """Count a request for its model's sampler; return its trace, if it is to be traced.

    Args:
        context: the ``traceparent`` that came with it.
        received: what the protocol calls the beginning and the end of its arrival.
        began_ns: when that was, monotonic; 0: when it ended.
        ended_ns: 0: just now.
    """
    sampler = route.sampler
    if sampler is None:
        return None
    entry = route.entry
    trace = sampler.begin(entry.name, entry.version, request_id, context)
    if trace is not None:
        now_ns = time.monotonic_ns()
        ended_ns = ended_ns or now_ns
        trace.received(received[0], began_ns or ended_ns)
        trace.received(received[1], ended_ns)
        trace.note(REQUEST_START, now_ns)
    return trace


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
