"""The generate extension: one reply as JSON, or every response as a server-sent event (spec H-270..H-284)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.frontend.codec.generate import (
    NOT_ONE_RESPONSE,
    STREAM_TYPE,
    check_generate_encoding,
    error_event,
    parse_generate_request,
    render_generate_reply,
    server_sent_event,
)
from forebay.frontend.codec.infer_response import JSON_TYPE, OutputTensor
from forebay.frontend.codec.validation import validate_infer
from forebay.frontend.errors import error_body, http_status
from forebay.frontend.http.call import Call
from forebay.frontend.http.general_path import RECEIVED, fill
from forebay.frontend.http.head import Head, Target
from forebay.frontend.http.replies import error_reply, head_bytes, stream_head
from forebay.frontend.inference import RequestMeta, Response
from forebay.frontend.regions import take_places
from forebay.frontend.start_inference import PlacedInference, start_inference
from forebay.frontend.tracing import begin_trace
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import ServingError
from forebay.ipc.spans import REQUEST_END, RESPONSE_COMPLETE, Trace

if TYPE_CHECKING:
    from forebay.frontend.http.connection import Connection
    from forebay.frontend.http.server import HttpFrontend


class GenerateCall(Call):
    """One request to ``generate`` or ``generate_stream``."""

    __slots__ = (
        "_entry",
        "_frontend",
        "_has_begun",
        "_head",
        "_inference",
        "_is_stream",
        "_reply",
        "_request_id",
        "_trace",
    )

    def __init__(self, frontend: HttpFrontend, connection: Connection, head: Head) -> None:
        super().__init__(connection, keep_alive=head.keep_alive)
        self._frontend = frontend
        self._head = head
        self._is_stream = head.target is Target.GENERATE_STREAM
        self._entry: ModelEntry | None = None
        self._inference: PlacedInference | None = None
        self._request_id = ""
        #: generate: the only response so far, or the error in its place.
        self._reply: bytes | None = None
        self._trace: Trace | None = None
        #: generate_stream: status and headers are sent.
        self._has_begun = False
        if self._is_stream and head.is_http_1_0:
            # Without chunks, the end of the connection is the end of the stream.
            self.keep_alive = False

    def start(self, body: memoryview) -> None:
        """Take a request whose whole body is here; the body may be reused when this returns."""
        frontend, head = self._frontend, self._head
        try:
            entry = frontend.catalog.find(head.model, head.version)
            check_generate_encoding(head.content_encoding)
            request = parse_generate_request(entry, body, max_json_bytes=frontend.settings.max_input_size)
            batch_size = validate_infer(entry, request, body).batch_size
            inference = start_inference(frontend.engine, entry.route, take_places(request), batch_size)
        except ServingError as error:
            self._refuse(error)
            return
        for tensor, place in zip(request.inputs, inference.places, strict=True):
            inference.route.copied_in_bytes += fill(place, tensor, body)
        self._entry = entry
        self._inference = inference
        self._request_id = request.id
        self._trace = begin_trace(inference.route, request.id, head.trace_context, RECEIVED)
        meta = RequestMeta(id=request.id, parameters=request.parameters, trace=self._trace)
        inference.submit(meta, self._on_response)

    def cancel(self) -> None:
        if self._inference is not None:
            self._inference.cancel()
        self._end_trace()

    def _end_trace(self) -> None:
        trace = self._trace
        if trace is not None:
            trace.note(REQUEST_END)
            # Triton does not measure these here (spec O-006).
            trace.note("HTTP_SEND_START", 0)
            trace.note("HTTP_SEND_END", 0)
            trace.end()

    def count_copy(self, count: int) -> None:
        if self._inference is not None:
            self._inference.route.copied_out_bytes += count

    def _refuse(self, error: ServingError) -> None:
        self.connection.answer(self, [error_reply(error, JSON_TYPE, self._head.connection_line)])

    def _on_response(self, response: Response) -> None:
        error = response.error
        if self._trace is not None:
            self._trace.note(RESPONSE_COMPLETE)
        payload = b""
        if error is None and not response.is_empty:
            try:
                payload = self._render(response)
            except ServingError as fault:
                error = fault
        if self._is_stream:
            self._stream(payload, error, is_final=response.final)
        else:
            self._collect(payload, error, is_final=response.final)
        if response.final:
            self._end_trace()

    def _render(self, response: Response) -> bytes:
        entry = self._entry
        assert entry is not None
        outputs = [OutputTensor(view.name, view.datatype, view.shape, view.data) for view in response.outputs]
        return render_generate_reply(entry.name, entry.version, self._request_id, response.parameters, outputs)

    # --- generate ---

    def _collect(self, payload: bytes, error: ServingError | None, *, is_final: bool) -> None:
        line = self._head.connection_line
        if payload or error is not None:
            if self._reply is not None:
                # A second one; the status was sent by then in Triton, so it stays 200 (spec H-276).
                payload, error = error_body(NOT_ONE_RESPONSE), None
            self._reply = (
                error_reply(error, JSON_TYPE, line)
                if error is not None
                else head_bytes(200, JSON_TYPE, len(payload), line) + payload
            )
        if is_final:
            body = error_body(NOT_ONE_RESPONSE)
            none = head_bytes(200, JSON_TYPE, len(body), line) + body
            self.connection.answer(self, [self._reply if self._reply is not None else none])

    # --- generate_stream ---

    def _stream(self, payload: bytes, error: ServingError | None, *, is_final: bool) -> None:
        parts: list[bytes] = []
        event = error_event(error) if error is not None else server_sent_event(payload) if payload else b""
        if not self._has_begun and (event or is_final):
            self._has_begun = True
            # The status is that of the first response (spec H-278).
            status = http_status(error) if error is not None else 200
            parts.append(stream_head(status, STREAM_TYPE, self._connection_line, is_chunked=self._is_chunked))
        if event:
            parts += (b"%x\r\n" % len(event), event, b"\r\n") if self._is_chunked else (event,)
        if is_final:
            if self._is_chunked:
                parts.append(b"0\r\n\r\n")
            self.connection.answer(self, [b"".join(parts)])
        elif parts:
            self.connection.stream(self, [b"".join(parts)])

    @property
    def _is_chunked(self) -> bool:
        return not self._head.is_http_1_0

    @property
    def _connection_line(self) -> bytes:
        return self._head.connection_line if self.keep_alive == self._head.keep_alive else b"Connection: close\r\n"
