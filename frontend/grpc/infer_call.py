"""``ModelInfer``: one request, one reply (spec G-006, G-049, G-089)."""

from __future__ import annotations

from collections.abc import Mapping

from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab
from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.infer_message import walk_request
from forebay.frontend.grpc.infer_path import PlacedRequest, place_request, render
from forebay.frontend.grpc.infer_plan import InferPlan
from forebay.frontend.grpc.infer_reply import parameter_entries
from forebay.frontend.grpc.status import RpcError, Status
from forebay.frontend.grpc.upload import Upload
from forebay.frontend.inference import Response
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParameterValue

_NO_PLAN_TEXT = "the request holds more than one message"


class InferCall(Call):
    """One unary inference. With a plan it waits in slab rows itself, without one through an :class:`Inference`."""

    __slots__ = ("_first", "_id_field", "_is_taken", "_placed", "_plan", "_slab")

    _first: int
    _id_field: bytes
    _is_taken: bool
    _placed: PlacedRequest | None
    _plan: InferPlan
    _slab: OwnedSlab | None

    def opened(self) -> None:
        """Finish construction; called once, before any message."""
        self._is_taken = False
        self._placed = None
        self._slab = None
        self.reply_encoding = self.frontend.reply_encoding(self.head)

    # --- the request ---

    def take_message(self, message: memoryview) -> None:
        if self._is_taken:
            raise RpcError(Status.INTERNAL, _NO_PLAN_TEXT)
        self._is_taken = True
        frontend = self.frontend
        found = None if self.head.forwarded else frontend.plans.find(message)
        if found is None:
            self._take_unknown(message)
            return
        plan, self._id_field, begin = found
        route = plan.route
        sampler = route.sampler
        if sampler is not None and (self.head.trace_context or not sampler.skips()):
            self._take_unknown(message)
            return
        self._plan = plan
        self._slab, self._first = slab, first = plan.place(message, begin)
        route.publish(slab, first, plan.rows, self, plan.priority, plan.timeout_us, self.deadline_ns)

    def _take_unknown(self, message: memoryview) -> None:
        wire = walk_request(message)
        self._submit(place_request(self.frontend, self.head, wire, message, unary=True))

    def open_upload(self, message_bytes: int) -> Upload | None:
        return None if self._is_taken else Upload(self.frontend, self.head, message_bytes, unary=True)

    def take_upload(self, upload: Upload) -> None:
        if upload.error is not None:
            raise upload.error
        upload.check()
        assert upload.placed is not None
        self._is_taken = True
        self._submit(upload.placed)

    def _submit(self, placed: PlacedRequest) -> None:
        self._placed = placed
        placed.submit(self.deadline_ns, self._on_response)

    def take_end(self) -> None:
        if not self._is_taken:
            self.fail(RpcError(Status.INTERNAL, "the request holds no message"))

    def cancelled(self) -> None:
        placed, self._placed = self._placed, None
        slab, self._slab = self._slab, None
        if placed is not None:
            placed.cancel()
        elif slab is not None:
            self._plan.route.cancel_rows(slab, self._first, self)

    # --- answers, with a plan ---

    @property
    def rows(self) -> int:
        return self._plan.rows

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        if self.is_local_closed:
            return
        plan = self._plan
        memory = self.frontend.engine.view
        rows = plan.rows
        areas = slab.layout.outputs
        base = slab.base
        id_field = self._id_field
        own = parameter_entries(parameters) if parameters else b""
        pieces: list[Buffer] = [plan.reply_head, id_field, own, plan.reply_tail]
        for head, index in plan.outputs:
            if head:
                pieces.append(head)
            offset, row_bytes = areas[index]
            start = base + offset + first * row_bytes
            pieces.append(memory[start : start + rows * row_bytes])
        plan.route.copied_out_bytes += plan.tensor_bytes
        self.reply(pieces, plan.reply_bytes + len(id_field) + len(own))

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        if self._slab is not None:  # Else whoever let go of the rows says why.
            self.fail(error)

    # --- answers, without ---

    def _on_response(self, response: Response) -> None:
        placed = self._placed
        if placed is None:
            return
        if response.final:
            self._placed = None
        placed.answer(response, self._answer)

    def _answer(self, placed: PlacedRequest, response: Response) -> None:
        if self.is_local_closed:
            return
        if response.error is not None:
            self.fail(response.error)
            return
        try:
            pieces = render(placed, response, {})
        except ServingError as error:
            self.fail(error)
            return
        self.reply(pieces, sum(map(len, pieces)))
