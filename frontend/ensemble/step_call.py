"""One step of a running ensemble: a request to a model whose inputs are passed on by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.ensemble.tensors import Block
from forebay.frontend.inference import RequestMeta, expected_reply_bytes, learn_reply_bytes, make_parcel
from forebay.frontend.tracing import (
    BACKEND_INPUT,
    BACKEND_OUTPUT,
    QUEUE_INPUT,
    QUEUE_START,
    REQUEST_END,
    RESPONSE_COMPLETE,
    Trace,
)
from forebay.ipc.ensemble.steps import OnStepReply, StepReply, StepTimes
from forebay.ipc.ensemble.tensors import Tensor, hold_all, release_all
from forebay.ipc.errors import Internal, from_wire
from forebay.ipc.messages import ReplyHead, TensorPlace


def traced_reply(trace: Trace, on_reply: OnStepReply) -> OnStepReply:
    """Return what takes a step's replies and ends its trace with the last one."""

    def take(reply: StepReply) -> None:
        trace.note(RESPONSE_COMPLETE)
        if reply.final:
            trace.note(REQUEST_END)
            trace.end()
        on_reply(reply)

    return take


class ModelCall:
    """A request to a model that is no ensemble. Life: submitted -> replies -> final; holds its inputs until then."""

    __slots__ = (
        "_enqueue_ns",
        "_first",
        "_inputs",
        "_is_cancelled",
        "_lent",
        "_meta",
        "_on_reply",
        "_places",
        "_route",
        "_rows",
        "_token",
    )

    def __init__(
        self,
        route: RouteClient,
        inputs: Mapping[str, Tensor],
        places: Sequence[TensorPlace],
        rows: int,
        meta: RequestMeta,
        on_reply: OnStepReply,
    ) -> None:
        """Prepare the request.

        Args:
            inputs: by the model's names, each in a block.
            places: the same, as the worker is told.
        """
        self._route = route
        self._places = places
        self._rows = rows
        self._meta = meta
        self._inputs = inputs
        self._on_reply = on_reply
        self._is_cancelled = False
        self._lent: list[Block] = []
        self._first: Block | None = None
        self._token = 0
        self._enqueue_ns = 0

    def start(self) -> None:
        """Hand the request over; ``on_reply`` is called from the event loop until a final reply.

        Raises:
            ArenaFull: there is no room for the outputs.
        """
        route, engine = self._route, self._route.engine
        first = self._first = Block(route, max(expected_reply_bytes(route, self._rows), 1))
        hold_all(self._inputs.values())
        self._token = engine.next_token()
        self._enqueue_ns = engine.turn_ns()
        if self._meta.trace is not None:
            self._trace_start(self._meta.trace)
        reply = (first.offset, first.byte_size)
        route.submit_parcel(make_parcel(route, self._token, self._places, self._rows, reply, self._meta), self)

    def _trace_start(self, trace: Trace) -> None:
        if trace.shows_tensors:
            for name, tensor in self._inputs.items():
                for activity in (QUEUE_INPUT, BACKEND_INPUT):
                    trace.tensor(activity, name, tensor.datatype, tensor.shape, tensor.view(self._route.engine))
        trace.note(QUEUE_START)

    def cancel(self) -> None:
        """Nobody waits any more; the blocks are given back when the engine has let go of them."""
        if not self._is_cancelled:
            self._is_cancelled = True
            if self._token:
                self._route.engine.cancel(self._token)

    # --- called by the engine client ---

    def lend(self, byte_size: int) -> int:
        block = Block(self._route, byte_size)
        self._lent.append(block)
        learn_reply_bytes(self._route, byte_size)
        return block.offset

    def parcel_reply(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        assert self._first is not None
        blocks = [self._first, *self._lent]
        try:
            if not self._is_cancelled:
                found = self._read(reply, blocks, final=final, ran=ran)
                if self._meta.trace is not None:
                    self._trace_reply(self._meta.trace, found, ran=ran)
                self._on_reply(found)
        finally:
            for block in self._lent:
                block.release()
            self._lent.clear()
            if final:
                self._first.release()
                release_all(self._inputs.values())

    def _trace_reply(self, trace: Trace, reply: StepReply, *, ran: bool) -> None:
        engine = self._route.engine
        if ran:
            trace.executed(engine.reply_times())
        if trace.shows_tensors:
            for name, tensor in reply.outputs.items():
                trace.tensor(BACKEND_OUTPUT, name, tensor.datatype, tensor.shape, tensor.view(engine))

    def _read(self, reply: ReplyHead, blocks: Sequence[Block], *, final: bool, ran: bool) -> StepReply:
        times = StepTimes.since(self._enqueue_ns, self._route.engine.reply_times()) if final else StepTimes()
        if reply.text or reply.code:
            return StepReply(error=from_wire(reply.code, reply.text), ran=ran, final=final, times=times)
        outputs: dict[str, Tensor] = {}
        for place in reply.outputs:
            block = next((block for block in blocks if block.contains(place.offset)), None)
            if block is None or place.offset + place.byte_size > block.offset + block.byte_size:
                return StepReply(error=Internal("the model's answer could not be read"), final=True)
            outputs[place.name] = Tensor(place.datatype, place.shape, place.byte_size, place.offset, block)
        for inline in reply.inline:
            outputs[inline.name] = Tensor(inline.datatype, inline.shape, len(inline.data), data=inline.data)
        has_response = bool(outputs) or not self._route.entry.decoupled
        return StepReply(outputs, reply.parameters, final=final, has_response=has_response, times=times)
