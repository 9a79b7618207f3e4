"""The general path of an inference message: walk, find the model, check, place; and from a response to its reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from forebay.frontend.catalog_view import parse_version
from forebay.frontend.codec.infer_request import BinaryData, JsonData, ParsedInfer, RegionData
from forebay.frontend.codec.infer_response import classify
from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.codec.validation import Validated, check_strings, validate_infer
from forebay.frontend.grpc.infer_message import InferMessage, WireRequest, read_request
from forebay.frontend.grpc.infer_plan import make_plan
from forebay.frontend.grpc.infer_reply import ReplyTensor, identity_fields, render_reply
from forebay.frontend.inference import OnResponse, RequestMeta, Response
from forebay.frontend.regions import RegionUse, take_places, targets_of
from forebay.frontend.start_inference import PlacedInference, request_meta, start_inference
from forebay.frontend.tracing import begin_sending, begin_trace, end_sending
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import QUEUE_FULL_TEXT, Code, ServingError, Unsupported

if TYPE_CHECKING:
    from forebay.frontend.grpc.request_head import RequestHead
    from forebay.frontend.grpc.server import GrpcFrontend


#: The arrival of a request, as traces call it.
_RECEIVED = ("GRPC_WAITREAD_START", "GRPC_WAITREAD_END")


class PlacedRequest(msgspec.Struct, frozen=True):
    """A request whose tensors lie in shared memory."""

    entry: ModelEntry
    request: ParsedInfer
    asked_version: str
    """As the request names it, maybe not at all."""
    enable_empty_final: bool
    inference: PlacedInference
    meta: RequestMeta
    regions: RegionUse | None
    """Memory of the client's that the request names."""

    def submit(self, deadline_ns: int, on_response: OnResponse) -> None:
        """Hand the request over.

        Args:
            deadline_ns: monotonic time at which the client gives up; 0: never.
        """
        meta = msgspec.structs.replace(self.meta, deadline_ns=deadline_ns) if deadline_ns else self.meta
        self.inference.submit(meta, on_response)

    def answer(self, response: Response, send: Callable[[PlacedRequest, Response], None]) -> None:
        """Have a response sent, and note when; after the last one nothing of the request is held."""
        trace = self.meta.trace
        if trace is None:
            send(self, response)
        else:
            begin_sending(trace, response)
            send(self, response)
            end_sending(trace, response)
        if response.final:
            self.release()

    def release(self) -> None:
        """The request has been answered for the last time."""
        if self.regions is not None:
            self.regions.release()

    def cancel(self) -> None:
        """Nobody waits any more; at any time."""
        self.inference.cancel()
        self.release()
        if self.meta.trace is not None:
            self.meta.trace.end()

    def check_strings(self) -> None:
        """Check what could not be looked at before it was in its place; see the function."""
        check_strings(self.entry, self.request, self.inference.places)


def find_model(frontend: GrpcFrontend, wire: WireRequest) -> ModelEntry:
    """Return the model that a request names.

    Raises:
        ServingError: there is none (spec G-047).
    """
    return frontend.catalog.find(wire.model_name, parse_version(wire.model_version))


def read_parsed(
    frontend: GrpcFrontend, head: RequestHead, wire: WireRequest, message: memoryview, *, unary: bool
) -> tuple[ModelEntry, InferMessage]:
    """Return the model that is asked, and the request as far as its own rules go.

    Args:
        message: what was walked; of the tensors nothing is looked at.
        unary: it came by ModelInfer, which has one reply only.

    Raises:
        ServingError: the request is wrong or there is no such model.
    """
    entry = find_model(frontend, wire)
    if unary and entry.decoupled:
        raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
    found = read_request(wire, message)
    if head.forwarded:
        request = msgspec.structs.replace(found.request, parameters={**found.request.parameters, **head.forwarded})
        found = msgspec.structs.replace(found, request=request)
    return entry, found


def place_parsed(
    frontend: GrpcFrontend,
    head: RequestHead,
    entry: ModelEntry,
    found: InferMessage,
    validate: Callable[[], Validated],
) -> PlacedRequest:
    """Check a request, take room for it, and fill in what did not come as raw contents.

    Args:
        validate: compares it with the model; asked when its regions have been found, as Triton does.

    Raises:
        ServingError: it is wrong, there is no room, the model is gone, or a region is; nothing is held then.
    """
    request = found.request
    sources = [tensor.source for tensor in request.inputs] + [output.region for output in request.outputs]
    named = [source for source in sources if isinstance(source, RegionData)]
    regions = RegionUse(frontend.regions, named) if named else None
    try:
        return _place(frontend, head, entry, found, validate().batch_size, regions)
    except BaseException:
        if regions is not None:
            regions.release()
        raise


def _place(
    frontend: GrpcFrontend,
    head: RequestHead,
    entry: ModelEntry,
    found: InferMessage,
    batch_size: int,
    regions: RegionUse | None,
) -> PlacedRequest:
    request = found.request
    inference = start_inference(
        frontend.engine,
        entry.route,
        take_places(request, regions),
        batch_size,
        is_bare=request.is_bare(entry),
        targets=targets_of(request, regions),
    )
    try:
        for tensor, place in zip(request.inputs, inference.places, strict=True):
            if isinstance(tensor.source, JsonData):
                place[:] = tensor.source.data
                inference.route.copied_in_bytes += tensor.source.byte_size
            elif isinstance(tensor.source, RegionData) and regions is not None:
                regions.fill(place, tensor.source)
    except BaseException:
        inference.cancel()
        raise
    trace = begin_trace(inference.route, request.id, head.trace_context, _RECEIVED)
    meta = request_meta(request, trace)
    return PlacedRequest(entry, request, found.asked_version, found.enable_empty_final, inference, meta, regions)


def place_request(
    frontend: GrpcFrontend, head: RequestHead, wire: WireRequest, message: memoryview, *, unary: bool
) -> PlacedRequest:
    """Return the request of a whole message, placed and ready to be submitted.

    Args:
        message: valid during the call only.
        unary: it came by ModelInfer, which has one reply only.

    Raises:
        ServingError: the request is wrong or cannot be taken; nothing is held then.
    """
    entry, found = read_parsed(frontend, head, wire, message, unary=unary)
    request = found.request
    placed = place_parsed(frontend, head, entry, found, lambda: validate_infer(entry, request, message))
    inference = placed.inference
    for tensor, place in zip(request.inputs, inference.places, strict=True):
        source = tensor.source
        if isinstance(source, BinaryData):
            place[:] = message[source.offset : source.offset + source.body_bytes]
            inference.route.copied_in_bytes += source.body_bytes
    if placed.regions is not None:
        try:
            placed.check_strings()
        except BaseException:
            placed.cancel()
            raise
    route = inference.rows_route
    if route is not None and wire.is_plain and wire.raw and not head.forwarded:
        plan = make_plan(route, entry, wire, message, request, inference.rows)
        if plan is not None:
            frontend.plans.remember(message, wire, plan)
    return placed


def was_refused(error: ServingError, *, ran: bool) -> bool:
    """Return whether a request never got into the model's queue; Triton then says so before it has a response."""
    return not ran and (error.code in (Code.INVALID_ARG, Code.UNSUPPORTED) or error.text.endswith(QUEUE_FULL_TEXT))


def render(placed: PlacedRequest, response: Response, extra: dict[str, bool]) -> list[Buffer]:
    """Return the pieces of a ``ModelInferResponse`` for one response; views are valid during its callback only.

    Args:
        extra: parameters besides the response's own.

    Raises:
        ServingError: an output cannot be answered as the client wants.
    """
    entry = placed.entry
    identity = identity_fields(entry.name, str(entry.version), placed.request.id)
    tensors = _reply_tensors(placed, response)
    placed.inference.route.copied_out_bytes += sum(len(tensor.data) for tensor in tensors)
    return render_reply(identity, {**response.parameters, **extra}, tensors)


def _reply_tensors(placed: PlacedRequest, response: Response) -> list[ReplyTensor]:
    entry = placed.entry
    views = {view.name: view for view in response.outputs}
    tensors: list[ReplyTensor] = []
    for wanted in placed.request.output_plan(entry):
        view = views.get(wanted.name)
        if view is None:
            continue
        if wanted.classification:
            spec = entry.output_named(wanted.name)
            labels = spec.labels if spec is not None else ()
            best = classify(
                view.name,
                view.datatype,
                view.shape,
                view.data,
                wanted.classification,
                labels,
                is_batched=entry.max_batch_size > 0,
                binary=True,
            )
            tensors.append(ReplyTensor(best.name, best.datatype, best.shape, best.data or b""))
        elif wanted.region is not None and placed.regions is not None:
            # Its entry stays empty (spec G-043).
            placed.regions.store(view.name, view.data, wanted.region)
            tensors.append(ReplyTensor(view.name, view.datatype, view.shape, b""))
        else:
            tensors.append(ReplyTensor(view.name, view.datatype, view.shape, view.data))
    return tensors
