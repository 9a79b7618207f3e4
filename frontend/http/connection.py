"""One client connection: finds requests in the bytes, has them answered, writes the answers in order.

The read buffer is one scratch area of the whole process, so an idle connection costs no buffer. A request that is
complete in the scratch is handled there; the rest of a large binary body is received straight into shared memory; what
else is incomplete waits in a buffer of the connection's own, bounded by the limits on heads and JSON.

States of reading: head -> (body in ``_partial`` | chunks | straight into places) -> head. Requests that are not
inference go to an aiohttp protocol object, one at a time, and nothing behind them is looked at until it has answered.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.engine_client import OwnedSlab
from forebay.frontend.http.chunks import ChunkDecoder
from forebay.frontend.http.fast_path import InferPlan
from forebay.frontend.http.head import HEAD_BYTES_MAX, Head, HeadError, Target
from forebay.frontend.http.replies import error_reply, text_reply
from forebay.frontend.http.side_door import SideDoor
from forebay.ipc.errors import ServingError

if TYPE_CHECKING:
    from forebay.frontend.http.general_path import DirectUpload
    from forebay.frontend.http.server import HttpFrontend

#: Bytes read from a connection at a time.
SCRATCH_BYTES = 256 * 1024
#: A body that is longer than this and not yet complete is received straight into shared memory.
DIRECT_BYTES_MIN = 32 * 1024
#: Requests of one connection in flight (pipelining); beyond, the connection is not read.
PIPELINE_MAX = 128


class Call:
    """A request that has been taken and not yet answered; its place in the order of answers."""

    __slots__ = ("buffers", "connection", "keep_alive")

    def __init__(self, connection: Connection, *, keep_alive: bool) -> None:
        self.connection = connection
        self.keep_alive = keep_alive
        #: The answer, once it is known but not yet its turn.
        self.buffers: list[bytes] | None = None

    def cancel(self) -> None:
        """The client has left."""


class PlannedCall(Call):
    """A request of a known plan, waiting in slab rows."""

    __slots__ = ("plan",)

    def __init__(self, connection: Connection, plan: InferPlan, *, keep_alive: bool) -> None:
        self.connection = connection
        self.keep_alive = keep_alive
        self.buffers = None
        self.plan = plan

    @property
    def rows(self) -> int:
        return self.plan.rows

    def rows_done(self, slab: OwnedSlab, first: int) -> None:
        plan = self.plan
        view = plan.route.engine.view
        rows = plan.rows
        areas = slab.layout.outputs
        buffers: list[Buffer] = [plan.reply_head]
        for index in plan.outputs:
            offset, row_bytes = areas[index]
            start = slab.base + offset + first * row_bytes
            buffers.append(view[start : start + rows * row_bytes])
        self.connection.answer(self, buffers)

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        self.connection.answer(self, [error_reply(error, "text/plain" if ran else "application/json")])


class Connection(asyncio.BufferedProtocol):
    """The protocol object of one connection."""

    __slots__ = (
        "_calls", "_chunks", "_fd", "_frontend", "_head", "_is_closing", "_is_consuming", "_is_paused", "_is_writable", "_partial",
        "_side_door", "_skip", "_transport", "_upload", "since",
    )  # fmt: skip

    def __init__(self, frontend: HttpFrontend) -> None:
        self._frontend = frontend
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._fd = -1
        # Reading
        self._partial = bytearray()
        self._head: Head | None = None
        self._chunks: ChunkDecoder | None = None
        self._upload: DirectUpload | None = None
        self._skip = 0
        self._side_door: SideDoor | None = None
        self._is_consuming = False
        # Writing
        self._calls: deque[Call] = deque()
        self._is_closing = False
        self._is_paused = False
        self._is_writable = True
        #: When the incomplete request began, monotonic seconds; 0: none.
        self.since = 0.0

    # --- transport callbacks ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        self._fd = sock.fileno()
        self._frontend.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fd = -1
        self._is_closing = True
        if self._upload is not None:
            self._upload.abandon()
            self._upload = None
        if self._side_door is not None:
            self._side_door.connection_lost(exc)
        for call in self._calls:
            call.cancel()
        self._calls.clear()
        self._frontend.closed(self)

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        upload = self._upload
        if upload is not None:
            return upload.next_place()
        return self._frontend.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_closing:
            return
        upload = self._upload
        if upload is not None:
            if upload.received(nbytes):
                self._upload = None
                self._done_waiting()
                upload.submit(self)
            return
        if self._partial or self._head is not None:
            self._partial += self._frontend.scratch_view[:nbytes]
            self._resume()
        else:
            used = self._consume(self._frontend.scratch, nbytes)
            if used < nbytes and not self._is_closing:
                self._partial += self._frontend.scratch_view[used:nbytes]

    def eof_received(self) -> bool:
        # Half-closed: answer what has been asked, then close.
        if self._calls or (self._side_door is not None and self._side_door.is_busy):
            self._is_closing = True
            return True
        return False

    def pause_writing(self) -> None:
        self._is_writable = False
        self._update_reading()
        if self._side_door is not None:
            self._side_door.pause_writing()

    def resume_writing(self) -> None:
        self._is_writable = True
        self._update_reading()
        if self._side_door is not None:
            self._side_door.resume_writing()

    # --- reading ---

    def _resume(self) -> None:
        """Go on with what is in the connection's own buffer."""
        partial = self._partial
        used = self._consume(partial, len(partial))
        if used:
            # Not shortened in place: somebody may still hold a view into it.
            self._partial = partial[used:]

    def _consume(self, buffer: bytearray, end: int) -> int:
        """Handle every complete request in ``buffer[:end]``; return how many bytes are used up."""
        position = 0
        self._is_consuming = True
        try:
            while position < end and not self._is_closing:
                if self._must_wait():
                    break
                used = self._consume_one(buffer, position, end)
                if used == 0:
                    break
                position += used
        except HeadError as error:
            self._refuse(text_reply(error.status, error.text, close=True))
            return end
        except ServingError as error:
            self._refuse(error_reply(error, close=True))
            return end
        finally:
            self._is_consuming = False
        if self._head is None and position == end and not self._upload:
            self._done_waiting()
        elif not self.since:
            self._frontend.waiting(self)
        return position

    def _must_wait(self) -> bool:
        if len(self._calls) >= PIPELINE_MAX or (self._side_door is not None and self._side_door.is_busy):
            self._update_reading()
            return True
        return False

    def _consume_one(self, buffer: bytearray, start: int, end: int) -> int:
        """Take one request, or as much of one as can be used; return the bytes used up, 0: more are needed."""
        head = self._head
        body_start = start
        if head is None:
            # A robust server ignores empty lines before the request line (RFC 9112, 2.2).
            while start < end and buffer[start] in (13, 10):
                start += 1
            skipped = start - body_start
            found = buffer.find(b"\r\n\r\n", start, end)
            if found < 0:
                if end - start > HEAD_BYTES_MAX:
                    raise HeadError(431, f"request header is larger than {HEAD_BYTES_MAX} bytes")
                return skipped
            body_start = found + 4
            if body_start - start > HEAD_BYTES_MAX:
                raise HeadError(431, f"request header is larger than {HEAD_BYTES_MAX} bytes")
            head = self._frontend.heads.parse(bytes(memoryview(buffer)[start:body_start]))
            if head.is_plain:
                body_end = body_start + head.content_length
                if body_end <= end:
                    self._infer(head, buffer, body_start, body_end)
                    return body_end - start + skipped
            start -= skipped
            self._begin(head)
        if head.is_chunked:
            used = self._feed_chunks(head, memoryview(buffer)[body_start:end])
            return body_start - start + used
        if head.target is Target.OTHER:
            return self._pass_on(head, buffer, start, body_start, end)
        return self._take_body(head, buffer, start, body_start, end)

    def _begin(self, head: Head) -> None:
        """A request has begun whose body is not (simply) there yet."""
        self._head = head
        if head.is_chunked:
            self._chunks = ChunkDecoder(self._frontend.control_bytes_max)
        elif head.target is Target.INFER:
            self._frontend.check_length(head)
        if head.expects_continue and head.target is Target.INFER:
            self._write([b"HTTP/1.1 100 Continue\r\n\r\n"])

    def _feed_chunks(self, head: Head, data: memoryview) -> int:
        chunks = self._chunks
        assert chunks is not None
        used = chunks.feed(data)
        if chunks.is_complete:
            self._head = None
            self._chunks = None
            if head.target is Target.INFER:
                body = chunks.body
                self._infer_general(head, memoryview(body))
            else:
                self._open_side_door(head, memoryview(chunks.body))
        return used

    def _take_body(self, head: Head, buffer: bytearray, start: int, body_start: int, end: int) -> int:
        """Wait for the body of an inference request, or arrange that the rest is received into shared memory."""
        length = head.content_length
        arrived = end - body_start
        if arrived >= length:
            self._head = None
            self._infer(head, buffer, body_start, body_start + length)
            return body_start - start + length
        if head.json_bytes >= 0 and length > DIRECT_BYTES_MIN and arrived >= head.json_bytes:
            upload = self._frontend.open_upload(self, head, memoryview(buffer)[body_start:end])
            if upload is not None:
                self._head = None
                self._upload = upload
                return end - start
        # The head is remembered; only the body is kept.
        return body_start - start

    def _pass_on(self, head: Head, buffer: bytearray, start: int, body_start: int, end: int) -> int:
        if self._calls:
            # Earlier inference requests are answered first; look at this one again then.
            self._update_reading()
            return body_start - start
        length = head.content_length
        if length > self._frontend.control_bytes_max:
            raise HeadError(413, f"request body is larger than {self._frontend.control_bytes_max} bytes")
        if end - body_start < length:
            if head.expects_continue and not self._skip:
                self._skip = 1
                self._write([b"HTTP/1.1 100 Continue\r\n\r\n"])
            return body_start - start
        self._skip = 0
        self._head = None
        self._open_side_door(head, memoryview(buffer)[body_start : body_start + length])
        return body_start - start + length

    def _open_side_door(self, head: Head, body: memoryview) -> None:
        if self._side_door is None:
            self._side_door = SideDoor(self, self._frontend.make_control_connection, self._transport)
        self._side_door.request(head, body)

    def side_door_done(self, *, keep_alive: bool) -> None:
        """aiohttp has answered: go on with what the client has sent since."""
        if not keep_alive:
            self._is_closing = True
            self._transport.close()
            return
        self._go_on()

    # --- inference ---

    def _infer(self, head: Head, buffer: bytearray, start: int, end: int) -> None:
        json_bytes = head.json_bytes
        view = memoryview(buffer)
        if json_bytes < 0:
            self._infer_general(head, view[start:end])
            return
        json_end = start + json_bytes
        plan = head.plans.get(bytes(view[start:json_end]))
        if plan is None:
            self._infer_general(head, view[start:end])
            return
        assert isinstance(plan, InferPlan)
        route = plan.route
        rows = plan.rows
        call = PlannedCall(self, plan, keep_alive=head.keep_alive)
        try:
            slab, first = route.loan(rows)
        except ServingError as error:
            self._calls.append(call)
            self.answer(call, [error_reply(error)])
            return
        memory = route.engine.view
        areas = slab.layout.inputs
        for source, source_end, index in plan.copies:
            offset, row_bytes = areas[index]
            target = slab.base + offset + first * row_bytes
            memory[target : target + source_end - source] = view[start + source : start + source_end]
        route.copied_in_bytes += plan.copied_bytes
        self._calls.append(call)
        route.publish(slab, first, rows, call, plan.priority, plan.timeout_us)

    def _infer_general(self, head: Head, body: memoryview) -> None:
        call = self._frontend.new_call(self, head)
        self._calls.append(call)
        call.start(body)

    def add_call(self, call: Call) -> None:
        """Give a request its place in the order of answers."""
        self._calls.append(call)

    # --- writing ---

    def answer(self, call: Call, buffers: Sequence[Buffer]) -> None:
        """Send a complete reply when it is its turn. The buffers may be reused when this returns."""
        calls = self._calls
        if not calls:
            return  # The client has left.
        if calls[0] is not call:
            call.buffers = [bytes(buffer) for buffer in buffers]
            self._frontend.copied_out(sum(map(len, buffers)))
            return
        calls.popleft()
        self._write(buffers)
        if not call.keep_alive:
            self._close_after_writing()
            return
        while calls and calls[0].buffers is not None:
            ready = calls.popleft()
            self._write(cast(list[bytes], ready.buffers))
            if not ready.keep_alive:
                self._close_after_writing()
                return
        if self._is_closing and not calls:
            self._transport.close()
        elif self._is_paused or self._partial:
            self._go_on()

    def _go_on(self) -> None:
        if self._is_consuming:
            return  # An answer was known at once; the loop that asked for it goes on by itself.
        self._update_reading()
        if self._partial and not self._is_closing:
            self._resume()

    def _write(self, buffers: Sequence[Buffer]) -> None:
        if self._fd < 0:
            return
        transport = self._transport
        sent = 0
        if transport.get_write_buffer_size() == 0:
            # Nothing waits in the transport, so the system call may be made here: no copy, no turn of the loop.
            try:
                sent = os.writev(self._fd, buffers)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._is_closing = True
                transport.abort()
                return
        total = sum(map(len, buffers))
        if sent == total:
            return
        rest = bytearray()
        for buffer in buffers:
            size = len(buffer)
            if sent >= size:
                sent -= size
                continue
            rest += memoryview(buffer)[sent:]
            sent = 0
        self._frontend.copied_out(len(rest))
        transport.write(rest)

    def _refuse(self, reply: bytes) -> None:
        """Answer something that is not a request, after what has been asked before, and close."""
        self._head = None
        self._chunks = None
        call = Call(self, keep_alive=False)
        self._calls.append(call)
        self.answer(call, [reply])

    def _close_after_writing(self) -> None:
        self._is_closing = True
        for call in self._calls:
            call.cancel()
        self._calls.clear()
        self._transport.close()

    # --- flow ---

    def _update_reading(self) -> None:
        """Read only while there is somewhere to put a further request, and while the client takes its answers."""
        busy = (
            not self._is_writable
            or len(self._calls) >= PIPELINE_MAX
            or (self._side_door is not None and self._side_door.is_busy)
            or (self._head is not None and self._head.target is Target.OTHER and bool(self._calls))
        )
        if busy != self._is_paused and self._fd >= 0 and not self._transport.is_closing():
            self._is_paused = busy
            if busy:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _done_waiting(self) -> None:
        if self.since:
            self._frontend.no_longer_waiting(self)

    def time_out(self) -> None:
        """The client took too long to send a request."""
        if self._upload is not None:
            self._upload.abandon()
            self._upload = None
        self._refuse(text_reply(408, "the request did not arrive in time", close=True))

    def drain(self) -> None:
        """The server stops: close now if nothing is asked, else after the last answer."""
        if not self._calls and not (self._side_door is not None and self._side_door.is_busy):
            self._transport.close()
        else:
            self._is_closing = True

    def abort(self) -> None:
        self._transport.abort()
