"""A large body of no known plan, received straight into shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.frontend.codec.infer_request import BinaryData, ParsedInfer, parse_infer_request, raw_infer_request
from forebay.frontend.codec.validation import InputFacts, check_strings, validate_request
from forebay.frontend.http.general_path import GeneralCall, fill, remember_plan
from forebay.frontend.http.head import Head
from forebay.frontend.http.known_request import KnownRequest, find_plan
from forebay.frontend.http.replies import TEXT_TYPE
from forebay.frontend.regions import RegionUse, take_places
from forebay.frontend.start_inference import PlacedInference
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import InvalidArgument, ServingError

if TYPE_CHECKING:
    from forebay.frontend.http.connection import Connection
    from forebay.frontend.http.server import HttpFrontend


class DirectUpload:
    """A large body on its way from the socket straight into shared memory; or to nowhere, if the request is refused.

    The places are filled in the order in which the tensors stand in the body; each starts at an aligned address.
    """

    def __init__(self, frontend: HttpFrontend, call: GeneralCall, head: Head, data: memoryview) -> None:
        """Parse the JSON in ``data`` (which may hold the beginning of the tensors too) and take room."""
        self._frontend = frontend
        self._call = call
        self._head = head
        self._error: tuple[ServingError, str] | None = None
        self._entry: ModelEntry | None = None
        self._request: ParsedInfer | None = None
        self._inference: PlacedInference | None = None
        #: Places still to be filled, in body order; the first may be partly filled.
        self._places: list[memoryview] = []
        #: Bytes of the body that have not arrived yet.
        self.remaining_bytes = head.content_length - len(data)
        content_type = TEXT_TYPE
        try:
            self._entry = call.find_model()
            content_type = "application/json"
            self._open(self._entry, data)
        except ServingError as error:
            self._error = (error, content_type)

    def _open(self, entry: ModelEntry, data: memoryview) -> None:
        head = self._head
        found = find_plan(head, data)
        if isinstance(found, KnownRequest):
            known, regions = found, self._call.use_regions(found.request)
        else:
            known, regions = self._read(entry, data)
        request = known.request
        inference = self._call.place(known)
        self._request = request
        self._inference = inference
        copied = 0
        for tensor, place in zip(request.inputs, inference.places, strict=True):
            source = tensor.source
            if isinstance(source, BinaryData):
                prefix = len(source.prefix)
                place[:prefix] = source.prefix
                arrived = data[source.offset : source.offset + source.body_bytes]
                place[prefix : prefix + len(arrived)] = arrived
                copied += len(arrived)
                rest = place[prefix + len(arrived) :]
                if rest:
                    self._places.append(rest)
            else:
                copied += fill(place, tensor, data, regions)
        inference.route.copied_in_bytes += copied
        remember_plan(head, inference, known, data)

    def _read(self, entry: ModelEntry, data: memoryview) -> tuple[KnownRequest, RegionUse | None]:
        """Parse and check the JSON; return the regions that it names, too."""
        head = self._head
        limit = self._frontend.settings.max_input_size
        if head.json_bytes == 0:
            request = raw_infer_request(entry, head.content_length, max_json_bytes=limit)
        else:
            request = parse_infer_request(
                data, head.json_bytes, model_name=entry.name, max_json_bytes=limit, body_bytes=head.content_length
            )
        facts = [
            InputFacts(tensor.name, tensor.datatype, tensor.shape, tensor.source.byte_size) for tensor in request.inputs
        ]
        regions = self._call.use_regions(request)
        validated = validate_request(entry, request.id, facts, [output.name for output in request.outputs])
        is_bare = request.is_bare(entry) and not head.forwarded
        return KnownRequest(entry, request, validated.batch_size, take_places(request), is_bare), regions

    def next_place(self) -> memoryview:
        """Return where the next bytes go; never empty while the upload lasts."""
        if self._error is not None or not self._places:
            return self._frontend.scratch_view[: max(1, min(self.remaining_bytes, len(self._frontend.scratch)))]
        return self._places[0]

    def received(self, count: int) -> bool:
        """Note that ``count`` bytes have arrived; True: the body is complete."""
        self.remaining_bytes -= count
        if self._error is None and self._places:
            place = self._places[0][count:]
            if place:
                self._places[0] = place
            else:
                del self._places[0]
        return self.remaining_bytes <= 0

    def submit(self, connection: Connection) -> None:
        """The body is complete: hand the request over, or answer what was wrong with it."""
        connection.add_call(self._call)
        if self._error is None:
            assert self._entry is not None
            assert self._request is not None
            assert self._inference is not None
            try:
                check_strings(self._entry, self._request, self._inference.places)
            except InvalidArgument as error:
                self._error = (error, "application/json")
        if self._error is not None:
            self.abandon()
            self._call.fail(*self._error)
            return
        assert self._entry is not None
        assert self._request is not None
        assert self._inference is not None
        self._call.submit(self._entry, self._request, self._inference)

    def abandon(self) -> None:
        """The client has left, or the request is refused: give the room back."""
        self._call.cancel()
        if self._inference is not None:
            self._inference.cancel()
            self._inference = None
