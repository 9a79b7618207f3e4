"""The writing half of an HTTP/2 connection: replies, as far as the client's windows allow, and the ends of streams.

Replies are written at once if they may be, else they wait with their stream and go out frame by frame, streams in turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from forebay.frontend.grpc.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_DEFAULT,
    HEADERS,
    MAX_31_BITS,
    PING,
    WINDOW_DEFAULT,
    Http2Code,
    frame,
    goaway,
    pack_header,
    reset,
)
from forebay.frontend.grpc.http2.hpack_encoder import ReplyEncoder
from forebay.frontend.grpc.http2.stream import Application, Buffer, Stream

#: Streams of one connection open at a time.
STREAMS_MAX = 2048
#: Reply bytes of one connection that wait for the client to read; beyond, new calls are refused.
QUEUED_BYTES_MAX = 64 * 1024 * 1024
#: The same, beyond which replies to calls that were taken before are given up.
QUEUED_BYTES_LIMIT = 512 * 1024 * 1024
#: Bytes of acknowledgements that wait for the client to read, at most.
_UNREAD_CONTROL_BYTES_MAX = 256 * 1024
#: Streams that we reset are remembered, because frames for them may be on their way.
_RESET_STREAMS_MAX = 2 * STREAMS_MAX

Head = TypeVar("Head")


class SendingSide(Generic[Head]):
    """What a connection writes, and the streams that it knows."""

    def __init__(self, application: Application[Head], write: Callable[[bytes], None], encoder: ReplyEncoder) -> None:
        """Write nothing yet.

        Args:
            write: takes bytes for the client, in order; never blocks.
        """
        self._application = application
        self._write = write
        self._encoder = encoder
        # Streams
        self.streams: dict[int, Stream] = {}
        self.last_stream = 0
        self._reset_streams: OrderedDict[int, None] = OrderedDict()
        # Writing
        self.initial_send_window = WINDOW_DEFAULT
        self._send_window = WINDOW_DEFAULT
        self._frame_bytes = FRAME_BYTES_DEFAULT
        self._block_prefix = b""
        self._blocked: OrderedDict[int, Stream] = OrderedDict()
        self.queued_bytes = 0
        self._unread_control_bytes = 0
        self.is_writable = True
        #: No further streams are taken; set with the GOAWAY that says so.
        self.is_draining = False
        #: Nothing more is read or written.
        self.is_closed = False
        #: Frames of replies, and window updates, written so far: what makes a client's pings harmless (grpc-core).
        self.frames_written = 0

    # --- ends of streams ---

    def add(self, stream: Stream) -> None:
        """Know a new stream; called by whoever made it, before anything is written on it."""
        self.streams[stream.id] = stream

    def abort(self, stream: Stream, code: Http2Code) -> None:
        """End a stream at once, without trailers."""
        if stream.id in self.streams:
            self._remember_reset(stream.id)
            self._write_control(reset(stream.id, code))
            self._end(stream)

    def _remember_reset(self, number: int) -> None:
        self._reset_streams[number] = None
        if len(self._reset_streams) > _RESET_STREAMS_MAX:
            self._reset_streams.popitem(last=False)

    def _end(self, stream: Stream) -> None:
        stream.is_remote_closed = stream.is_local_closed = True
        self.queued_bytes -= stream.queued_bytes
        stream.queued_bytes = 0
        stream.queue.clear()
        stream.tail = None
        self._blocked.pop(stream.id, None)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self.streams.pop(stream.id, None)
        if not self.streams:
            self._application.on_idle()

    def _written(self, stream: Stream) -> None:
        """The trailers are out."""
        stream.is_local_closed = True
        if stream.is_remote_closed:
            self._forget(stream)
        else:
            # The client need not send the rest of its request (RFC 9113, 8.1).
            self._remember_reset(stream.id)
            self._write_control(reset(stream.id, Http2Code.NO_ERROR))
            stream.is_remote_closed = True
            self._forget(stream)

    # --- writing ---

    def _write_control(self, data: bytes) -> None:
        if self.is_closed:
            return
        if not self.is_writable:
            self._unread_control_bytes += len(data)
            if self._unread_control_bytes > _UNREAD_CONTROL_BYTES_MAX:
                self.close(Http2Code.ENHANCE_YOUR_CALM, "the client does not read")
                return
        self._write(data)

    def _block_frame(self, number: int, block: bytes, flags: int) -> bytes:
        if self._block_prefix:
            block = self._block_prefix + block
            self._block_prefix = b""
        if len(block) <= self._frame_bytes:
            return frame(HEADERS, flags | END_HEADERS, number, block)
        size = self._frame_bytes
        parts = [frame(HEADERS, flags, number, block[:size])]
        for start in range(size, len(block), size):
            is_last = start + size >= len(block)
            parts.append(frame(CONTINUATION, END_HEADERS if is_last else 0, number, block[start : start + size]))
        return b"".join(parts)

    def reply(self, stream: Stream, message_bytes: int, pieces: Sequence[Buffer]) -> None:
        """Answer with a good header, one message and good trailers; the pieces are copied.

        Args:
            message_bytes: sum of the pieces' lengths.
        """
        if stream.is_local_closed:
            return
        self.frames_written += 1
        if (
            message_bytes <= stream.send_window
            and message_bytes <= self._send_window
            and message_bytes <= self._frame_bytes
            and self.is_writable
            and not self._block_prefix
            and stream.is_remote_closed
            and not stream.queue
        ):
            self._send_window -= message_bytes
            number = stream.id
            stream.is_local_closed = True
            # Before it is written: whoever writes sees whether other replies may follow.
            del self.streams[number]
            head, tail = self._encoder.next_pair()
            self._write(
                b"".join(
                    (
                        pack_header(0, len(head), HEADERS, END_HEADERS, number),
                        head,
                        pack_header(message_bytes >> 8, message_bytes & 0xFF, DATA, 0, number),
                        *pieces,
                        pack_header(0, len(tail), HEADERS, END_HEADERS | END_STREAM, number),
                        tail,
                    )
                )
            )
            if not self.streams:
                self._application.on_idle()
            return
        self.send_head(stream, self._encoder.plain_head)
        self.send_data(stream, b"".join(pieces))
        self.send_tail(stream, self._encoder.plain_tail)

    def send_head(self, stream: Stream, block: bytes) -> None:
        """Send a header block; it must not refer to the client's table."""
        if stream.is_local_closed:
            return
        if self.is_writable and not stream.queue:
            self._write(self._block_frame(stream.id, block, 0))
        else:
            stream.queue.append(block)
            stream.queued_bytes += len(block)
            self.queued_bytes += len(block)
            self._blocked[stream.id] = stream

    def send_data(self, stream: Stream, data: bytes) -> None:
        """Send payload, now or as the client's windows allow; ``data`` is kept until then."""
        if stream.is_local_closed or not data:
            return
        if self.queued_bytes and self.queued_bytes + len(data) > QUEUED_BYTES_LIMIT:
            self.abort(stream, Http2Code.ENHANCE_YOUR_CALM)
            stream.on_reset()
            return
        stream.queue.append(memoryview(data))
        stream.queued_bytes += len(data)
        self.queued_bytes += len(data)
        self._blocked[stream.id] = stream
        self._flush_stream(stream)

    def send_tail(self, stream: Stream, block: bytes) -> None:
        """Send trailers after everything else, which ends the stream; the block must not refer to the table."""
        if stream.is_local_closed or stream.tail is not None:
            return
        stream.tail = block
        if stream.queue:
            return
        if not self.is_writable:
            self._blocked[stream.id] = stream
            return
        self._write_tail(stream)

    def _write_tail(self, stream: Stream) -> None:
        tail, stream.tail = stream.tail, None
        assert tail is not None
        self._blocked.pop(stream.id, None)
        self.frames_written += 1
        self._write(self._block_frame(stream.id, tail, END_STREAM))
        self._written(stream)

    def _flush_stream(self, stream: Stream) -> None:
        """Write as much of one stream as windows allow."""
        while self.is_writable and not self.is_closed and self._write_one(stream):
            pass

    def _flush(self) -> None:
        """Write what windows allow, streams in turn."""
        stuck: set[int] = set()
        while self._blocked and self.is_writable and not self.is_closed:
            number, stream = next(iter(self._blocked.items()))
            if number in stuck:
                return
            if not self._write_one(stream):
                if self._send_window <= 0:
                    return
                stuck.add(number)
            if number in self._blocked:
                self._blocked.move_to_end(number)

    def _write_one(self, stream: Stream) -> bool:
        """Write the next frame that waits on a stream; whether there may be another."""
        queue = stream.queue
        if not queue:
            if stream.tail is not None:
                self._write_tail(stream)
            else:
                self._blocked.pop(stream.id, None)
            return False
        item = queue[0]
        if isinstance(item, bytes):
            queue.popleft()
            size = len(item)
            self._write(self._block_frame(stream.id, item, 0))
        else:
            size = min(len(item), stream.send_window, self._send_window, self._frame_bytes)
            if size <= 0:
                if stream.send_window <= 0:
                    # Comes back with a WINDOW_UPDATE of its own; looking at it for others' would cost.
                    self._blocked.pop(stream.id, None)
                return False
            if size == len(item):
                queue.popleft()
            else:
                queue[0] = item[size:]
            stream.send_window -= size
            self._send_window -= size
            self._write(pack_header(size >> 8, size & 0xFF, DATA, 0, stream.id) + item[:size])
        self.frames_written += 1
        stream.queued_bytes -= size
        self.queued_bytes -= size
        if not queue:
            if stream.tail is not None:
                self._write_tail(stream)
                return False
            self._blocked.pop(stream.id, None)
            stream.on_drained()
            return False
        return True

    def pause_writing(self) -> None:
        """The client does not read: keep replies with their streams."""
        self.is_writable = False

    def resume_writing(self) -> None:
        """The client reads again."""
        self.is_writable = True
        self._unread_control_bytes = 0
        self._flush()

    def ping(self) -> None:
        """Ask the client whether it is there."""
        self._write_control(frame(PING, 0, 0, b"forebay!"))

    # --- the end ---

    def drain(self, *, refuse: bool) -> None:
        """Tell the client to open no more streams here.

        Args:
            refuse: also refuse those that it opens before it knows; else they are still taken.
        """
        if self.is_closed:
            return
        self._write(goaway(self.last_stream if refuse else MAX_31_BITS, Http2Code.NO_ERROR))
        if refuse:
            self.is_draining = True

    def close(self, code: Http2Code, text: str = "") -> None:
        """Say why and stop; open streams are told."""
        if self.is_closed:
            return
        self._write(goaway(self.last_stream, code, text))
        self.lost()
        self._application.on_closed()

    def lost(self) -> None:
        """The connection is gone: every open stream ends."""
        self.is_closed = True
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        self.queued_bytes = 0
        for stream in streams:
            stream.is_remote_closed = stream.is_local_closed = True
            stream.queue.clear()
            stream.on_reset()
