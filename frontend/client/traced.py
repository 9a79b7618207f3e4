"""What a client notes of its requests that are made for one that is traced (spec P-099, O-007, O-008)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from forebay.client.pending import Pending, PendingParcel
from forebay.client.places import full_shape, input_places, output_places
from forebay.ipc.messages import ParcelHead, ReplyHead, TensorPlace
from forebay.ipc.spans import BACKEND_INPUT, BACKEND_OUTPUT, QUEUE_INPUT, QUEUE_START, REQUEST_END, Trace
from forebay.ipc.tensor import TensorSpec, byte_size
from forebay.ipc.trace import TraceSpan
from forebay.ipc.wire import Times

_decode_head = msgspec.msgpack.Decoder(ParcelHead).decode


def trace_start(trace: Trace, pending: Pending, view: memoryview) -> None:
    """A request is about to be handed over for the first time.

    Args:
        view: uint8 [arena bytes]
    """
    if trace.shows_tensors:
        places: Sequence[TensorPlace] = ()
        if isinstance(pending, PendingParcel):
            places = _decode_head(pending.head).inputs
        elif pending.lease is not None:
            places = tuple(_in_rows(pending, input_places(pending.model, pending.lease)))
        for activity in (QUEUE_INPUT, BACKEND_INPUT):
            _keep(trace, activity, places, view)
    trace.note(QUEUE_START)


def trace_response(trace: Trace, reply: ReplyHead, view: memoryview) -> None:
    """A response has come."""
    _keep(trace, BACKEND_OUTPUT, reply.outputs, view)
    for tensor in reply.inline:
        trace.tensor(BACKEND_OUTPUT, tensor.name, tensor.datatype, tensor.shape, tensor.data)


def trace_rows(trace: Trace, pending: Pending, view: memoryview) -> None:
    """The answer has come, in the request's rows."""
    if trace.shows_tensors and pending.lease is not None:
        _keep(trace, BACKEND_OUTPUT, _in_rows(pending, output_places(pending.model, pending.lease)), view)


def trace_end(trace: Trace, times: Times, spans: Sequence[TraceSpan]) -> None:
    """The request is over.

    Args:
        times: of its execution; zeros: there was none.
        spans: what the model has asked others for it.
    """
    trace.executed(times)
    trace.adopt(spans)
    trace.note(REQUEST_END)
    trace.end()


def _in_rows(pending: Pending, places: Iterable[tuple[TensorSpec, int]]) -> Iterator[TensorPlace]:
    for spec, offset in places:
        shape = full_shape(spec, pending.rows, pending.model.signature.max_batch_size)
        yield TensorPlace(spec.name, spec.datatype, shape, offset, byte_size(spec.datatype, shape))


def _keep(trace: Trace, activity: str, places: Iterable[TensorPlace], view: memoryview) -> None:
    for place in places:
        if not place.memory:
            data = view[place.offset : place.offset + place.byte_size]
            trace.tensor(activity, place.name, place.datatype, place.shape, data)
