"""Inference requests that no plan is known for: parse, check, place, submit, render. Makes the plans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from forebay.frontend.codec.compression import decompress, request_encoding
from forebay.frontend.codec.infer_request import (
    BinaryData,
    JsonData,
    ParsedInfer,
    ParsedInput,
    RegionData,
    decode_infer_request,
    parse_header_length,
)
from forebay.frontend.codec.infer_response import OutputTensor, classify, render_infer_response
from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.codec.validation import check_strings, validate_infer
from forebay.frontend.http.call import Call
from forebay.frontend.http.fast_path import make_plan
from forebay.frontend.http.head import Head
from forebay.frontend.http.known_request import KnownRequest, find_plan, is_repeatable, remember, uses_regions
from forebay.frontend.http.open_sequences import OpenSequences
from forebay.frontend.http.replies import TEXT_TYPE, error_reply, infer_reply
from forebay.frontend.inference import Response
from forebay.frontend.regions import RegionUse, take_places, targets_of
from forebay.frontend.start_inference import PlacedInference, request_meta, start_inference
from forebay.frontend.tracing import begin_trace
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import ServingError, Unavailable, Unsupported
from forebay.ipc.spans import REQUEST_END, RESPONSE_COMPLETE, Trace

if TYPE_CHECKING:
    from forebay.frontend.http.connection import Connection
    from forebay.frontend.http.server import HttpFrontend

#: The arrival of a request, as traces call it.
RECEIVED = ("HTTP_RECV_START", "HTTP_RECV_END")

#: Errors of requests that waited and never ran; they are answered as text, like those of requests that ran (H-003).
_QUEUED_TEXTS = ("Request timeout expired", "timeout of the corresponding sequence has been expired")


class GeneralCall(Call):
    """One inference request on its way through the engine."""

    __slots__ = (
        "_complete_ns",
        "_entry",
        "_frontend",
        "_head",
        "_inference",
        "_received_ns",
        "_regions",
        "_request",
        "_trace",
    )

    def __init__(self, frontend: HttpFrontend, connection: Connection, head: Head) -> None:
        super().__init__(connection, keep_alive=head.keep_alive)
        self._frontend = frontend
        self._head = head
        self._entry: ModelEntry | None = None
        self._request: ParsedInfer | None = None
        self._inference: PlacedInference | None = None
        self._regions: RegionUse | None = None
        self._trace: Trace | None = None
        #: When the head, and the whole body, had been read; taken only while requests are traced.
        self._received_ns = time.monotonic_ns() if frontend.engine.is_tracing else 0
        self._complete_ns = 0

    def find_model(self) -> ModelEntry:
        """Return the model that is asked.

        Raises:
            ServingError: there is none that HTTP can ask (spec H-039..H-042, H-061).
        """
        entry = self._frontend.catalog.find(self._head.model, self._head.version)
        if entry.decoupled:
            raise Unsupported("HTTP end point doesn't support models with decoupled transaction policy")
        return entry

    def fail(self, error: ServingError, content_type: str = "application/json") -> None:
        """Answer with an error."""
        self._send([error_reply(error, content_type, self._head.connection_line)])

    def _send(self, buffers: Sequence[Buffer]) -> None:
        self._release_regions()
        trace = self._trace
        if trace is None:
            self.connection.answer(self, buffers)
            return
        trace.note(RESPONSE_COMPLETE)
        trace.note(REQUEST_END)
        trace.note("HTTP_SEND_START")
        self.connection.answer(self, buffers)
        trace.note("HTTP_SEND_END")
        trace.end()

    def start(self, body: memoryview) -> None:
        """Take a request whose whole body is here; the body may be reused when this returns."""
        frontend, head = self._frontend, self._head
        self._complete_ns = self._received_ns
        known = find_plan(head, body)
        if isinstance(known, KnownRequest):
            self._start_known(known, body)
            return
        try:
            # Checked before the request itself is looked at; Triton answers these as text (spec H-003, H-060).
            entry = self.find_model()
            encoding = request_encoding(head.content_encoding)
            plain: memoryview = body
            if encoding != "identity":
                plain = memoryview(decompress(body, encoding, max_bytes=frontend.settings.max_input_size))
            json_bytes = parse_header_length(head.header_length, len(plain))
        except ServingError as error:
            self.fail(error, TEXT_TYPE)
            return
        inference: PlacedInference | None = None
        try:
            request = decode_infer_request(entry, plain, json_bytes, max_json_bytes=frontend.settings.max_input_size)
            self.use_regions(request)
            batch_size = validate_infer(entry, request, plain).batch_size
            is_bare = request.is_bare(entry) and not head.forwarded
            known = KnownRequest(entry, request, batch_size, take_places(request), is_bare)
            inference = self.place(known)
            copied = 0
            for tensor, place in zip(request.inputs, inference.places, strict=True):
                copied += fill(place, tensor, plain, self._regions)
            if self._regions is not None:
                check_strings(entry, request, inference.places)
        except ServingError as error:
            if inference is not None:
                inference.cancel()
            self.fail(error)
            return
        inference.route.copied_in_bytes += copied
        remember_plan(head, inference, known, body)
        self.submit(entry, request, inference)

    def _start_known(self, known: KnownRequest, body: memoryview) -> None:
        entry, request = known.entry, known.request
        inference: PlacedInference | None = None
        try:
            regions = self.use_regions(request)
            inference = self.place(known)
            for tensor, place in zip(request.inputs, inference.places, strict=True):
                inference.route.copied_in_bytes += fill(place, tensor, body, regions)
        except ServingError as error:
            if inference is not None:
                inference.cancel()
            self.fail(error)
            return
        self.submit(entry, request, inference)

    def use_regions(self, request: ParsedInfer) -> RegionUse | None:
        """Find the regions that a request names, for as long as it lasts; None: it names none.

        Raises:
            NotFound: one is not registered.
            InvalidArgument: a place lies outside of its region.
        """
        sources = [tensor.source for tensor in request.inputs] + [output.region for output in request.outputs]
        places = [source for source in sources if isinstance(source, RegionData)]
        if places:
            self._regions = RegionUse(self._frontend.regions, places)
        return self._regions

    def place(self, known: KnownRequest) -> PlacedInference:
        """Take room for the inputs of a request whose regions are in use already.

        Raises:
            ServingError: as :func:`start_inference` does.
        """
        regions = self._regions
        return start_inference(
            self._frontend.engine,
            known.entry.route,
            known.inputs if regions is None else take_places(known.request, regions),
            known.batch_size,
            is_bare=known.is_bare,
            targets=targets_of(known.request, regions),
        )

    def _release_regions(self) -> None:
        if self._regions is not None:
            self._regions.release()
            self._regions = None

    def submit(self, entry: ModelEntry, request: ParsedInfer, inference: PlacedInference) -> None:
        """Hand the placed request over; a server that stops only takes those of sequences that have begun."""
        if entry.sequence_idle_us:
            try:
                self._note_sequence(entry, request)
            except Unavailable as error:
                inference.cancel()
                self.fail(error)
                return
        self._entry = entry
        self._request = request
        self._inference = inference
        head = self._head
        self._trace = begin_trace(
            inference.route, request.id, head.trace_context, RECEIVED, self._received_ns, self._complete_ns
        )
        inference.submit(request_meta(request, self._trace, head.forwarded), self._on_response)
        self.connection.sort(None if entry.is_ensemble else inference.route)

    def _note_sequence(self, entry: ModelEntry, request: ParsedInfer) -> None:
        connection = self.connection
        if connection.sequences is None:
            connection.sequences = OpenSequences()
        if self._frontend.is_draining:
            connection.sequences.check_goes_on(entry, request)
        connection.sequences.asked(entry, request)

    def _on_response(self, response: Response) -> None:
        entry, request = self._entry, self._request
        assert entry is not None
        assert request is not None
        if entry.sequence_idle_us and self.connection.sequences is not None:
            self.connection.sequences.answered(entry, request, has_failed=response.error is not None)
        if response.error is not None:
            was_queued = response.ran or response.error.text in _QUEUED_TEXTS
            self.fail(response.error, TEXT_TYPE if was_queued else "application/json")
            return
        try:
            rendered = render_infer_response(
                entry.name, entry.version, request.id, response.parameters, self._outputs(response)
            )
            head = self._head
            buffers = infer_reply(rendered, head.accept_encoding, head.connection_line, head.binary_type)
        except ServingError as error:
            self.fail(error, TEXT_TYPE)
            return
        self._send(buffers)

    def _outputs(self, response: Response) -> list[OutputTensor]:
        entry, request = self._entry, self._request
        assert entry is not None
        assert request is not None
        views = {view.name: view for view in response.outputs}
        outputs: list[OutputTensor] = []
        for wanted in request.output_plan(entry):
            view = views.get(wanted.name)
            if view is None:
                continue
            if wanted.classification:
                spec = entry.output_named(wanted.name)
                labels = spec.labels if spec is not None else ()
                outputs.append(
                    classify(
                        view.name,
                        view.datatype,
                        view.shape,
                        view.data,
                        wanted.classification,
                        labels,
                        is_batched=entry.max_batch_size > 0,
                        binary=wanted.binary,
                    )
                )
            elif wanted.region is not None and self._regions is not None:
                self._regions.store(view.name, view.data, wanted.region)
                outputs.append(OutputTensor(view.name, view.datatype, view.shape, None))
            else:
                outputs.append(OutputTensor(view.name, view.datatype, view.shape, view.data, wanted.binary))
        return outputs

    def cancel(self) -> None:
        self._release_regions()
        if self._inference is not None:
            self._inference.cancel()
        if self._trace is not None:
            self._trace.note(REQUEST_END)
            self._trace.end()

    def count_copy(self, count: int) -> None:
        if self._inference is not None:
            self._inference.route.copied_out_bytes += count


def fill(place: memoryview, tensor: ParsedInput, body: memoryview, regions: RegionUse | None = None) -> int:
    """Bring a tensor to its place; return the bytes copied in user space.

    Raises:
        InvalidArgument: it lies in a region that its client has truncated.
    """
    source = tensor.source
    if isinstance(source, RegionData):
        assert regions is not None
        regions.fill(place, source)
        return 0
    if isinstance(source, JsonData):
        place[:] = source.data
    elif isinstance(source, BinaryData):
        prefix = len(source.prefix)
        if prefix:
            place[:prefix] = source.prefix
        place[prefix:] = body[source.offset : source.offset + source.body_bytes]
    return source.byte_size


def remember_plan(head: Head, inference: PlacedInference, known: KnownRequest, body: memoryview) -> None:
    """Keep what is known of requests that are equal to this one but for their tensors, if there can be any.

    Args:
        body: begins with the JSON.
    """
    if not is_repeatable(head, known.request):
        return
    route = inference.rows_route
    plan = None
    if route is not None and not uses_regions(known.request):
        plan = make_plan(route, known.entry, known.request, inference.rows, head.connection_line)
    remember(head, body, plan or known)
