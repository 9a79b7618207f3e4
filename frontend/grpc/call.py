"""One gRPC call on one stream: messages out of bytes, replies, status, deadline. What it does is in subclasses."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from forebay.frontend.grpc.http2.connection import Connection
from forebay.frontend.grpc.http2.frames import Http2Code
from forebay.frontend.grpc.http2.hpack_encoder import encode_plain
from forebay.frontend.grpc.http2.stream import Buffer, Stream
from forebay.frontend.grpc.request_head import RequestHead
from forebay.frontend.grpc.status import (
    ACCEPT_ENCODING,
    CONTENT_TYPE,
    RpcError,
    Status,
    only_tail_block,
    status_of,
    tail_block,
)

if TYPE_CHECKING:
    from forebay.frontend.grpc.server import GrpcFrontend
    from forebay.frontend.grpc.upload import Upload

#: Compressed flag and length in front of every message.
PREFIX_BYTES = 5
#: Messages from this size on are received into shared memory, if they are inferences.
UPLOAD_BYTES_MIN = 64 * 1024
#: A message cannot be larger: Triton's limit, INT32_MAX (spec G-055).
MESSAGE_BYTES_MAX = 2**31 - 1

#: Bytes of a request that is no gRPC that are waited for, before it is answered.
_UNREAD_BYTES_MAX = 64 * 1024

#: What gRPC libraries say themselves.
_DEADLINE_TEXT = "Deadline Exceeded"

_READ_EITHER = 32 + zlib.MAX_WBITS
_WRITE_WBITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def message_prefix(length: int, *, is_compressed: bool = False) -> bytes:
    """Return what precedes a message of so many bytes."""
    return bytes((is_compressed,)) + length.to_bytes(4, "big")


class Call(Stream):
    """Base of all calls. Life: header -> messages -> (replies) -> status; ``on_reset`` ends it at any time."""

    __slots__ = (
        "_body_bytes",
        "_deadline",
        "_expected",
        "_is_headed",
        "_partial",
        "_upload",
        "deadline_ns",
        "frontend",
        "head",
        "reply_encoding",
    )

    def __init__(
        self, frontend: GrpcFrontend, connection: Connection[RequestHead], number: int, head: RequestHead
    ) -> None:
        super().__init__(connection, number)
        self.frontend = frontend
        self.head = head
        #: The message that has begun to arrive, its prefix included.
        self._partial: bytearray | None = None
        self._expected = PREFIX_BYTES
        self._body_bytes = 0
        #: A large message on its way into shared memory.
        self._upload: Upload | None = None
        self._is_headed = False
        self._deadline: asyncio.TimerHandle | None = None
        #: How replies are compressed.
        self.reply_encoding = "identity"
        #: Monotonic time at which the client gives up; 0: never.
        self.deadline_ns = 0
        if head.timeout_ns:
            self.deadline_ns = time.monotonic_ns() + head.timeout_ns
            self._deadline = frontend.loop.call_later(head.timeout_ns / 1e9, self._deadline_passed)
        self.opened()

    # --- what subclasses do ---

    def opened(self) -> None:
        """Finish construction; called once, before any message."""

    def take_message(self, message: memoryview) -> None:
        """A whole message, decompressed; valid during the call only."""

    def open_upload(self, message_bytes: int) -> Upload | None:
        """A large message has begun; return what receives it, or None to have it collected."""
        return None

    def take_upload(self, upload: Upload) -> None:
        """A large message is complete, and placed or refused."""

    def take_end(self) -> None:
        """The client will send no more."""

    def wind_up(self) -> None:
        """The server is stopping: a call that has no end of its own is to end now."""

    def cancelled(self) -> None:
        """Nobody waits any more: let go of everything."""

    @property
    def is_pending(self) -> bool:
        """Whether a message is incomplete, or is answered without the engine."""
        return self.is_receiving

    # --- messages in ---

    @property
    def is_receiving(self) -> bool:
        """Whether a message has begun to arrive and is not complete."""
        return self._partial is not None or self._upload is not None

    def on_data(self, chunk: memoryview, *, is_end: bool) -> None:
        if self.head.content_length >= 0 and not self._counts(len(chunk), is_end=is_end):
            return
        try:
            self._split(chunk)
        except Exception as error:
            self.fail(error)
        if is_end and not self.is_local_closed:
            if self.is_receiving:
                self.fail(RpcError(Status.INTERNAL, "the request ends within a message"))
            else:
                self.take_end()

    def _counts(self, byte_size: int, *, is_end: bool) -> bool:
        """Hold the client to the length that it gave (RFC 9113, 8.1.1); False: it lied and the call is over."""
        self._body_bytes += byte_size
        expected = self.head.content_length
        if self._body_bytes > expected or (is_end and self._body_bytes != expected):
            self.connection.abort(self, Http2Code.PROTOCOL_ERROR)
            self.on_reset()
            return False
        return True

    def _split(self, chunk: memoryview) -> None:
        position, end = 0, len(chunk)
        while position < end and not self.is_local_closed:
            upload = self._upload
            if upload is not None:
                part = chunk[position : position + upload.left]
                upload.take(part)
                position += len(part)
                self._end_upload(upload)
                continue
            partial = self._partial
            if partial is None:
                if end - position >= PREFIX_BYTES:
                    start = position + PREFIX_BYTES
                    stop = start + int.from_bytes(chunk[position + 1 : start], "big")
                    if stop <= end:
                        self._take(chunk[position], chunk[start:stop])
                        position = stop
                        continue
                partial = self._partial = bytearray()
                self._expected = PREFIX_BYTES
            position = self._collect(partial, chunk, position)

    def _collect(self, partial: bytearray, chunk: memoryview, position: int) -> int:
        """Add to the message that is not complete; return the position behind what was added."""
        while True:
            part = chunk[position : position + self._expected - len(partial)]
            self.frontend.hold(len(part))
            partial += part
            position += len(part)
            if len(partial) < self._expected:
                return position
            if self._expected == PREFIX_BYTES:
                length = int.from_bytes(partial[1:PREFIX_BYTES], "big")
                if length > MESSAGE_BYTES_MAX:
                    raise RpcError(
                        Status.RESOURCE_EXHAUSTED,
                        f"Received message larger than max ({length} vs. {MESSAGE_BYTES_MAX})",
                    )
                self._expected = PREFIX_BYTES + length
                if length >= UPLOAD_BYTES_MIN and not partial[0]:
                    self._upload = self.open_upload(length)
                    if self._upload is not None:
                        self._partial = None
                        self.frontend.release(PREFIX_BYTES)
                        return position
                if length:
                    continue
            self._partial = None
            try:
                self._take(partial[0], memoryview(partial)[PREFIX_BYTES:])
            finally:
                self.frontend.release(len(partial))
            return position

    def _end_upload(self, upload: Upload) -> None:
        """Hand a large message on if all of it is here, or if nothing more needs to come."""
        if upload.left and not upload.is_refused:
            return
        self._upload = None
        if upload.whole is None:
            self.take_upload(upload)
            return
        try:
            self.take_message(memoryview(upload.whole))
        finally:
            upload.release()

    def direct_place(self, limit: int) -> memoryview | None:
        upload = self._upload
        return None if upload is None else upload.place(limit)

    def direct_received(self, count: int) -> None:
        upload = self._upload
        assert upload is not None
        upload.received(count)
        try:
            self._end_upload(upload)
        except Exception as error:
            self.fail(error)

    def _take(self, flag: int, message: memoryview) -> None:
        if flag == 0:
            self.take_message(message)
        elif flag == 1:
            if self.head.encoding == "identity":
                raise RpcError(Status.INTERNAL, "Compressed flag set, but no grpc-encoding was specified")
            self.take_message(memoryview(self._decompress(message)))
        else:
            raise RpcError(Status.INTERNAL, f"invalid message flags {flag}")

    def _decompress(self, message: memoryview) -> bytes:
        limit = self.frontend.free_bytes
        inflater = zlib.decompressobj(_READ_EITHER)
        try:
            plain = inflater.decompress(message, limit + 1)
        except zlib.error:
            raise RpcError(Status.INTERNAL, "the message cannot be decompressed") from None
        if len(plain) > limit:
            raise RpcError(Status.RESOURCE_EXHAUSTED, f"the decompressed message is larger than {limit} bytes")
        if not inflater.eof:
            raise RpcError(Status.INTERNAL, "the message cannot be decompressed")
        return plain

    # --- replies ---

    def reply(self, pieces: Sequence[Buffer], message_bytes: int) -> None:
        """Answer a unary call; the pieces are copied before this returns."""
        self._settle()
        if self.reply_encoding != "identity":
            self.send(pieces, message_bytes)
            self.finish()
            return
        self.connection.reply(self, message_bytes + PREFIX_BYTES, (message_prefix(message_bytes), *pieces))

    def send(self, pieces: Sequence[Buffer], message_bytes: int) -> None:
        """Send one message of several; the pieces are copied before this returns."""
        if self.is_local_closed:
            return
        self.send_head()
        if self.reply_encoding == "identity":
            self.connection.send_data(self, b"".join((message_prefix(message_bytes), *pieces)))
            return
        deflater = zlib.compressobj(self.frontend.compression_level, zlib.DEFLATED, _WRITE_WBITS[self.reply_encoding])
        packed = [deflater.compress(piece) for piece in pieces]
        packed.append(deflater.flush())
        packed.insert(0, message_prefix(sum(map(len, packed)), is_compressed=True))
        self.connection.send_data(self, b"".join(packed))

    def send_head(self) -> None:
        """Send the header of a reply, unless it is out."""
        if self._is_headed:
            return
        self._is_headed = True
        fields = [(b":status", b"200"), CONTENT_TYPE]
        if self.reply_encoding != "identity":
            fields.append((b"grpc-encoding", self.reply_encoding.encode()))
        self.connection.send_head(self, encode_plain([*fields, ACCEPT_ENCODING]))

    def finish(self, status: Status = Status.OK, text: str = "") -> None:
        """End the call with a status, after what has been sent."""
        self._settle()
        if self.is_local_closed:
            return
        make = tail_block if self._is_headed else only_tail_block
        if not self._is_headed and status is Status.OK:
            # Without a reply there would be no header to tell the client what we read.
            self.send_head()
            make = tail_block
        self.connection.send_tail(self, make(status, text))

    def fail(self, error: BaseException) -> None:
        """End the call with an error; lets go of what the call holds."""
        if self.is_local_closed or self.tail is not None:
            return
        self._release()
        status, text = status_of(error)
        if status is Status.CANCELLED and self._has_expired:
            # The scheduler looks at the same deadline.
            status, text = Status.DEADLINE_EXCEEDED, _DEADLINE_TEXT
        if status is Status.INTERNAL and text == "internal error":
            self.frontend.report(error)
        self.finish(status, text)

    # --- the end ---

    @property
    def _has_expired(self) -> bool:
        return 0 < self.deadline_ns <= time.monotonic_ns()

    def _settle(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _release(self) -> None:
        partial, self._partial = self._partial, None
        if partial is not None:
            self.frontend.release(len(partial))
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.abandon()
        self.cancelled()

    def _deadline_passed(self) -> None:
        self._deadline = None
        if self.is_local_closed:
            return
        self._release()
        if self.queue or self.tail is not None:
            # What waits would come too late.
            self.connection.abort(self, Http2Code.CANCEL)
        else:
            self.finish(Status.DEADLINE_EXCEEDED, _DEADLINE_TEXT)

    def on_reset(self) -> None:
        self._settle()
        self._release()


class FailedCall(Call):
    """A call that was refused before its request was read."""

    __slots__ = ("_plain_reply",)

    def opened(self) -> None:
        #: Waits for the end of the request.
        self._plain_reply: bytes | None = None

    def answer_plainly(self, http_status: int) -> None:
        """Answer in plain HTTP when the request has come: curl takes it for an error if its rest is refused."""
        self._plain_reply = encode_plain([(b":status", b"%d" % http_status), (b"content-length", b"0")])
        if self.is_remote_closed:
            self._send_plain_reply()

    def on_data(self, chunk: memoryview, *, is_end: bool) -> None:
        self._body_bytes += len(chunk)
        if is_end or self._body_bytes > _UNREAD_BYTES_MAX:
            self._send_plain_reply()

    def _send_plain_reply(self) -> None:
        reply, self._plain_reply = self._plain_reply, None
        if reply is not None:
            self.connection.send_tail(self, reply)
