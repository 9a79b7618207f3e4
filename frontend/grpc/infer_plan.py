"""Plans: what is to be done for an inference message whose bytes in front of the tensors have been seen before.

A message is cut into: model name and version; the request's id, which may change from call to call; everything else up
to the first tensor byte; then the tensors, with a few bytes between them. The first and the third part make the key. A
plan exists only for requests of fixed shapes with raw contents, so the message's length tells where the third part
ends, and a repeated request costs two dictionary look-ups, the copy of its tensors and one write for the reply.
"""

from __future__ import annotations

from collections.abc import Sequence

from forebay.frontend.codec.infer_request import BinaryData, ParsedInfer
from forebay.frontend.data_plane.owners import OwnedSlab
from forebay.frontend.grpc.infer_message import WireRequest
from forebay.frontend.grpc.infer_reply import FINAL_ENTRY, output_entry, parameter_entries, raw_head
from forebay.frontend.grpc.wire import text_field
from forebay.frontend.start_inference import RowsRoute
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import byte_size

#: Plans kept; at the limit all are dropped.
_PLANS_MAX = 4096
#: Key bytes of one plan at most.
_KEY_BYTES_MAX = 4096
#: Lengths of what precedes the tensors, tried for one length of message.
_LENGTHS_MAX = 8


class InferPlan:
    """How to place and answer one form of request."""

    __slots__ = (
        "asked_version", "checks", "copied_bytes", "copies", "entry", "outputs", "priority", "reply_bytes",
        "reply_head", "reply_tail", "route", "rows", "stream_bytes", "stream_tail", "tensor_bytes", "timeout_us",
    )  # fmt: skip

    def __init__(
        self, route: RowsRoute, entry: ModelEntry, rows: int, request: ParsedInfer, asked_version: str
    ) -> None:
        self.route = route
        self.entry = entry
        self.rows = rows
        #: As the requests name it, maybe not at all.
        self.asked_version = asked_version
        self.priority = request.priority
        self.timeout_us = request.timeout_us
        #: Per input: where its bytes start and end, from the first tensor byte, and its index in the model.
        self.copies: tuple[tuple[int, int, int], ...] = ()
        #: What must stand between the tensors: where it starts, and the bytes.
        self.checks: tuple[tuple[int, bytes], ...] = ()
        self.copied_bytes = 0
        #: Per output: what precedes its bytes, and its index in the model.
        self.outputs: tuple[tuple[bytes, int], ...] = ()
        #: The reply in front of the id, and from there to the first output's bytes.
        self.reply_head = b""
        self.reply_tail = b""
        #: Bytes of the outputs, which every reply copies once.
        self.tensor_bytes = 0
        #: Length of the reply message without the id.
        self.reply_bytes = 0
        #: The same for a stream, where each reply says that it is the final one.
        self.stream_tail = b""
        self.stream_bytes = 0

    def place(self, message: memoryview, begin: int) -> tuple[OwnedSlab, int]:
        """Take rows and put the tensors of a message there; return the slab and the first row.

        Args:
            begin: where the message's tensors begin.

        Raises:
            ArenaFull: there are no rows.
        """
        route = self.route
        slab, first = route.loan(self.rows)
        memory, areas, base = route.engine.view, slab.layout.inputs, slab.base
        for start, end, index in self.copies:
            offset, row_bytes = areas[index]
            target = base + offset + first * row_bytes
            memory[target : target + end - start] = message[begin + start : begin + end]
        route.copied_in_bytes += self.copied_bytes
        return slab, first


class PlanBook:
    """All plans of a frontend."""

    __slots__ = ("_lengths", "_plans")

    def __init__(self) -> None:
        self._plans: dict[bytes, InferPlan] = {}
        #: Length of a message without the id, to where its tensors may begin.
        self._lengths: dict[int, tuple[int, ...]] = {}

    def clear(self) -> None:
        """Forget everything: the models have changed."""
        self._plans.clear()
        self._lengths.clear()

    def find(self, message: memoryview) -> tuple[InferPlan, bytes, int] | None:
        """Return the plan, the id field as it stands in the message, and where the tensors begin; None: no plan."""
        try:
            if message[0] != 0x0A or message[1] >= 0x80:
                return None
            id_start = 2 + message[1]
            if message[id_start] == 0x12 and message[id_start + 1] < 0x80:
                id_start += 2 + message[id_start + 1]
            id_end = id_start
            if message[id_start] == 0x1A and message[id_start + 1] < 0x80:
                id_end += 2 + message[id_start + 1]
        except IndexError:
            return None
        for length in self._lengths.get(len(message) - (id_end - id_start), ()):
            begin = length + id_end - id_start
            plan = self._plans.get(bytes(message[:id_start]) + bytes(message[id_end:begin]))
            if plan is None:
                continue
            id_field = bytes(message[id_start:id_end])
            if not id_field.isascii() or (id_field and plan.route.sees_requests):
                return None
            for offset, expected in plan.checks:
                if bytes(message[begin + offset : begin + offset + len(expected)]) != expected:
                    return None
            return plan, id_field, begin
        return None

    def remember(self, message: memoryview, wire: WireRequest, plan: InferPlan) -> None:
        """Keep a plan for messages that are equal to this one but for id and tensors."""
        if not wire.raw or not wire.is_plain or wire.raw_start > _KEY_BYTES_MAX:
            return
        id_start, id_end = _id_span(wire)
        begin = wire.raw[0][0]
        id_field = text_field(3, wire.id)
        expected = text_field(1, wire.model_name) + text_field(2, wire.model_version) + id_field
        if len(wire.id) > 100 or bytes(message[: len(expected)]) != expected or not wire.id.isascii():
            return
        if len(self._plans) >= _PLANS_MAX:
            self.clear()
        bare = len(message) - (id_end - id_start)
        lengths = self._lengths.get(bare, ())
        length = begin - (id_end - id_start)
        if length not in lengths:
            if len(lengths) >= _LENGTHS_MAX:
                return
            self._lengths[bare] = (*lengths, length)
        self._plans[bytes(message[:id_start]) + bytes(message[id_end:begin])] = plan


def _id_span(wire: WireRequest) -> tuple[int, int]:
    start = len(text_field(1, wire.model_name)) + len(text_field(2, wire.model_version))
    return start, start + len(text_field(3, wire.id))


def make_plan(
    route: RowsRoute, entry: ModelEntry, wire: WireRequest, message: memoryview, request: ParsedInfer, rows: int
) -> InferPlan | None:
    """Return the plan for requests that are equal to this validated one but for id and tensors; None: no plan.

    Args:
        rows: batch items, at least 1.
    """
    is_sequence = request.sequence_id or request.sequence_start or request.sequence_end
    if is_sequence or len(wire.raw) != len(request.inputs) or wire.raw[-1][1] != len(message):
        return None
    plan = InferPlan(route, entry, rows, request, wire.model_version)
    begin = wire.raw[0][0]
    copies: list[tuple[int, int, int]] = []
    checks: list[tuple[int, bytes]] = []
    last = begin
    for tensor in request.inputs:
        source = tensor.source
        if not isinstance(source, BinaryData):
            return None
        start, end = source.offset, source.offset + source.body_bytes
        if start > last:
            checks.append((last - begin, bytes(message[last:start])))
        copies.append((start - begin, end - begin, route.input_indices[tensor.name]))
        last = end
    plan.copies = tuple(copies)
    plan.checks = tuple(checks)
    plan.copied_bytes = sum(end - start for start, end, _index in copies)
    return plan if _plan_reply(plan, entry, request) else None


def _plan_reply(plan: InferPlan, entry: ModelEntry, request: ParsedInfer) -> bool:
    route = plan.route
    entries: list[bytes] = []
    outputs: list[tuple[bytes, int]] = []
    tensor_bytes = 0
    for wanted in request.output_plan(entry):
        if wanted.classification or wanted.region is not None:
            return False
        index = route.output_indices[wanted.name]
        spec = route.output_specs[index]
        shape: Sequence[int] = (plan.rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims
        size = byte_size(spec.datatype, shape)
        entries.append(output_entry(wanted.name, spec.datatype, shape))
        outputs.append((raw_head(size), index))
        tensor_bytes += size
    if not outputs:
        return False
    plan.reply_head = text_field(1, entry.name) + text_field(2, str(entry.version))
    # The first output's head is constant too, so it goes with what precedes it.
    parameters = parameter_entries(route.reply_parameters)
    plan.reply_tail = parameters + b"".join(entries) + outputs[0][0]
    plan.stream_tail = FINAL_ENTRY + plan.reply_tail
    plan.outputs = ((b"", outputs[0][1]), *outputs[1:])
    plan.tensor_bytes = tensor_bytes
    between = sum(len(head) for head, _index in outputs[1:])
    plan.reply_bytes = len(plan.reply_head) + len(plan.reply_tail) + between + tensor_bytes
    plan.stream_bytes = plan.reply_bytes + len(FINAL_ENTRY)
    return True
