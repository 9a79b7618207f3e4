"""One HTTP/2 connection, server side: bytes in, calls on streams, bytes out. No I/O and no clock of its own.

Frames are parsed where they lie in the receive buffer; the payload of a DATA frame is handed on in the pieces in which
it arrives, so nothing but an incomplete control frame is ever kept here. The writing half is in ``sending``.

What a client may cost is bounded: header blocks (bytes, fields, CONTINUATION frames), streams, queued reply bytes,
control replies that it does not read, and the rate of resets and of frames that only make work.
"""

from __future__ import annotations

from collections.abc import Callable

from forebay.frontend.grpc.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_DEFAULT,
    FRAME_BYTES_LIMIT,
    FRAME_HEADER_BYTES,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    MAX_31_BITS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    UINT32,
    WINDOW_DEFAULT,
    WINDOW_UPDATE,
    Http2Code,
    Http2Error,
    Setting,
    frame,
    reset,
    settings_frame,
    unpack_header,
    window_update,
)
from forebay.frontend.grpc.http2.hpack_decoder import LIST_BYTES_MAX, HpackDecoder
from forebay.frontend.grpc.http2.hpack_encoder import ReplyEncoder
from forebay.frontend.grpc.http2.rate import Allowance
from forebay.frontend.grpc.http2.sending import QUEUED_BYTES_MAX, STREAMS_MAX, Head, SendingSide
from forebay.frontend.grpc.http2.stream import STREAM_WINDOW, Application, Stream

#: What we allow a client to send on the connection before we say that it was taken.
CONNECTION_WINDOW = 16 * 1024 * 1024
#: Payload of one DATA frame that we take; a large message is then a few frames, not thousands.
FRAME_BYTES_MAX = 1024 * 1024
#: Payload of one frame of another kind that we take.
_CONTROL_BYTES_MAX = 32 * 1024
#: Encoded bytes of one header block.
_BLOCK_BYTES_MAX = LIST_BYTES_MAX
#: CONTINUATION frames of one header block.
_CONTINUATIONS_MAX = 16
#: Settings in one frame.
_SETTINGS_MAX = 64
#: Resets that a client may cause: at once, per second.
RESET_RATE = (1000, 100)
#: Frames without use that a client may send: at once, per second.
IDLE_FRAME_RATE = (10_000, 1000)


class Connection(SendingSide[Head]):
    """The protocol state of one connection."""

    def __init__(
        self,
        application: Application[Head],
        write: Callable[[bytes], None],
        decoder: HpackDecoder[Head],
        encoder: ReplyEncoder,
        now_s: Callable[[], float],
    ) -> None:
        """Say hello.

        Args:
            write: takes bytes for the client, in order; never blocks.
            now_s: monotonic seconds.
        """
        super().__init__(application, write, encoder)
        self._decoder = decoder
        # Reading
        self._partial = b""
        self.is_greeted = False
        self._has_settings = False
        self._data_stream: Stream | None = None
        self._data_left = 0
        self._padding_left = 0
        self._data_ends = False
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_ends = False
        self._continuations = 0
        self._receive_window = CONNECTION_WINDOW
        self._taken_bytes = 0
        # Limits
        self._resets = Allowance(*RESET_RATE, now_s)
        self._idle_frames = Allowance(*IDLE_FRAME_RATE, now_s)
        write(
            settings_frame(
                {
                    Setting.MAX_CONCURRENT_STREAMS: STREAMS_MAX,
                    Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                    Setting.MAX_FRAME_SIZE: FRAME_BYTES_MAX,
                    Setting.MAX_HEADER_LIST_SIZE: LIST_BYTES_MAX,
                }
            )
            + window_update(0, CONNECTION_WINDOW - WINDOW_DEFAULT)
        )

    # --- reading ---

    def receive(self, view: memoryview) -> None:
        """Take bytes from the client; the view is not kept.

        After a broken rule a GOAWAY has been written and ``is_closed`` is set: the caller closes the connection.
        """
        if self.is_closed:
            return
        if self._partial:
            view = memoryview(self._partial + view)
            self._partial = b""
        try:
            used = self._consume(view, len(view))
        except Http2Error as error:
            self.close(error.code, error.text)
            return
        if used < len(view) and not self.is_closed:
            self._partial = bytes(view[used:])

    def _consume(self, view: memoryview, end: int) -> int:
        position = 0
        if not self.is_greeted:
            position = self._take_preface(view)
            if not self.is_greeted:
                return position
        while position < end and not self.is_closed:
            if self._data_left or self._padding_left:
                position += self._take_data(view, position, end)
                continue
            if end - position < FRAME_HEADER_BYTES:
                break
            high, low, kind, flags, number = unpack_header(view, position)
            length = high << 8 | low
            number &= MAX_31_BITS
            if kind == DATA and self._block is None:
                if not (flags & PADDED and length and end - position == FRAME_HEADER_BYTES):
                    position += FRAME_HEADER_BYTES
                    position += self._begin_data(view, position, length, flags, number)
                    continue
                break
            self._check_size(kind, length)
            body = position + FRAME_HEADER_BYTES
            if end - body < length:
                break
            position = body + length
            self._take_frame(kind, flags, number, view[body:position])
        return position

    def _take_preface(self, view: memoryview) -> int:
        start = bytes(view[: len(PREFACE)])
        if not PREFACE.startswith(start):
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "the client does not speak HTTP/2")
        if len(start) < len(PREFACE):
            return 0
        self.is_greeted = True
        return len(PREFACE)

    def _check_size(self, kind: int, length: int) -> None:
        if length > FRAME_BYTES_MAX:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes was not allowed")
        if length > _CONTROL_BYTES_MAX:
            raise Http2Error(Http2Code.ENHANCE_YOUR_CALM, f"a frame of type {kind} with {length} bytes is too large")

    def _take_frame(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if self._block is not None and (kind != CONTINUATION or number != self._block_stream):
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "a header block was interrupted")
        if not self._has_settings:
            if kind != SETTINGS or flags & ACK:
                raise Http2Error(Http2Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            self._has_settings = True
        if kind == HEADERS:
            self._headers(flags, number, payload)
        elif kind == WINDOW_UPDATE:
            self._window_updated(number, payload)
        elif kind == RST_STREAM:
            self._reset(number, payload)
        elif kind == PING:
            self._ping(flags, number, payload)
        elif kind == SETTINGS:
            self._settings(flags, number, payload)
        elif kind == CONTINUATION:
            self._continuation(flags, number, payload)
        elif kind == PRIORITY:
            self._priority(number, payload)
        elif kind == GOAWAY:
            self._goaway(number, payload)
        elif kind == PUSH_PROMISE:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "a client cannot push")
        else:
            # Unknown types are ignored (RFC 9113, 4.1).
            self._idle_frame()

    # --- DATA ---

    def _begin_data(self, view: memoryview, position: int, length: int, flags: int, number: int) -> int:
        """Take the header of a DATA frame, and the length of its padding; return how many payload bytes that took."""
        if not self._has_settings:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        if length > FRAME_BYTES_MAX:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes was not allowed")
        if number == 0:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "DATA needs a stream")
        padding = used = 0
        if flags & PADDED:
            if length == 0:
                raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "a padded frame without a length of the padding")
            padding, used = view[position], 1
            if padding >= length:
                raise Http2Error(Http2Code.PROTOCOL_ERROR, "more padding than there is payload")
        self._receive_window -= length
        if self._receive_window < 0:
            raise Http2Error(Http2Code.FLOW_CONTROL_ERROR, "more was sent than the connection's window allows")
        stream = self.streams.get(number)
        if stream is not None and stream.is_remote_closed:
            self._stream_error(stream, Http2Code.STREAM_CLOSED)
            stream = None
        elif stream is None:
            if number > self.last_stream or not number & 1:
                raise Http2Error(Http2Code.PROTOCOL_ERROR, "DATA on a stream that was not opened")
            if number not in self._reset_streams:
                raise Http2Error(Http2Code.STREAM_CLOSED, "DATA on a stream that has ended")
        else:
            stream.receive_window -= length
            if stream.receive_window < 0:
                self._stream_error(stream, Http2Code.FLOW_CONTROL_ERROR)
                stream = None
        self._data_left = length - padding - used
        self._padding_left = padding
        self._data_stream = stream
        self._data_ends = bool(flags & END_STREAM)
        self._taken_bytes += length
        if stream is not None:
            stream.taken_bytes += length
        if self._data_left == 0:
            if not self._data_ends:
                self._idle_frame()
            if padding == 0:
                self._end_data(memoryview(b""))
        return used

    def _take_data(self, view: memoryview, position: int, end: int) -> int:
        """Take payload or padding of the current DATA frame; return the bytes taken."""
        available = end - position
        left = self._data_left
        if left == 0:
            taken = min(self._padding_left, available)
            self._padding_left -= taken
            if self._padding_left == 0:
                self._end_data(memoryview(b""))
            return taken
        if available < left:
            self._data_left = left - available
            self._deliver(view[position:end])
            return available
        self._data_left = 0
        chunk = view[position : position + left]
        if self._padding_left:
            self._deliver(chunk)
        else:
            self._end_data(chunk)
        return left

    def direct_place(self) -> memoryview | None:
        """Return where the transport shall put what it receives next; None: anywhere.

        Answer with :meth:`received_direct` if it is used.
        """
        stream = self._data_stream
        if stream is None or not self._data_left or stream.is_local_closed:
            return None
        return stream.direct_place(self._data_left)

    def received_direct(self, count: int) -> None:
        """``count`` bytes lie where :meth:`direct_place` said."""
        stream = self._data_stream
        assert stream is not None
        self._data_left -= count
        stream.direct_received(count)
        if not self._data_left and not self._padding_left:
            self._end_data(memoryview(b""))

    def _deliver(self, chunk: memoryview) -> None:
        stream = self._data_stream
        if stream is not None and not stream.is_local_closed:
            stream.on_data(chunk, is_end=False)

    def _end_data(self, chunk: memoryview) -> None:
        """The last piece of a DATA frame is here: deliver it and give the window back."""
        stream, self._data_stream = self._data_stream, None
        if stream is not None and not stream.is_local_closed:
            is_end = self._data_ends
            if is_end:
                stream.is_remote_closed = True
            stream.on_data(chunk, is_end=is_end)
            if is_end:
                if stream.is_local_closed:
                    self._forget(stream)
            elif not stream.is_local_closed:
                self.replenish(stream)
        if self._taken_bytes >= CONNECTION_WINDOW // 2 and not self.is_closed:
            self._write(window_update(0, self._taken_bytes))
            self.frames_written += 1
            self._receive_window += self._taken_bytes
            self._taken_bytes = 0

    def replenish(self, stream: Stream) -> None:
        """Let the client send on when half of its window is used, unless the stream holds it back."""
        if stream.taken_bytes < STREAM_WINDOW // 2 or stream.holds_back:
            return
        if not stream.is_remote_closed and not self.is_closed:
            self._write_control(window_update(stream.id, stream.taken_bytes))
            self.frames_written += 1
            stream.receive_window += stream.taken_bytes
            stream.taken_bytes = 0

    # --- headers ---

    def _headers(self, flags: int, number: int, payload: memoryview) -> None:
        start, end = 0, len(payload)
        if number == 0 or not number & 1:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, f"a client cannot open stream {number}")
        if flags & PADDED:
            if end == 0:
                raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "a padded frame without a length of the padding")
            start, end = 1, end - payload[0]
        if flags & HAS_PRIORITY:
            if end - start < 5:
                raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            if UINT32.unpack_from(payload, start)[0] & MAX_31_BITS == number:
                self._idle_frame()
            start += 5
        if start > end:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "more padding than there is payload")
        is_end = bool(flags & END_STREAM)
        if flags & END_HEADERS:
            self._block_complete(number, bytes(payload[start:end]), is_end=is_end)
            return
        self._block = bytearray(payload[start:end])
        self._block_stream = number
        self._block_ends = is_end
        self._continuations = 0

    def _continuation(self, flags: int, number: int, payload: memoryview) -> None:
        block = self._block
        if block is None:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._continuations += 1
        block += payload
        if self._continuations > _CONTINUATIONS_MAX or len(block) > _BLOCK_BYTES_MAX:
            raise Http2Error(Http2Code.ENHANCE_YOUR_CALM, "the header is too large")
        if flags & END_HEADERS:
            self._block = None
            self._block_complete(number, bytes(block), is_end=self._block_ends)

    def _block_complete(self, number: int, block: bytes, *, is_end: bool) -> None:
        # Every block is decoded, wanted or not: it may change the table.
        head = self._decoder.decode(block)
        if number <= self.last_stream:
            self._late_headers(number, head, is_end=is_end)
            return
        self.last_stream = number
        if self.is_draining:
            self._remember_reset(number)
            self._write_control(reset(number, Http2Code.REFUSED_STREAM))
            return
        if len(self.streams) >= STREAMS_MAX or self.queued_bytes > QUEUED_BYTES_MAX:
            too_many = len(self.streams) >= STREAMS_MAX
            self._count_reset()
            self._remember_reset(number)
            code = Http2Code.REFUSED_STREAM if too_many else Http2Code.ENHANCE_YOUR_CALM
            self._write_control(reset(number, code))
            return
        stream = self._application.open_stream(number, head, is_end=is_end)
        if stream.is_local_closed and (is_end or stream.is_remote_closed):
            return
        if is_end:
            stream.is_remote_closed = True

    def _late_headers(self, number: int, head: Head, *, is_end: bool) -> None:
        """Trailers of a request, or headers where none may be."""
        stream = self.streams.get(number)
        if stream is None:
            if number in self._reset_streams:
                return
            raise Http2Error(Http2Code.STREAM_CLOSED, "HEADERS on a stream that has ended")
        if stream.is_remote_closed:
            self._stream_error(stream, Http2Code.STREAM_CLOSED)
        elif not is_end or not self._application.are_trailers(head):
            self._stream_error(stream, Http2Code.PROTOCOL_ERROR)
        else:
            stream.is_remote_closed = True
            stream.on_data(memoryview(b""), is_end=True)
            if stream.is_local_closed:
                self._forget(stream)

    # --- other frames ---

    def _window_updated(self, number: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong size")
        increment = UINT32.unpack_from(payload)[0] & MAX_31_BITS
        if number == 0:
            if increment == 0:
                raise Http2Error(Http2Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            self._send_window += increment
            if self._send_window > MAX_31_BITS:
                raise Http2Error(Http2Code.FLOW_CONTROL_ERROR, "the window is too large")
            if not self._blocked:
                self._idle_frame(0.1)
            self._flush()
            return
        stream = self.streams.get(number)
        if stream is None:
            self._check_known(number, "WINDOW_UPDATE")
            self._idle_frame()
            return
        if increment == 0:
            self._stream_error(stream, Http2Code.PROTOCOL_ERROR)
            return
        stream.send_window += increment
        if stream.send_window > MAX_31_BITS:
            self._stream_error(stream, Http2Code.FLOW_CONTROL_ERROR)
            return
        if stream.queue:
            self._blocked[number] = stream
            self._flush_stream(stream)
        else:
            self._idle_frame(0.1)

    def _check_known(self, number: int, kind: str) -> None:
        if number > self.last_stream or not number & 1:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, f"{kind} on a stream that was not opened")

    def _reset(self, number: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "RST_STREAM of a wrong size")
        if number == 0:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "RST_STREAM needs a stream")
        stream = self.streams.get(number)
        if stream is None:
            self._check_known(number, "RST_STREAM")
            self._idle_frame()
            return
        self._count_reset()
        self._end(stream)
        stream.on_reset()

    def _count_reset(self) -> None:
        if not self._resets.take():
            raise Http2Error(Http2Code.ENHANCE_YOUR_CALM, "too many streams were reset")

    def _idle_frame(self, cost: float = 1.0) -> None:
        if not self._idle_frames.take(cost):
            raise Http2Error(Http2Code.ENHANCE_YOUR_CALM, "too many frames without use")

    def _ping(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) != 8:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "PING of a wrong size")
        if number:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "PING belongs to no stream")
        if flags & ACK:
            self._application.on_pong()
            return
        self._idle_frame()
        self._write_control(frame(PING, ACK, 0, bytes(payload)))
        self._application.on_ping()

    def _settings(self, flags: int, number: int, payload: memoryview) -> None:
        if number:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "SETTINGS belong to no stream")
        if flags & ACK:
            if len(payload):
                raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "an acknowledgement holds no settings")
            return
        if len(payload) % SETTING.size:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        if len(payload) > _SETTINGS_MAX * SETTING.size:
            raise Http2Error(Http2Code.ENHANCE_YOUR_CALM, "too many settings")
        self._idle_frame()
        for name, value in SETTING.iter_unpack(payload):
            self._set(name, value)
        self._write_control(frame(SETTINGS, ACK, 0))
        self._flush()

    def _set(self, name: int, value: int) -> None:
        if name == Setting.INITIAL_WINDOW_SIZE:
            if value > MAX_31_BITS:
                raise Http2Error(Http2Code.FLOW_CONTROL_ERROR, "the initial window is too large")
            change = value - self.initial_send_window
            self.initial_send_window = value
            self._idle_frame(len(self.streams) / 64)
            for stream in self.streams.values():
                stream.send_window += change
                if stream.queue:
                    self._blocked[stream.id] = stream
                if stream.send_window > MAX_31_BITS:
                    raise Http2Error(Http2Code.FLOW_CONTROL_ERROR, "a window is too large")
        elif name == Setting.MAX_FRAME_SIZE:
            if not FRAME_BYTES_DEFAULT <= value <= FRAME_BYTES_LIMIT:
                raise Http2Error(Http2Code.PROTOCOL_ERROR, "a maximum frame size that cannot be")
            self._frame_bytes = value
        elif name == Setting.HEADER_TABLE_SIZE:
            self._block_prefix += self._encoder.use_table_of(value)
        elif name == Setting.ENABLE_PUSH and value > 1:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")

    def _priority(self, number: int, payload: memoryview) -> None:
        if number == 0:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "PRIORITY needs a stream")
        if len(payload) != 5:
            stream = self.streams.get(number)
            if stream is None:
                raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "PRIORITY of a wrong size")
            self._stream_error(stream, Http2Code.FRAME_SIZE_ERROR)
        elif UINT32.unpack_from(payload)[0] & MAX_31_BITS == number:
            stream = self.streams.get(number)
            if stream is None:
                raise Http2Error(Http2Code.PROTOCOL_ERROR, "a stream cannot depend on itself")
            self._stream_error(stream, Http2Code.PROTOCOL_ERROR)
        self._idle_frame()

    def _goaway(self, number: int, payload: memoryview) -> None:
        if number:
            raise Http2Error(Http2Code.PROTOCOL_ERROR, "GOAWAY belongs to no stream")
        if len(payload) < 8:
            raise Http2Error(Http2Code.FRAME_SIZE_ERROR, "GOAWAY of a wrong size")
        # The client will open nothing more; what is open is still answered.
        self.is_draining = True
        if not self.streams:
            self._application.on_idle()

    def _stream_error(self, stream: Stream, code: Http2Code) -> None:
        """The client broke a rule that concerns one stream only."""
        self._count_reset()
        self.abort(stream, code)
        stream.on_reset()
