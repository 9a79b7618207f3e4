"""One step of a running ensemble: a request to a model whose inputs are passed on by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.frontend.data_plane.device_pools import DeviceBlock
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.ensemble.tensors import Block
from forebay.frontend.inference import RequestMeta, expected_reply_bytes, learn_reply_bytes, make_parcel
from forebay.ipc.counters import ProducerCounter
from forebay.ipc.ensemble.device_rooms import DeviceRoom, device_targets
from forebay.ipc.ensemble.steps import OnStepReply, StepReply, StepRequest, StepTimes
from forebay.ipc.ensemble.tensors import ClientsOwn, Tensor, hold_all, release_all
from forebay.ipc.ensemble.traced import trace_tensors
from forebay.ipc.errors import Internal, from_wire
from forebay.ipc.messages import ReplyHead, TensorPlace
from forebay.ipc.spans import (
    BACKEND_INPUT,
    BACKEND_OUTPUT,
    QUEUE_INPUT,
    QUEUE_START,
)

_NO_TARGETS: tuple[TensorPlace, ...] = ()


def _unreadable() -> StepReply:
    return StepReply(error=Internal("the model's answer could not be read"), final=True)


class ModelCall:
    """A request to a model that is no ensemble. Life: submitted -> replies -> final; holds its inputs until then."""

    __slots__ = (
        "_device_blocks",
        "_enqueue_ns",
        "_first",
        "_is_cancelled",
        "_lent",
        "_meta",
        "_on_reply",
        "_request",
        "_route",
        "_token",
    )

    def __init__(self, route: RouteClient, request: StepRequest, meta: RequestMeta, on_reply: OnStepReply) -> None:
        """Prepare the request."""
        self._route = route
        self._request = request
        self._meta = meta
        self._on_reply = on_reply
        self._is_cancelled = False
        #: Where outputs go that stay on the model's GPU, by name.
        self._device_blocks: dict[str, DeviceBlock] = {}
        self._lent: list[Block] = []
        self._first: Block | None = None
        self._token = 0
        self._enqueue_ns = 0

    def start(self) -> None:
        """Hand the request over; ``on_reply`` is called from the event loop until a final reply.

        Raises:
            ArenaFull: there is no room for the outputs.
        """
        route, engine, request = self._route, self._route.engine, self._request
        first = self._first = Block(route, max(expected_reply_bytes(route, request.rows), 1))
        hold_all(request.inputs.values())
        self._token = engine.next_token()
        self._enqueue_ns = engine.turn_ns()
        if self._meta.trace is not None:
            for activity in (QUEUE_INPUT, BACKEND_INPUT):
                trace_tensors(self._meta.trace, activity, request.inputs, engine)
            self._meta.trace.note(QUEUE_START)
        reply = (first.offset, first.byte_size)
        memories, targets = request.memories, _NO_TARGETS
        if request.device_outputs:
            memories, targets = device_targets(memories, self._take_device_blocks())
        parcel = make_parcel(
            route,
            self._token,
            request.places,
            request.rows,
            reply,
            self._meta,
            memories,
            targets,
            may_wait=bool(targets),
        )
        route.submit_parcel(parcel, self)

    def _take_device_blocks(self) -> dict[str, DeviceRoom | None]:
        """Take room for outputs on the model's GPU, as long as there is any, besides what the client has there.

        Returns:
            The blocks; None for those outputs that ask for one when their size is known. Others come to the host.
        """
        rooms: dict[str, DeviceRoom | None] = {}
        for name, byte_size in self._request.device_outputs.items():
            if name in self._request.output_rooms:
                rooms[name] = self._request.output_rooms[name]
                continue
            expected = byte_size or self._route.output_sizes.expected(name, self._request.rows)
            block = self._take_device_block(name, expected) if expected else None
            if block is not None or not byte_size:
                rooms[name] = block
        return rooms

    def _take_device_block(self, name: str, byte_size: int) -> DeviceBlock | None:
        block = self._route.engine.device_pools.take(self._route.entry.device_id, byte_size)
        if block is not None:
            self._device_blocks[name] = block
        return block

    def lend_rooms(self, needs: Mapping[str, int]) -> Mapping[str, DeviceRoom]:
        rooms: dict[str, DeviceRoom] = {}
        for name, byte_size in needs.items():
            request = self._request
            if byte_size <= 0 or name not in request.device_outputs or name in request.output_rooms:
                continue  # Nobody asked for it there, or the client has less room.
            if (former := self._device_blocks.pop(name, None)) is not None:
                former.release()
            block = self._take_device_block(name, byte_size)
            if block is not None:
                rooms[name] = block
        return rooms

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
                trace = self._meta.trace
                if trace is not None:
                    if ran:
                        trace.executed(self._route.engine.reply_times())
                        trace.adopt(reply.spans)
                    trace_tensors(trace, BACKEND_OUTPUT, found.outputs, self._route.engine)
                self._on_reply(found)
        finally:
            for block in self._lent:
                block.release()
            self._lent.clear()
            if final:
                self._first.release()
                release_all(self._request.inputs.values())
                for device_block in self._device_blocks.values():
                    device_block.release()

    def _on_device(self, place: TensorPlace) -> Tensor | None:
        """Return an output that has stayed on the GPU; None: it was not to."""
        room = self._request.output_rooms.get(place.name)
        if room is not None:
            fits = place.offset == room.offset and place.byte_size <= room.byte_size
            tensor = Tensor(place.datatype, place.shape, place.byte_size, room.offset, ClientsOwn(), memory=room.memory)
            return tensor if fits else None
        block = self._device_blocks.get(place.name)
        if block is None or place.byte_size > block.byte_size:
            return None
        self._route.counters[ProducerCounter.DEVICE_PASSED_BYTES] += place.byte_size
        self._route.output_sizes.learn(place.name, self._request.rows, place.byte_size)
        block.shrink(place.byte_size)
        return Tensor(place.datatype, place.shape, place.byte_size, block.offset, block, memory=block.memory)

    def _read(self, reply: ReplyHead, blocks: Sequence[Block], *, final: bool, ran: bool) -> StepReply:
        times = StepTimes.since(self._enqueue_ns, self._route.engine.reply_times()) if final else StepTimes()
        if reply.text or reply.code:
            return StepReply(error=from_wire(reply.code, reply.text), ran=ran, final=final, times=times)
        outputs: dict[str, Tensor] = {}
        for place in reply.outputs:
            if place.memory:
                tensor = self._on_device(place)
                if tensor is None:
                    return _unreadable()
                outputs[place.name] = tensor
                continue
            block = next((block for block in blocks if block.contains(place.offset)), None)
            if block is None or place.offset + place.byte_size > block.offset + block.byte_size:
                return _unreadable()
            outputs[place.name] = Tensor(place.datatype, place.shape, place.byte_size, place.offset, block)
        for inline in reply.inline:
            outputs[inline.name] = Tensor(inline.datatype, inline.shape, len(inline.data), data=inline.data)
        return StepReply(outputs, reply.parameters, final=final, has_response=reply.index >= 0, times=times)
