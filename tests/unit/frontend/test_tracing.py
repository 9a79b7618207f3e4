"""Which requests are traced, and what is handed in of them (spec O-001, O-024)."""

from __future__ import annotations

import asyncio

from forebay.frontend.tracing import Sampler, Tracer
from forebay.ipc.spans import SPANS_MAX
from forebay.ipc.trace import TENSORS, TIMESTAMPS, TraceRecord, TraceRule, TraceRules
from forebay.ipc.wire import Times


class _Loop:
    """Runs call_soon at once when told to."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.records: list[TraceRecord] = []
        self.tracer = Tracer(self.loop, self.records.extend)

    def turn(self) -> list[TraceRecord]:
        self.loop.run_until_complete(asyncio.sleep(0))
        return self.records

    def close(self) -> None:
        self.loop.close()


def _begun(sampler: Sampler, count: int, context: str = "") -> list[int]:
    return [n for n in range(1, count + 1) if sampler.begin("m", 1, "", context) is not None]


def test_one_of_rate_requests_is_traced_on_both_paths() -> None:
    harness = _Loop()
    rule = TraceRule(1, (TIMESTAMPS,), 3)
    assert _begun(Sampler(harness.tracer, rule, accepts_context=False), 9) == [3, 6, 9]
    sampler = Sampler(harness.tracer, rule, accepts_context=False)
    due = [n for n in range(1, 10) if not sampler.skips() and sampler.begin("m", 1, "") is not None]
    assert due == [3, 6, 9]
    harness.close()


def test_a_count_stops_the_tracing() -> None:
    harness = _Loop()
    assert _begun(Sampler(harness.tracer, TraceRule(1, (TIMESTAMPS,), 1, 2), accepts_context=False), 5) == [1, 2]
    harness.close()


def test_requests_with_a_context_are_traced_whatever_the_rate() -> None:
    """O-024; in Triton's own mode the header means nothing."""
    harness = _Loop()
    rule = TraceRule(1, (TIMESTAMPS,), 1000)
    assert _begun(Sampler(harness.tracer, rule, accepts_context=True), 3, "00-1-2-01") == [1, 2, 3]
    assert _begun(Sampler(harness.tracer, rule, accepts_context=False), 3, "00-1-2-01") == []
    harness.close()


def test_rules_that_stay_go_on_counting() -> None:
    harness = _Loop()
    tracer = harness.tracer
    rule = TraceRule(1, (TIMESTAMPS,), 2)
    tracer.take_rules(TraceRules(rule, {"own": None}))
    sampler = tracer.sampler("m")
    assert sampler is not None
    assert tracer.sampler("own") is None
    assert sampler.skips()
    tracer.take_rules(TraceRules(rule, {"other": TraceRule(2, (TIMESTAMPS,), 5)}))
    assert tracer.sampler("m") is sampler
    assert not sampler.skips()
    tracer.take_rules(TraceRules())
    assert not tracer.is_tracing
    harness.close()


def test_a_trace_is_handed_in_once_with_its_steps() -> None:
    harness = _Loop()
    trace = Sampler(harness.tracer, TraceRule(4, (TIMESTAMPS,), 1), accepts_context=False).begin("m", 2, "id")
    assert trace is not None
    trace.received("HTTP_RECV_START", 1)
    trace.executed(Times(0, 0, 0, 0))
    trace.executed(Times(5, 6, 7, 8))
    step = trace.step("s", 1)
    assert step is not None
    assert sum(trace.step("s", 1) is not None for _ in range(SPANS_MAX)) == SPANS_MAX - 2
    step.end()
    assert harness.turn() == []
    trace.end()
    trace.end()
    (record,) = harness.turn()
    root = record.spans[0]
    assert (record.group, root.model, root.version, root.request_id) == (4, "m", 2, "id")
    assert root.received == (("HTTP_RECV_START", 1),)
    assert [ns for _name, ns in root.events] == [5, 6, 7, 8]
    assert record.spans[1].parent == 0
    harness.close()


def test_a_level_without_times_notes_none() -> None:
    harness = _Loop()
    trace = Sampler(harness.tracer, TraceRule(4, (TENSORS,), 1), accepts_context=False).begin("m", 2, "id")
    assert trace is not None
    trace.note("REQUEST_START")
    trace.tensor("TENSOR_QUEUE_INPUT", "IN", "INT8", (2,), b"\1\2")
    trace.end()
    (record,) = harness.turn()
    assert record.spans[0].events == ()
    assert record.spans[0].tensors[0].data == "1,2"
    harness.close()
