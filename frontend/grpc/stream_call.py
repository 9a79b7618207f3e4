"""``ModelStreamInfer``: requests and responses on one stream, each for itself (spec G-060..G-070).

Replies to ordinary requests go out in the order of the requests; those of decoupled models as they come, after what
was asked before them has been placed. Errors are replies too and leave the stream open, unless the client wants it
otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab
from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.infer_message import walk_request
from forebay.frontend.grpc.infer_path import PlacedRequest, place_request, render, was_refused
from forebay.frontend.grpc.infer_plan import InferPlan
from forebay.frontend.grpc.infer_reply import (
    FINAL_ENTRY,
    NOT_FINAL_ENTRY,
    identity_fields,
    parameter_entries,
    stream_error,
    stream_reply,
)
from forebay.frontend.grpc.status import RpcError, Status
from forebay.frontend.grpc.upload import Upload
from forebay.frontend.grpc.wire import Malformed, text_field
from forebay.frontend.inference import Response
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParameterValue

#: Reply bytes of one stream that wait for the client to read: beyond the first, it may send no more requests; beyond
#: the second, the stream ends.
_QUEUE_BYTES_HIGH = 4 * 1024 * 1024
_QUEUE_BYTES_MAX = 64 * 1024 * 1024
#: Requests of one stream in flight: beyond the first, the client may send no more; beyond the second, they are refused.
_IN_FLIGHT_HIGH = 4096
_IN_FLIGHT_MAX = 65_536


class StreamSlot:
    """One request of a stream: its place in the order of replies, and who waits for it in the engine."""

    __slots__ = (
        "_call",
        "_first",
        "_id_field",
        "_is_ended",
        "_placed",
        "_plan",
        "_slab",
        "is_ordered",
        "ready",
        "request_id",
    )

    def __init__(self, call: StreamInferCall, request_id: str) -> None:
        self._call = call
        self.request_id = request_id
        self.is_ordered = True
        #: Replies that wait for those of earlier requests.
        self.ready: list[bytes] = []
        self._is_ended = False
        self._placed: PlacedRequest | None = None
        self._plan: InferPlan | None = None
        self._slab: OwnedSlab | None = None
        self._first = 0
        self._id_field = b""

    @property
    def is_ended(self) -> bool:
        """Whether its last reply is known."""
        return self._is_ended

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._is_ended = True
        placed, self._placed = self._placed, None
        if placed is not None:
            placed.cancel()
        elif self._plan is not None and self._slab is not None:
            self._plan.route.cancel_rows(self._slab, self._first, self)

    # --- rows of a known plan ---

    def submit_plan(self, plan: InferPlan, id_field: bytes, message: memoryview, begin: int) -> None:
        """Place and hand over a request of a known form."""
        self._plan = plan
        self._id_field = id_field
        self._slab, self._first = slab, first = plan.place(message, begin)
        plan.route.publish(slab, first, plan.rows, self, plan.priority, plan.timeout_us, self._call.deadline_ns)

    @property
    def rows(self) -> int:
        assert self._plan is not None
        return self._plan.rows

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        plan = self._plan
        assert plan is not None
        if self._is_ended:
            return
        memory = plan.route.engine.view
        own = parameter_entries(parameters) if parameters else b""
        pieces: list[Buffer] = [plan.reply_head, self._id_field, own, plan.stream_tail]
        for head, index in plan.outputs:
            offset, row_bytes = slab.layout.outputs[index]
            start = slab.base + offset + first * row_bytes
            pieces += (head, memory[start : start + plan.rows * row_bytes])
        self._is_ended = True
        plan.route.copied_out_bytes += plan.tensor_bytes
        self._call.take_reply(self, *stream_reply(pieces, plan.stream_bytes + len(self._id_field) + len(own)))

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        plan = self._plan
        assert plan is not None
        if self._is_ended:
            return
        if was_refused(error, ran=ran):
            self._call.refuse(self, error)
        else:
            self._fail(error, plan.entry.name, plan.asked_version)

    # --- the general path ---

    def submit(self, placed: PlacedRequest) -> None:
        """Hand over a placed request."""
        self._placed = placed
        placed.submit(self._call.deadline_ns, self._on_response)

    def _on_response(self, response: Response) -> None:
        placed = self._placed
        if placed is None or self._is_ended:
            return
        placed.answer(response, self._answer)

    def _answer(self, placed: PlacedRequest, response: Response) -> None:
        entry = placed.entry
        if response.error is not None:
            if was_refused(response.error, ran=response.ran):
                self._call.refuse(self, response.error)
            else:
                self._fail(response.error, entry.name, placed.asked_version, is_final=response.final)
            return
        if response.is_empty and response.final:
            self._end_empty(placed)
            return
        if response.final:
            self._is_ended = True
        try:
            pieces = render(placed, response, {"triton_final_response": response.final})
        except ServingError as error:
            self._fail(error, entry.name, placed.asked_version, is_final=response.final)
            return
        self._call.take_reply(self, *stream_reply(pieces, sum(map(len, pieces))))

    def _end_empty(self, placed: PlacedRequest) -> None:
        """A decoupled model has ended without a further response (spec G-063, G-064)."""
        self._is_ended = True
        if placed.enable_empty_final:
            # The version as it was asked for: there is no response of the model that would know better.
            inner = identity_fields(placed.entry.name, placed.asked_version, placed.request.id) + FINAL_ENTRY
            self._call.take_reply(self, *stream_reply([inner], len(inner)))
        else:
            self._call.slot_ended(self)

    def _fail(self, error: ServingError, name: str, asked_version: str, *, is_final: bool = True) -> None:
        if self._is_ended and not is_final:
            return
        self._is_ended = is_final
        inner = identity_fields(name, asked_version, self.request_id)
        self._call.take_failure(self, error, inner + (FINAL_ENTRY if is_final else NOT_FINAL_ENTRY))


class StreamInferCall(Call):
    """One stream."""

    __slots__ = ("_has_ended", "_order", "_ready_bytes", "_slots")

    _has_ended: bool
    _ready_bytes: int
    _order: deque[StreamSlot]
    _slots: set[StreamSlot]

    def opened(self) -> None:
        """Finish construction; called once, before any message."""
        #: Ordinary requests that have not been answered, oldest first.
        self._order = deque()
        #: All requests that have not been answered.
        self._slots = set()
        self._has_ended = False
        #: Bytes of replies that wait for those of earlier requests.
        self._ready_bytes = 0
        self.reply_encoding = self.frontend.reply_encoding(self.head)
        self.send_head()

    # --- requests ---

    def take_message(self, message: memoryview) -> None:
        frontend = self.frontend
        if len(self._slots) >= _IN_FLIGHT_MAX:
            raise RpcError(Status.RESOURCE_EXHAUSTED, "too many requests of one stream are in flight")
        found = None if self.head.forwarded else frontend.plans.find(message)
        if found is not None and not self._is_due(found[0]):
            plan, id_field, begin = found
            slot = self._open(str(id_field[2:], "ascii"))
            try:
                slot.submit_plan(plan, id_field, message, begin)
            except ServingError as error:
                self.refuse(slot, error)
            return
        try:
            wire = walk_request(message)
        except Malformed as error:
            # The rest of the stream cannot be trusted.
            self.fail(error)
            return
        slot = self._open(wire.id)
        try:
            placed = place_request(frontend, self.head, wire, message, unary=False)
        except ServingError as error:
            self.refuse(slot, error)
            return
        self._submit(slot, placed)

    def open_upload(self, message_bytes: int) -> Upload | None:
        return Upload(self.frontend, self.head, message_bytes, unary=False)

    def take_upload(self, upload: Upload) -> None:
        if isinstance(upload.error, Malformed):
            raise upload.error
        slot = self._open(upload.request_id)
        try:
            if upload.error is not None:
                raise upload.error
            upload.check()
        except ServingError as error:
            self.refuse(slot, error)
            return
        assert upload.placed is not None
        self._submit(slot, upload.placed)

    def _submit(self, slot: StreamSlot, placed: PlacedRequest) -> None:
        if placed.entry.decoupled:
            slot.is_ordered = False
            self._order.pop()
        slot.submit(placed)

    def _is_due(self, plan: InferPlan) -> bool:
        """Whether the request is to be traced, which only the general path does."""
        sampler = plan.route.sampler
        return sampler is not None and (bool(self.head.trace_context) or not sampler.skips())

    def _open(self, request_id: str) -> StreamSlot:
        slot = StreamSlot(self, request_id)
        self._slots.add(slot)
        self._order.append(slot)
        return slot

    def refuse(self, slot: StreamSlot, error: ServingError) -> None:
        """Answer a request that never got into the engine: in-band in any case (spec G-066, G-067)."""
        slot.cancel()
        reply = stream_error(error.text, text_field(3, slot.request_id))
        self.take_reply(slot, [reply], len(reply))

    def take_end(self) -> None:
        self._has_ended = True
        self._finish_if_done()

    def wind_up(self) -> None:
        # After what has been asked (spec G-087).
        self.take_end()

    @property
    def holds_back(self) -> bool:
        return (
            self.queued_bytes + self._ready_bytes > _QUEUE_BYTES_HIGH
            or len(self._slots) > _IN_FLIGHT_HIGH
            or len(self.queue) > self.frontend.settings.max_response_pool_size
        )

    # --- replies ---

    def take_reply(self, slot: StreamSlot, pieces: list[Buffer], message_bytes: int) -> None:
        """Send a reply of a request, or keep it until it is its turn; the pieces are copied."""
        if slot.is_ordered and self._order and self._order[0] is not slot:
            slot.ready.append(b"".join(pieces))
            self._ready_bytes += message_bytes
            if self._ready_bytes > _QUEUE_BYTES_MAX:
                self.fail(RpcError(Status.RESOURCE_EXHAUSTED, "too many replies wait for an earlier one"))
            return
        self.send(pieces, message_bytes)
        if slot.is_ended:
            self.slot_ended(slot)
        if self.queued_bytes > _QUEUE_BYTES_MAX:
            self.fail(RpcError(Status.RESOURCE_EXHAUSTED, "the client does not read its responses"))

    def take_failure(self, slot: StreamSlot, error: ServingError, inner: bytes) -> None:
        """A request that was in the engine has failed."""
        if self.head.wants_grpc_errors:
            self.fail(error)
            return
        reply = stream_error(error.text, inner)
        self.take_reply(slot, [reply], len(reply))

    def slot_ended(self, slot: StreamSlot) -> None:
        """The last reply of a request is out: those behind it may follow."""
        self._slots.discard(slot)
        order = self._order
        if slot.is_ordered and order and order[0] is slot:
            order.popleft()
            while order and (order[0].ready or order[0].is_ended):
                head = order[0]
                ready, head.ready = head.ready, []
                for message in ready:
                    self._ready_bytes -= len(message)
                    self.send([message], len(message))
                if not head.is_ended:
                    break
                self._slots.discard(head)
                order.popleft()
        self.connection.replenish(self)
        self._finish_if_done()

    def on_drained(self) -> None:
        self.connection.replenish(self)

    def _finish_if_done(self) -> None:
        if self._has_ended and not self._slots:
            self.finish()

    def cancelled(self) -> None:
        slots, self._slots = self._slots, set()
        self._order.clear()
        for slot in slots:
            slot.cancel()
