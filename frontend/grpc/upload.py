"""A large inference message on its way from the socket into shared memory.

Its fields come in order, tensors last, as every protobuf library writes them: once the first tensor's length has
arrived everything else is known, the request is checked, gets its places, and the tensors are received into them; large
frames without any copy. A message that turns out to be otherwise is collected in private memory instead, and read like
a small one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from forebay.frontend.codec.infer_request import BinaryData
from forebay.frontend.codec.validation import InputFacts, validate_request
from forebay.frontend.grpc.infer_message import WireRequest, walk_request
from forebay.frontend.grpc.infer_path import PlacedRequest, place_parsed, read_parsed
from forebay.frontend.grpc.wire import LENGTH, Malformed, read_varint, varint
from forebay.ipc.errors import InvalidArgument, ServingError
from forebay.ipc.tensor import DATATYPES, byte_size

if TYPE_CHECKING:
    from forebay.frontend.grpc.request_head import RequestHead
    from forebay.frontend.grpc.server import GrpcFrontend

#: What may precede the tensors.
_PREFIX_BYTES_MAX = 64 * 1024
#: Bytes left of a place or frame below which receiving them by themselves is not worth a system call.
_DIRECT_BYTES_MIN = 16 * 1024
_RAW_TAG = 7 << 3 | LENGTH


class Upload:
    """One message. Ends as ``placed``, as ``error``, or as ``whole``: its bytes, to be read as ever."""

    def __init__(self, frontend: GrpcFrontend, head: RequestHead, message_bytes: int, *, unary: bool) -> None:
        self._frontend = frontend
        self._head = head
        self._unary = unary
        self._message_bytes = message_bytes
        #: Bytes that have not arrived yet.
        self.left = message_bytes
        self.placed: PlacedRequest | None = None
        self.error: ServingError | None = None
        self.whole: bytearray | None = None
        #: Of the request, as soon as it is known.
        self.request_id = ""
        self._held_bytes = 0
        self._prefix = bytearray()
        self._scanned = 0
        #: What is still to come, in order: bytes between tensors as they must be, and places.
        self._parts: list[bytes | memoryview] = []
        #: What has come, for a message that turns out to be otherwise.
        self._done: list[bytes | memoryview] = []

    @property
    def is_refused(self) -> bool:
        """The call fails whatever is still to come; a stream, though, goes on behind the message."""
        return self._unary and self.error is not None

    # --- bytes in ---

    def take(self, chunk: memoryview) -> None:
        """Take some bytes, at most ``left``; the view is not kept.

        Raises:
            RpcError: too much memory is held for such messages.
        """
        self.left -= len(chunk)
        if self.error is not None:
            return
        if self.whole is not None:
            self._collect(chunk)
        elif self.placed is not None:
            self._fill(chunk)
        else:
            self._begin(chunk)

    def place(self, limit: int) -> memoryview | None:
        """Return where the next bytes, at most ``limit``, can be received to; None: hand them to :meth:`take`."""
        if self.error is not None or not self._parts:
            return None
        part = self._parts[0]
        size = min(limit, len(part))
        return part[:size] if isinstance(part, memoryview) and size >= _DIRECT_BYTES_MIN else None

    def received(self, count: int) -> None:
        """``count`` bytes lie where :meth:`place` said."""
        self.left -= count
        self._advance(count)

    def _advance(self, count: int) -> None:
        part = self._parts[0]
        self._done.append(part[:count])
        if count == len(part):
            del self._parts[0]
        else:
            self._parts[0] = part[count:]

    def _begin(self, chunk: memoryview) -> None:
        self._prefix += chunk
        try:
            start = self._find_tensors()
            if start is None:
                if len(self._prefix) > _PREFIX_BYTES_MAX or self.left == 0:
                    self._give_up()
                return
            self._open(*start)
        except Malformed as error:
            self.error = error
        except ServingError as error:
            self.error = error
            self._drop()

    def _find_tensors(self) -> tuple[int, int, int] | None:
        """Return where the first tensor's tag, bytes and end are; None: they have not arrived yet."""
        view, end = memoryview(self._prefix), len(self._prefix)
        position = self._scanned
        while position < end:
            try:
                tag, start = read_varint(view, position, end)
                length, start = read_varint(view, start, end)
            except Malformed:
                # Cut short here; if it is truly broken, the walk will say so.
                return None
            if tag & 7 != LENGTH:
                return None
            if tag == _RAW_TAG:
                return position, start, start + length
            if start + length > end:
                return None
            position = self._scanned = start + length
        return None

    def _open(self, tag_start: int, first: int, first_end: int) -> None:
        """Everything but the tensors is here: check the request and take room."""
        prefix = memoryview(bytes(self._prefix[:first]))
        wire = walk_request(prefix[:tag_start])
        self.request_id = wire.id
        spans = self._spans(wire, first, first_end)
        if spans is None:
            self._give_up()
            return
        wire = msgspec.structs.replace(wire, raw=spans, raw_start=tag_start)
        entry, found = read_parsed(self._frontend, self._head, wire, prefix, unary=self._unary)
        request = found.request
        facts = [
            InputFacts(tensor.name, tensor.datatype, tensor.shape, tensor.source.byte_size) for tensor in request.inputs
        ]
        wanted = [output.name for output in request.outputs]
        self.placed = place_parsed(
            self._frontend, self._head, entry, found, lambda: validate_request(entry, request.id, facts, wanted)
        )
        last = first
        for tensor, place in zip(request.inputs, self.placed.inference.places, strict=True):
            if isinstance(tensor.source, BinaryData):
                start = tensor.source.offset
                if start > last:
                    self._parts.append(_raw_head(tensor.source.body_bytes))
                if len(place):
                    self._parts.append(place)
                last = start + tensor.source.body_bytes
        rest = bytes(self._prefix[first:])
        self._prefix = bytearray(prefix)
        self._fill(memoryview(rest))

    def _spans(self, wire: WireRequest, first: int, first_end: int) -> list[tuple[int, int]] | None:
        """Return where each tensor will be, or None if shapes and message length do not tell."""
        tensors = [
            tensor
            for tensor in wire.inputs
            if tensor.contents is None and "shared_memory_region" not in tensor.parameters
        ]
        spans = [(first, first_end)]
        for index, tensor in enumerate(tensors):
            if tensor.datatype == "BYTES" or tensor.datatype not in DATATYPES:
                if len(tensors) > 1:
                    return None
                continue
            try:
                size = byte_size(tensor.datatype, tensor.shape)
            except InvalidArgument:
                return None
            if index == 0:
                if size != first_end - first:
                    return None
            else:
                start = spans[-1][1] + len(_raw_head(size))
                spans.append((start, start + size))
        return spans if tensors and spans[-1][1] == self._message_bytes else None

    def _fill(self, chunk: memoryview) -> None:
        """Copy what arrived together with other bytes."""
        position, end = 0, len(chunk)
        while position < end:
            part = self._parts[0]
            size = min(len(part), end - position)
            piece = chunk[position : position + size]
            if isinstance(part, memoryview):
                part[:size] = piece
                assert self.placed is not None
                self.placed.inference.route.copied_in_bytes += size
            elif part[:size] != bytes(piece):
                self._give_up()
                self._collect(chunk[position:])
                return
            self._advance(size)
            position += size

    # --- another kind of message ---

    def _give_up(self) -> None:
        """Collect the message in private memory from now on."""
        self.whole = bytearray()
        so_far = [bytes(self._prefix), *self._done]
        self._prefix = bytearray()
        for piece in so_far:
            self._collect(memoryview(piece))
        self._drop()

    def _collect(self, chunk: memoryview) -> None:
        assert self.whole is not None
        self._frontend.hold(len(chunk))
        self._held_bytes += len(chunk)
        self.whole += chunk

    def _drop(self) -> None:
        placed, self.placed = self.placed, None
        self._parts.clear()
        self._done.clear()
        if placed is not None:
            placed.cancel()

    # --- the end ---

    def check(self) -> None:
        """Look at what could not be looked at before it was here: the framing of strings.

        Raises:
            InvalidArgument: it is wrong; nothing is held then.
        """
        assert self.placed is not None
        try:
            self.placed.check_strings()
        except ServingError:
            self._drop()
            raise

    def release(self) -> None:
        """Private memory is no longer needed."""
        self._frontend.release(self._held_bytes)
        self._held_bytes = 0
        self.whole = None

    def abandon(self) -> None:
        """Nobody waits any more: give everything back."""
        self._drop()
        self.release()


def _raw_head(size: int) -> bytes:
    return bytes((_RAW_TAG,)) + varint(size)
