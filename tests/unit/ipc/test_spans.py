"""What is noted of traced requests, and how it passes from one process to another (spec O-004, O-007, O-008)."""

from __future__ import annotations

import msgspec
import numpy as np

from forebay.ipc.spans import REQUEST_START, SPANS_MAX, SpanTree, Trace, render_tensor, trace_id_of
from forebay.ipc.tensor import encode_bytes
from forebay.ipc.trace import TENSORS, TIMESTAMPS, TraceSpan

_TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
_ROOM = 10_000


def _span(model: str, parent: int) -> TraceSpan:
    return TraceSpan(model, 1, "", parent, (), ())


def _asked(levels: tuple[str, ...] = (TIMESTAMPS,), context: str = "") -> Trace:
    """Return the trace of a request to a model, as a worker has it."""
    return Trace.of_request(levels, context, "asked", 1)


class TestBelow:
    def test_names_parents_as_they_are_adopted(self) -> None:
        """O-008: a call of a model, and a call of the model that it calls."""
        inner = _asked()
        assert inner.step("innermost", 3, "c") is not None
        outer = _asked()
        call = outer.step("inner", 2, "b")
        assert call is not None
        call.adopt(inner.below(_ROOM))
        root = Trace(SpanTree((TIMESTAMPS,)), "outer", 1, "a")
        root.adopt(outer.below(_ROOM))
        spans = root.below(_ROOM)
        assert [(span.model, span.request_id, span.parent) for span in spans] == [
            ("inner", "b", -1),
            ("innermost", "c", 0),
        ]
        assert spans[1].events[0][0] == REQUEST_START

    def test_what_is_too_long_is_left_out(self) -> None:
        asked = _asked((TIMESTAMPS, TENSORS))
        call = asked.step("m", 1)
        assert call is not None
        call.tensor("TENSOR_QUEUE_INPUT", "IN", "INT8", (1000,), bytes(1000))
        (span,) = asked.below(500)
        assert span.tensors == ()
        assert span.events
        asked = _asked()
        for _ in range(10):
            asked.step("m", 1)
        size = len(msgspec.msgpack.encode(span))
        assert 0 < len(asked.below(3 * size)) < 10

    def test_is_told_once(self) -> None:
        """What a model asks after its answer belongs to nothing any more."""
        asked = _asked()
        asked.step("m", 1)
        assert len(asked.below(_ROOM)) == 1
        assert asked.step("late", 1) is None
        assert asked.below(_ROOM) == ()


class TestAdopt:
    def test_parents_that_make_no_sense_end_it(self) -> None:
        root = _asked()
        root.adopt([_span("a", -1), _span("b", 0), _span("c", 2)])
        root.adopt([_span("d", -2)])
        assert [(span.model, span.parent) for span in root.below(_ROOM)] == [("a", -1), ("b", 0)]

    def test_there_are_only_so_many(self) -> None:
        root = _asked()
        root.adopt([_span("a", -1)] * (2 * SPANS_MAX))
        assert len(root.below(1 << 20)) == SPANS_MAX - 1


def test_a_context_goes_on_from_process_to_process() -> None:
    """O-025: the trace is the client's, and each request below it has an identifier of its own."""
    asked = _asked(context=f'{{"traceparent":"00-{_TRACE_ID}-b7ad6b7169203331-01"}}')
    assert asked.context == f'{{"traceparent":"00-{_TRACE_ID}-b7ad6b7169203331-01"}}'
    call = asked.step("m", 1)
    assert call is not None
    (span,) = asked.below(_ROOM)
    assert call.context == f'{{"traceparent":"00-{_TRACE_ID}-{span.span_id:016x}-01"}}'
    assert _asked().context == ""
    assert trace_id_of(f"00-{_TRACE_ID}-b7ad6b7169203331-01").hex() == _TRACE_ID
    assert len(trace_id_of("nonsense")) == 16


def test_tensors_as_text() -> None:
    assert render_tensor("FP32", (2,), np.array([1, 2.5], np.float32).tobytes()) == "1,2.5"
    assert render_tensor("BOOL", (2,), b"\1\0") == "1,0"
    assert render_tensor("INT64", (1,), np.array([-(2**62)]).tobytes()) == str(-(2**62))
    assert render_tensor("BF16", (2,), np.array([0x3F80, 0xC000], np.uint16).tobytes()) == "1,-2"
    assert render_tensor("BYTES", (2,), encode_bytes(np.array([b"a", b"b,c"], object))) == '"a","b,c"'
    assert render_tensor("BYTES", (2,), b"\1") == ""
    assert render_tensor("NONE", (1,), b"") == ""
