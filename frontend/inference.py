"""One inference request between a protocol and the engine: the general path, for every form of request.

The protocol asks for places, fills them (or receives straight into them), submits, and is called back with each
response. HTTP's fast path (``http/fast_path.py``) short-cuts this for requests whose bytes it has seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.device_places import NO_TARGETS, DevicePlace, HeadMemories, Targets
from forebay.frontend.engine_client import EngineClient
from forebay.ipc.arena import align
from forebay.ipc.ensemble.device_rooms import DeviceRoom
from forebay.ipc.errors import QUEUE_FULL_TEXT, ArenaFull, NotReady, ServingError, from_wire
from forebay.ipc.messages import DeviceMemory, ParameterValue, ParcelSubmit, ReplyHead, TensorPlace
from forebay.ipc.request_options import RequestOptions
from forebay.ipc.shape_key import shape_key
from forebay.ipc.spans import BACKEND_INPUT, BACKEND_OUTPUT, QUEUE_INPUT, QUEUE_START, Trace
from forebay.ipc.tensor import byte_size
from forebay.ipc.validation import id_prefix

#: Reply blocks lent for outputs of unknown size never start larger than this.
_REPLY_GUESS_MAX = 1024 * 1024


def learn_reply_bytes(route: RouteClient, byte_size: int) -> None:
    """A reply did not fit: lend more from now on."""
    route.reply_guess_bytes = min(max(route.reply_guess_bytes, align(byte_size)), _REPLY_GUESS_MAX)


class InputTensor(msgspec.Struct, frozen=True):
    """One input that is about to be placed."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Batch dimension included."""
    byte_size: int
    device: DevicePlace | None = None
    """Where it lies in device memory, and stays; None: it is placed in the arena."""


class RequestMeta(RequestOptions, frozen=True, kw_only=True):
    """What a request carries besides tensors; the outputs in the model's order."""

    id: str = ""


class OutputView(msgspec.Struct, frozen=True):
    """One output of a response."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | bytes
    """In shared memory; valid during the callback only."""
    is_placed: bool = False
    """It is in device memory, where the client wants it; ``data`` is empty."""


class Response(msgspec.Struct, frozen=True):
    """One response, or the error that ended the request."""

    outputs: tuple[OutputView, ...] = ()
    parameters: Mapping[str, ParameterValue] = {}
    error: ServingError | None = None
    ran: bool = True
    """Whether a worker had the request; an error before that is the queue's."""
    final: bool = True
    """No further response follows."""
    is_empty: bool = False
    """A bare end mark of a decoupled model."""


OnResponse = Callable[[Response], None]


def expected_reply_bytes(route: RouteClient, rows: int) -> int:
    """Return how large a reply block to lend: exact for outputs of fixed shapes, else what has been seen."""
    entry = route.entry
    total = 0
    for spec in entry.outputs:
        if not spec.is_fixed:
            return max(route.reply_guess_bytes, total)
        shape = (rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims
        total += align(byte_size(spec.datatype, shape))
    return total


def make_parcel(
    route: RouteClient,
    token: int,
    places: Sequence[TensorPlace],
    rows: int,
    reply: tuple[int, int],
    meta: RequestMeta,
    memories: Sequence[DeviceMemory] = (),
    targets: tuple[TensorPlace, ...] = (),
    *,
    may_wait: bool = False,
) -> ParcelSubmit:
    """Return the message that submits a request outside slabs.

    Args:
        places: where the inputs lie, filled.
        rows: batch items, at least 1.
        reply: offset and bytes of the block lent for the outputs.
        memories: on devices, that places and targets lie in.
        targets: of outputs that go there.
        may_wait: an output that does not fit its target waits on the device for room.
    """
    engine, entry = route.engine, route.entry
    head = meta.parcel_head(meta.id, places, reply, memories, targets, may_wait=may_wait)
    return ParcelSubmit(
        route=route.route,
        token=token,
        rows=rows,
        enqueue_ns=engine.turn_ns(),
        head=engine.encode_head(head),
        shape_key=shape_key(entry.inputs, entry.max_batch_size, places, engine.view, token),
        priority=meta.priority,
        timeout_us=meta.timeout_us,
        deadline_ns=meta.deadline_ns,
        correlation_id=meta.sequence_id,
        sequence_start=meta.sequence_start,
        sequence_end=meta.sequence_end,
    )


def trace_inputs(trace: Trace, inputs: Sequence[InputTensor], places: Sequence[memoryview]) -> None:
    """Keep what goes into the queue; the backend gets the same."""
    for tensor, place in zip(inputs, places, strict=True):
        for activity in (QUEUE_INPUT, BACKEND_INPUT):
            trace.tensor(activity, tensor.name, tensor.datatype, tensor.shape, place)


def trace_outputs(trace: Trace, outputs: Sequence[OutputView]) -> None:
    """Keep what a backend made."""
    for view in outputs:
        trace.tensor(BACKEND_OUTPUT, view.name, view.datatype, view.shape, view.data)


class Inference:
    """One request. Life: placed -> submitted -> responses -> released; ``cancel`` at any time."""

    __slots__ = (
        "_block",
        "_block_bytes",
        "_engine",
        "_first",
        "_inputs",
        "_is_submitted",
        "_lent",
        "_meta",
        "_on_response",
        "_reply_bytes",
        "_reply_offset",
        "_slab",
        "_targets",
        "_token",
        "is_cancelled",
        "is_done",
        "places",
        "route",
        "rows",
    )  # fmt: skip

    def __init__(
        self,
        engine: EngineClient,
        route_number: int,
        inputs: Sequence[InputTensor],
        batch_size: int,
        *,
        is_bare: bool = False,
        targets: Targets = NO_TARGETS,
    ) -> None:
        """Take room for the inputs.

        Args:
            route_number: of the model version, from the catalog.
            inputs: already validated against the model.
            batch_size: as validated; 0 for a model that does not batch.
            is_bare: it carries nothing but tensors.
            targets: outputs that go to device memory, where the model lives.

        Raises:
            NotReady: the model version has just gone.
            ArenaFull: there is no room.
        """
        route = engine.routes.get(route_number)
        if route is None:
            raise NotReady("the model version was unloaded before the request could run")
        self._engine = engine
        self._targets = targets
        self.route: RouteClient = route
        self.rows = max(batch_size, 1)
        self._inputs = inputs
        self._slab: OwnedSlab | None = None
        self._first = 0
        self._block = self._block_bytes = 0
        self._reply_offset = self._reply_bytes = 0
        self._lent: list[tuple[int, int]] = []
        self._token = 0
        self._is_submitted = False
        self.is_cancelled = False
        self.is_done = False
        #: Where each input's bytes go, writable, in the order of the inputs.
        self.places: list[memoryview] = []
        on_device = bool(targets) or any(tensor.device is not None for tensor in inputs)
        if on_device or not route.takes_rows(is_bare=is_bare) or not self._place_rows(route):
            self._place_block()

    def _place_rows(self, route: RouteClient) -> bool:
        """Take rows; False if a slab for them has no room, which one block may find."""
        try:
            self._slab, self._first = route.loan(self.rows)
        except ArenaFull:
            return False
        index = {spec.name: number for number, spec in enumerate(route.entry.inputs)}
        self.places = [
            route.input_slice(self._slab, self._first, self.rows, index[tensor.name]) for tensor in self._inputs
        ]
        return True

    def _place_block(self) -> None:
        engine = self._engine
        total = sum(align(tensor.byte_size) for tensor in self._inputs if tensor.device is None)
        self._reply_bytes = expected_reply_bytes(self.route, self.rows)
        self._block_bytes = total + self._reply_bytes
        self._block = engine.allocate(self._block_bytes)
        self.route.block_bytes += self._block_bytes
        engine.want_gauges()
        self._reply_offset = self._block + total
        offset = self._block
        for tensor in self._inputs:
            size = 0 if tensor.device is not None else tensor.byte_size
            self.places.append(engine.view[offset : offset + size])
            offset += align(size)

    @property
    def rows_route(self) -> RouteClient | None:
        """What a plan for equal requests takes slab rows of; None: they do not lie in rows."""
        return self.route if self._slab is not None else None

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        """Hand the filled request over; ``on_response`` is called from the event loop until a final response."""
        self._on_response = on_response
        self._meta = meta
        trace = meta.trace
        if trace is not None:
            if trace.shows_tensors:
                trace_inputs(trace, self._inputs, self.places)
            trace.note(QUEUE_START)
        if self._slab is not None:
            self._is_submitted = True
            self.route.publish(
                self._slab, self._first, self.rows, self, meta.priority, meta.timeout_us, meta.deadline_ns
            )
            return
        self._token = self._engine.next_token()
        offset = self._block
        places: list[TensorPlace] = []
        memories = HeadMemories()
        for tensor in self._inputs:
            if tensor.device is not None:
                places.append(memories.place(tensor.name, tensor.datatype, tensor.shape, tensor.device))
                continue
            places.append(TensorPlace(tensor.name, tensor.datatype, tensor.shape, offset, tensor.byte_size))
            offset += align(tensor.byte_size)
        reply = (self._reply_offset, self._reply_bytes)
        targets = memories.targets(self._targets)
        parcel = make_parcel(self.route, self._token, places, self.rows, reply, meta, memories.memories, targets)
        # From here on the engine has the block; until then whoever cancels gives it back.
        self._is_submitted = True
        self.route.submit_parcel(parcel, self)

    # --- answers ---

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        self.is_done = True
        if self.is_cancelled:
            return
        entry = self.route.entry
        wanted = self._meta.outputs
        trace = self._meta.trace
        if trace is not None:
            trace.executed(self._engine.reply_times())
        outputs = tuple(
            OutputView(
                spec.name,
                spec.datatype,
                (self.rows, *spec.dims) if entry.max_batch_size > 0 else spec.dims,
                self.route.output_slice(slab, first, self.rows, index),
            )
            for index, spec in enumerate(entry.outputs)
            if not wanted or spec.name in wanted
        )
        if trace is not None and trace.shows_tensors:
            trace_outputs(trace, outputs)
        self._on_response(Response(outputs=outputs, parameters=parameters))

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        self.is_done = True
        if not self.is_cancelled:
            self._on_response(Response(error=error, ran=ran))

    def parcel_reply(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        try:
            if not self.is_cancelled:
                self._deliver(reply, final=final, ran=ran)
        finally:
            for offset, size in self._lent:
                self._engine.free(offset, size)
                self.route.block_bytes -= size
            self._lent.clear()
            if final:
                self.is_done = True
                self._free_block()

    def _deliver(self, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        trace = self._meta.trace
        if trace is not None and ran:
            trace.executed(self._engine.reply_times())
            trace.adopt(reply.spans)
        if reply.text or reply.code:
            text = reply.text
            if text == QUEUE_FULL_TEXT and not ran:
                # The one refusal of the queue that names the request (spec S-025).
                text = f"{id_prefix(self._meta.id)}{text}"
            self._on_response(Response(error=from_wire(reply.code, text), ran=ran, final=final))
            return
        view = self._engine.view
        outputs = tuple(
            OutputView(
                place.name,
                place.datatype,
                place.shape,
                b"" if place.memory else view[place.offset : place.offset + place.byte_size],
                is_placed=place.memory > 0,
            )
            for place in reply.outputs
        ) + tuple(OutputView(tensor.name, tensor.datatype, tensor.shape, tensor.data) for tensor in reply.inline)
        if trace is not None and trace.shows_tensors:
            trace_outputs(trace, outputs)
        is_empty = reply.index < 0
        self._on_response(Response(outputs=outputs, parameters=reply.parameters, final=final, is_empty=is_empty))

    def lend(self, byte_size: int) -> int:
        offset = self._engine.allocate(byte_size)
        self._lent.append((offset, byte_size))
        self.route.block_bytes += byte_size
        learn_reply_bytes(self.route, byte_size)
        return offset

    def lend_rooms(self, needs: Mapping[str, int]) -> Mapping[str, DeviceRoom]:
        return {}

    # --- the end ---

    def cancel(self) -> None:
        """Nobody waits any more. Room is given back when the engine has let go of it."""
        if self.is_done or self.is_cancelled:
            return
        self.is_cancelled = True
        if not self._is_submitted:
            self.is_done = True
            if self._slab is not None:
                self.route.release(self._slab, self._first, self.rows)
            else:
                self._free_block()
        elif self._slab is not None:
            self.route.cancel_rows(self._slab, self._first, self)
        elif self._token:
            self._engine.cancel(self._token)

    def _free_block(self) -> None:
        if self._block:
            self._engine.free(self._block, self._block_bytes)
            self.route.block_bytes -= self._block_bytes
            self._block = 0
