"""Traced requests while they are under way: what is noted of each, and of those that are made for it (spec 11.1).

A traced request is a tree of spans: the client's request is its root, steps of ensembles and nested requests of models
are below. Whoever runs a request notes its events: a frontend, or a worker whose model asks other models. What a
worker's model has asked comes back with the answer (``ReplyHead.spans``) and is taken into the tree of whoever asked.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from forebay.ipc.errors import ServingError
from forebay.ipc.tensor import DATATYPES, decode_bytes
from forebay.ipc.trace import TENSORS, TIMESTAMPS, TracedTensor, TraceSpan
from forebay.ipc.wire import Times

REQUEST_START, QUEUE_START = "REQUEST_START", "QUEUE_START"
COMPUTE_EVENTS = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")
RESPONSE_COMPLETE, REQUEST_END = "INFER_RESPONSE_COMPLETE", "REQUEST_END"
QUEUE_INPUT, BACKEND_INPUT, BACKEND_OUTPUT = "TENSOR_QUEUE_INPUT", "TENSOR_BACKEND_INPUT", "TENSOR_BACKEND_OUTPUT"

#: Elements of a tensor that a trace shows; the rest is left out.
TENSOR_ELEMENTS_MAX = 16_384
#: Spans below one request that are kept (ensembles with streams could make any number).
SPANS_MAX = 256
#: Events of one request that are kept (one per response of a stream).
_EVENTS_MAX = 1024

#: W3C trace context: version, trace id, parent's span id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")

_encode_span = msgspec.msgpack.Encoder().encode


class SpanTree:
    """A traced request with everything below it. Models' threads may add to it at the same time."""

    __slots__ = ("_is_taken", "_lock", "_spans", "levels", "on_end", "shows_tensors", "trace_id")

    def __init__(
        self, levels: tuple[str, ...], trace_id: bytes = b"", on_end: Callable[[SpanTree], None] | None = None
    ) -> None:
        """Begin with nothing.

        Args:
            levels: what is noted.
            trace_id: 16 bytes, if spans have identifiers that others may refer to; else empty.
            on_end: called once, when the root ends.
        """
        self.levels = levels
        self.shows_tensors = TENSORS in levels
        self.trace_id = trace_id
        self.on_end = on_end
        self._spans: list[tuple[Trace | TraceSpan, int]] = []
        self._is_taken = False
        self._lock = threading.Lock()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no further spans: there are too many, or they have been taken."""
        return self._is_taken or len(self._spans) >= SPANS_MAX

    def add(self, span: Trace | TraceSpan, parent: int) -> int:
        """Add a span below that with the index ``parent`` (-1: none); return its own index."""
        with self._lock:
            self._spans.append((span, parent))
            return len(self._spans) - 1

    def take(self) -> tuple[TraceSpan, ...]:
        """Return what was noted, parents first, and forget it: spans and tree refer to each other."""
        with self._lock:
            spans, self._spans, self._is_taken = self._spans, [], True
        return tuple(
            span.noted(parent) if isinstance(span, Trace) else msgspec.structs.replace(span, parent=parent)
            for span, parent in spans
        )


class Trace:
    """One traced request, or one that is made for it. Life: begun -> events -> ``end``, once."""

    __slots__ = (
        "_events",
        "_index",
        "_is_ended",
        "_model",
        "_received",
        "_request_id",
        "_span_id",
        "_tensors",
        "_tree",
        "_version",
    )

    def __init__(
        self, tree: SpanTree, model: str, version: int, request_id: str, parent: int = -1, span_id: int = 0
    ) -> None:
        """Begin.

        Args:
            parent: index in the tree of the request that it is made for; -1: it is the root.
            span_id: what others know it by; 0: a new one, if spans have any.
        """
        self._tree = tree
        self._index = tree.add(self, parent)
        self._span_id = span_id or (int.from_bytes(os.urandom(8)) if tree.trace_id else 0)
        self._model = model
        self._version = version
        self._request_id = request_id
        self._received: list[tuple[str, int]] = []
        self._events: list[tuple[str, int]] = []
        self._tensors: list[TracedTensor] = []
        self._is_ended = False

    @classmethod
    def of_request(cls, levels: tuple[str, ...], context: str, model: str, version: int) -> Trace:
        """Return the trace of a request that came from another process, to note what is made for it.

        Args:
            context: W3C context as JSON (:attr:`context`); empty in Triton's own mode.
        """
        known = _TRACEPARENT.search(context)
        trace_id, span_id = (bytes.fromhex(known[1]), int(known[2], 16)) if known else (b"", 0)
        return cls(SpanTree(levels, trace_id), model, version, "", span_id=span_id)

    @property
    def levels(self) -> tuple[str, ...]:
        return self._tree.levels

    @property
    def shows_tensors(self) -> bool:
        return self._tree.shows_tensors

    @property
    def context(self) -> str:
        """What a model is told, to add spans of its own: W3C context as JSON; empty in Triton's own mode."""
        trace_id = self._tree.trace_id
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
        if self._tree.shows_tensors and len(self._tensors) < _EVENTS_MAX:
            text = render_tensor(datatype, shape, data)
            self._tensors.append(TracedTensor(activity, name, text, ",".join(map(str, shape)), datatype))

    def step(self, model: str, version: int, request_id: str | None = None) -> Trace | None:
        """Begin the trace of a request that this one makes; None: there are too many of them.

        Args:
            request_id: None: the id of this one.
        """
        if self._tree.is_closed:
            return None
        own_id = self._request_id if request_id is None else request_id
        child = Trace(self._tree, model, version, own_id, self._index)
        child.note(REQUEST_START)
        return child

    def adopt(self, spans: Sequence[TraceSpan]) -> None:
        """Take in what was noted elsewhere of requests that this one has made.

        Args:
            spans: parents first; the parent is an index among them, or -1: this one.
        """
        own: list[int] = []
        for span in spans:
            if self._tree.is_closed or not -1 <= span.parent < len(own):
                return
            own.append(self._tree.add(span, self._index if span.parent < 0 else own[span.parent]))

    def below(self, bytes_max: int) -> tuple[TraceSpan, ...]:
        """Return what was noted below the root, which this is, as :meth:`adopt` takes it.

        Args:
            bytes_max: as much of it as is not longer, encoded: tensors that are longer are left out.
        """
        found: list[TraceSpan] = []
        for span in self._tree.take()[1:]:
            placed = msgspec.structs.replace(span, parent=span.parent - 1)
            size = len(_encode_span(placed))
            if size > bytes_max:
                placed = msgspec.structs.replace(placed, tensors=())
                size = len(_encode_span(placed))
            if size > bytes_max:
                break
            bytes_max -= size
            found.append(placed)
        return tuple(found)

    def end(self) -> None:
        """The request is over, with or without an answer."""
        if self._is_ended:
            return
        self._is_ended = True
        if self._index == 0 and self._tree.on_end is not None:
            self._tree.on_end(self._tree)

    def noted(self, parent: int) -> TraceSpan:
        """Return what was noted."""
        # Without the level TIMESTAMPS there are only tensors.
        has_times = TIMESTAMPS in self._tree.levels
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


def trace_id_of(context: str) -> bytes:
    """Return the trace id of a ``traceparent``, 16 bytes; a new one if that is none."""
    known = _TRACEPARENT.match(context)
    return bytes.fromhex(known[1]) if known else os.urandom(16)


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
