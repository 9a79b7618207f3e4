"""One client connection: finds requests in the bytes, has them answered, writes the answers in order.

The read buffer is one scratch area of the whole process, so an idle connection costs no buffer. A request that is
complete in the scratch is handled there; the rest of a large binary body is received straight into shared memory; what
else is incomplete waits in a buffer of the connection's own, bounded by the limits on heads and JSON.

States of reading: head -> (body in ``_partial`` | chunks | straight into places) -> head. Requests that are not
inference go to an aiohttp protocol object, one at a time: only when everything before them has been answered, and
nothing behind them is looked at until they have been.

States of the end: open -> half closed (the client has finished sending: what it asked is answered for a short while)
-> lingering (we have said our last word about bytes that we do not read) -> closed.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.http.call import Call, PlannedCall
from forebay.frontend.http.chunks import ChunkDecoder
from forebay.frontend.http.fast_path import InferPlan
from forebay.frontend.http.head import HEAD_BYTES_MAX, TOO_LARGE, Head, HeadError, Target, check_beginning
from forebay.frontend.http.open_sequences import OpenSequences
from forebay.frontend.http.replies import CLOSE_LINE, error_reply, text_reply, with_close_line
from forebay.frontend.http.side_door import SideDoor
from forebay.ipc.errors import ServingError

if TYPE_CHECKING:
    from forebay.frontend.data_plane.route_client import RouteClient
    from forebay.frontend.http.direct_upload import DirectUpload
    from forebay.frontend.http.planned_upload import PlannedUpload
    from forebay.frontend.http.server import HttpFrontend

#: Bytes read from a connection at a time.
SCRATCH_BYTES = 256 * 1024
#: A body that is longer than this and not yet complete is received straight into shared memory.
DIRECT_BYTES_MIN = 32 * 1024
#: Bytes read at a time where a large body is likely to follow: a head and its JSON, and little of the tensors, which
#: would have to be copied from the scratch.
UPLOAD_HEAD_BYTES = 4 * 1024
#: Requests of one connection in flight (pipelining); beyond, the connection is not read.
PIPELINE_MAX = 128
#: Seconds in which what is in flight may still be answered after the client has finished sending. Most who do that have
#: left, and what nobody waits for must not run (spec H-016); but ``printf ... | nc`` gets its answer.
HALF_CLOSED_SECS = 1.0
#: Seconds in which a client that was refused may read why before the connection is reset.
LINGER_SECS = 2.0
#: Bytes of a streamed reply that may wait for the client; one that reads no faster loses its stream.
STREAM_BACKLOG_BYTES_MAX = 16 * 1024 * 1024

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection(asyncio.BufferedProtocol):
    """The protocol object of one connection."""

    __slots__ = (
        "_buffered_bytes",
        "_calls",
        "_chunks",
        "_expects_upload",
        "_fd",
        "_frontend",
        "_head",
        "_held_bytes",
        "_is_blocked",
        "_is_closing",
        "_is_consuming",
        "_is_half_closed",
        "_is_leaving",
        "_is_lingering",
        "_is_paused",
        "_is_writable",
        "_must_linger",
        "_partial",
        "_side_door",
        "_transport",
        "_upload",
        "deadline_s",
        "owed_bytes",
        "sequences",
        "stays_until_s",
    )

    def __init__(self, frontend: HttpFrontend) -> None:
        self._frontend = frontend
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._fd = -1
        # Reading
        self._partial = bytearray()
        self._head: Head | None = None
        self._chunks: ChunkDecoder | None = None
        self._upload: DirectUpload | PlannedUpload | None = None
        self._side_door: SideDoor | None = None
        #: The last body was a large one: the next may be.
        self._expects_upload = False
        self._is_consuming = False
        self._is_paused = False
        #: The next request must be the only one in flight, and others still are.
        self._is_blocked = False
        #: Bytes in private memory, as the frontend has counted them.
        self._held_bytes = 0
        # Writing
        self._calls: deque[Call] = deque()
        self._is_writable = True
        #: Bytes of replies whose turn has not come.
        self._buffered_bytes = 0
        #: Bytes of replies in private memory, as the frontend has counted them.
        self.owed_bytes = 0
        # The end
        self._is_closing = False
        self._is_half_closed = False
        self._is_leaving = False
        self._is_lingering = False
        self._must_linger = False
        #: Until when the client must have done something, monotonic seconds; 0: nothing is expected of it.
        self.deadline_s = 0.0
        #: That go on over this connection; None: there never was one.
        self.sequences: OpenSequences | None = None
        #: Until when it is not handed over to another frontend again, monotonic seconds.
        self.stays_until_s = 0.0

    # --- transport callbacks ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        self._fd = sock.fileno()
        self._frontend.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_fd()
        self._is_closing = True
        self._drop_request()
        self._count_owed(0)
        if self._side_door is not None:
            self._side_door.connection_lost(exc)
        self._cancel_calls()
        self._frontend.closed(self)

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        upload = self._upload
        if upload is not None:
            return upload.next_place()
        return self._frontend.upload_head if self._expects_upload else self._frontend.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_closing:
            return
        self._received(nbytes)
        if self._frontend.engine.crowded_routes:
            self._frontend.express.step()

    def read_now(self) -> None:
        """Take what has arrived, without waiting for the event loop."""
        if self._fd < 0 or self._is_paused or self._is_closing:
            return
        try:
            count = os.readv(self._fd, [self.get_buffer(-1)])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count:
            self._received(count)
        else:
            self._frontend.express.leave(self._fd)  # The loop will find out too.

    def _received(self, nbytes: int) -> None:
        upload = self._upload
        if upload is not None:
            if upload.received(nbytes):
                self._upload = None
                self._expects_upload = True
                self._nothing_expected()
                upload.submit(self)
            return
        if self._partial or self._head is not None:
            self._partial += self._frontend.scratch_view[:nbytes]
            self._resume()
        else:
            used = self._consume(self._frontend.scratch, nbytes)
            if used < nbytes and not self._is_closing:
                self._partial += self._frontend.scratch_view[used:nbytes]
                self._count_held()

    def eof_received(self) -> bool:
        if not self._is_waited_for or self._is_closing:
            return False
        # The loop reads no further by itself.
        self._is_half_closed = self._is_paused = True
        self._frontend.expect(self, HALF_CLOSED_SECS)
        return True

    def pause_writing(self) -> None:
        self._is_writable = False
        self._frontend.stalled(self)
        self._update_reading()
        if self._side_door is not None:
            self._side_door.pause_writing()

    def resume_writing(self) -> None:
        self._is_writable = True
        self._frontend.no_longer_stalled(self)
        self._count_owed(self._buffered_bytes + self.unsent_bytes)
        if self._side_door is not None:
            self._side_door.resume_writing()
        self._go_on()

    # --- reading ---

    def _resume(self) -> None:
        """Go on with what is in the connection's own buffer."""
        partial = self._partial
        used = self._consume(partial, len(partial))
        if used:
            # Not shortened in place: somebody may still hold a view into it.
            self._partial = partial[used:]
        self._count_held()

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
            self._refuse(text_reply(error.status, error.text, connection=CLOSE_LINE))
            return end
        except ServingError as error:
            self._refuse(error_reply(error, connection=CLOSE_LINE))
            return end
        finally:
            self._is_consuming = False
        if self._is_closing:
            return position
        if self._frontend.is_draining:
            self.drain()
        if self._is_paused or (position == end and self._head is None and self._upload is None):
            self._nothing_expected()
        elif not self.deadline_s or (position and self._chunks is None):
            # The rest of a request; the clock starts anew when there was a whole one, or a head, before it.
            self._frontend.expect_request(self, self._body_bytes_to_come)
        return position

    def _must_wait(self) -> bool:
        if (
            len(self._calls) >= PIPELINE_MAX
            or not self._is_writable
            or (self._side_door is not None and self._side_door.is_busy)
        ):
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
                if start < end:
                    check_beginning(buffer[start], end - start)
                return skipped
            body_start = found + 4
            if body_start - start > HEAD_BYTES_MAX:
                raise HeadError(431, TOO_LARGE)
            head = self._frontend.heads.parse(bytes(memoryview(buffer)[start:body_start]))
            if head.is_plain:
                body_end = body_start + head.content_length
                if body_end <= end:
                    self._expects_upload = False
                    self._infer(head, buffer, body_start, body_end)
                    return body_end - start + skipped
            if head.is_exclusive and self._calls:
                self._is_blocked = True
                self._update_reading()
                return skipped
            start -= skipped
            self._begin(head, end - body_start)
        if head.is_chunked:
            return body_start - start + self._feed_chunks(head, memoryview(buffer)[body_start:end])
        return self._take_body(head, buffer, start, body_start, end)

    def _begin(self, head: Head, arrived: int) -> None:
        """A request has begun that is not simply an inference request with all its bytes."""
        self._head = head
        self._is_blocked = False
        self._frontend.check_length(head)
        if head.is_chunked:
            self._chunks = ChunkDecoder(self._frontend.settings.max_input_size)
        if head.expects_continue and (head.is_chunked or arrived < head.content_length):
            self._write([_CONTINUE])

    def _feed_chunks(self, head: Head, data: memoryview) -> int:
        chunks = self._chunks
        assert chunks is not None
        used = chunks.feed(data)
        if chunks.is_complete:
            self._head = None
            self._chunks = None
            self._dispatch(head, memoryview(chunks.body))
        return used

    def _take_body(self, head: Head, buffer: bytearray, start: int, body_start: int, end: int) -> int:
        """Wait for a body, or arrange that the rest of a large one is received into shared memory."""
        length = head.content_length
        arrived = end - body_start
        self._expects_upload = False
        if arrived >= length:
            self._head = None
            if head.is_plain:
                # Parsed again, from memory: the models may have changed while the body arrived.
                self._infer(self._frontend.heads.parse(head.raw), buffer, body_start, body_start + length)
            else:
                self._dispatch(head, memoryview(buffer)[body_start : body_start + length])
            return body_start - start + length
        if head.json_bytes >= 0 and length > DIRECT_BYTES_MIN and arrived >= head.json_bytes:
            self._head = None
            # Parsed again, from memory: as above.
            head = self._frontend.heads.parse(head.raw)
            self._upload = self._frontend.open_upload(self, head, memoryview(buffer)[body_start:end])
            return end - start
        # The head is remembered; only the body is kept.
        return body_start - start

    def _dispatch(self, head: Head, body: memoryview) -> None:
        """Hand over a whole request; the body may be reused when this returns."""
        if head.target is Target.OTHER:
            if self._side_door is None:
                self._side_door = SideDoor(self, self._frontend.make_control_connection, self._transport)
            self._side_door.request(head, body)
        else:
            self._infer_general(head, body)

    def side_door_done(self, *, keep_alive: bool) -> None:
        """aiohttp has answered: go on with what the client has sent since."""
        if keep_alive and not self._is_closing and not self._transport.is_closing():
            self._go_on()
        else:
            self._close()

    @property
    def _body_bytes_to_come(self) -> int:
        if self._upload is not None:
            return self._upload.remaining_bytes
        return self._head.content_length if self._head is not None else 0

    def _count_held(self) -> None:
        """Tell the frontend how much private memory this connection uses."""
        held = len(self._partial)
        if self._chunks is not None:
            held += len(self._chunks.body)
        change = held - self._held_bytes
        if change:
            self._held_bytes = held
            if not self._frontend.hold(change) and change > 0 and not self._is_closing:
                self._refuse(error_reply(self._frontend.no_memory(), connection=CLOSE_LINE))

    def _drop_request(self) -> None:
        """Forget the request that is being received, and what was received of others."""
        if self._upload is not None:
            self._upload.abandon()
            self._upload = None
        self._head = None
        self._chunks = None
        self._partial = bytearray()
        self._count_held()

    # --- inference ---

    def _infer(self, head: Head, buffer: bytearray, start: int, end: int) -> None:
        json_bytes = head.json_bytes
        view = memoryview(buffer)
        if json_bytes < 0:
            self._infer_general(head, view[start:end])
            return
        json_end = start + json_bytes
        plan = head.plans.get(bytes(view[start:json_end]))
        if not isinstance(plan, InferPlan):
            self._infer_general(head, view[start:end])
            return
        route = plan.route
        sampler = route.sampler
        if sampler is not None and (head.trace_context or not sampler.skips()):
            self._infer_general(head, view[start:end])
            return
        rows = plan.rows
        call = PlannedCall(self, plan, keep_alive=head.keep_alive)
        try:
            slab, first = route.loan(rows)
        except ServingError as error:
            self._calls.append(call)
            self.answer(call, [error_reply(error, connection=head.connection_line)])
            return
        memory = route.engine.view
        areas = slab.layout.inputs
        for source, source_end, index in plan.copies:
            offset, row_bytes = areas[index]
            target = slab.base + offset + first * row_bytes
            memory[target : target + source_end - source] = view[start + source : start + source_end]
        route.copied_in_bytes += plan.copied_bytes
        self._calls.append(call)
        call.slab = slab
        call.first = first
        engine = route.engine
        engine.cores.client_fd = self._fd
        route.publish(slab, first, rows, call, plan.priority, plan.timeout_us)
        crowded = engine.crowded_routes  # As in `sort`: most requests come here, and need no call for it.
        if crowded:
            self._frontend.express.sort(self, self._fd, is_quiet=route.first_model not in crowded)

    def _forget_fd(self) -> None:
        """Neither read nor write by ourselves any more."""
        self._frontend.express.leave(self._fd)
        self._fd = -1

    def sort(self, route: RouteClient | None) -> None:
        """A request goes to a model (None: to several): if there is a crowd, note whether it belongs to it."""
        crowded = self._frontend.engine.crowded_routes
        if crowded:
            is_quiet = route is not None and route not in crowded
            self._frontend.express.sort(self, self._fd, is_quiet=is_quiet)

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
            size = sum(map(len, buffers))
            call.count_copy(size)
            self._buffered_bytes += size
            self._count_owed(self._buffered_bytes + self.unsent_bytes)
            return
        calls.popleft()
        if self._frontend.is_draining:
            buffers = self._part(call, buffers)
        self._write(buffers, call)
        if not call.keep_alive:
            self._close_after_writing()
            return
        while calls and calls[0].buffers is not None:
            ready = calls.popleft()
            kept: Sequence[Buffer] = cast(list[bytes], ready.buffers)
            self._buffered_bytes -= sum(map(len, kept))
            if self._frontend.is_draining:
                kept = self._part(ready, kept)
            self._write(kept, ready)
            if not ready.keep_alive:
                self._close_after_writing()
                return
        if self._is_closing and not calls:
            self._close()
        elif self._is_paused or self._partial or self._is_leaving:
            self._go_on()

    def _part(self, call: Call, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Have the last reply of a server that stops say so: the client then sends no request that nobody reads."""
        if self._calls or not call.keep_alive or self.sequences:
            return buffers
        call.keep_alive = False
        self._is_closing = self._must_linger = True
        return [with_close_line(buffers[0]), *buffers[1:]]

    def stream(self, call: Call, buffers: Sequence[Buffer]) -> None:
        """Send part of a reply, of a call that has no others before it; ``answer`` sends the last part."""
        if not self._calls or self._calls[0] is not call:
            return  # The client has left.
        self._write(buffers, call)
        if self._fd >= 0 and self._transport.get_write_buffer_size() > STREAM_BACKLOG_BYTES_MAX:
            self.abort()

    def _go_on(self) -> None:
        if self._is_consuming:
            return  # An answer was known at once; the loop that asked for it goes on by itself.
        self._update_reading()
        if self._partial and not self._is_closing:
            self._resume()
        if self._is_half_closed and self._is_writable and not self._is_waited_for:
            self._close()
        if self._is_leaving:
            self._leave_if_idle()

    def _write(self, buffers: Sequence[Buffer], call: Call | None = None) -> None:
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
                self.abort()
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
        if call is not None:
            call.count_copy(len(rest))
        transport.write(rest)
        if not self._is_writable:
            self._count_owed(self._buffered_bytes + self.unsent_bytes)

    def _count_owed(self, owed: int) -> None:
        """Tell the frontend how much private memory the replies to this client use."""
        change = owed - self.owed_bytes
        if change:
            self.owed_bytes = owed
            self._frontend.owe(change)

    # --- the end ---

    @property
    def _is_waited_for(self) -> bool:
        """Whether anything has been asked and not answered."""
        return bool(self._calls) or (self._side_door is not None and self._side_door.is_busy)

    @property
    def is_receiving(self) -> bool:
        """Whether a request's head has come and its body is still on its way."""
        return not self._is_closing and (self._head is not None or self._upload is not None)

    @property
    def is_pending(self) -> bool:
        """Whether a request is being received or answered without the engine (``load`` may take long), or will come."""
        is_busy = self._side_door is not None and self._side_door.is_busy
        return self.is_receiving or is_busy or (bool(self.sequences) and not self._is_closing)

    def _refuse(self, reply: bytes) -> None:
        """Answer what is no request that we take, after what has been asked before it, and close."""
        self._drop_request()
        call = Call(self, keep_alive=False)
        self._calls.append(call)
        self._is_closing = self._must_linger = True
        self.answer(call, [reply])

    def _cancel_calls(self) -> None:
        # A call may end, with an answer for nobody, while it is cancelled.
        calls, self._calls = self._calls, deque()
        for call in calls:
            call.cancel()

    def _close_after_writing(self) -> None:
        self._cancel_calls()
        if self._must_linger and not self._is_half_closed and self._fd >= 0:
            self._linger()
        else:
            self._close()

    def _linger(self) -> None:
        # Closing while there are unread bytes resets the connection, and the client may never read our answer.
        self._is_lingering = True
        self._forget_fd()
        self._transport.write_eof()
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        self._frontend.expect(self, LINGER_SECS)

    def _close(self) -> None:
        """Close when everything is written."""
        self._is_closing = True
        self._forget_fd()
        self._transport.close()

    def drain(self) -> None:
        """The server stops: take nothing behind what is asked already, and close after the last answer.

        An idle connection stays until :meth:`close_if_idle`: a request may be on its way. One with sequences stays
        until they have ended (spec R-112).
        """
        if self._is_waited_for and not self.sequences:
            self._is_closing = True

    def close_if_idle(self) -> None:
        """Close now unless something is asked, or being asked."""
        if not (self._is_waited_for or self._is_lingering or self.is_receiving or self.sequences):
            self._close()

    def abort(self) -> None:
        """Close at once; what is not written yet is lost."""
        self._is_closing = True
        self._forget_fd()
        self._count_owed(0)
        self._transport.abort()

    def leave(self) -> bool:
        """Let another frontend serve the client, once, as soon as nothing is asked; whether that is new and possible.

        Reading goes on, so that nothing waits and a client that leaves is noticed; one that always has something asked
        stays.
        """
        if self._is_leaving or not self._may_leave:
            return False
        self._is_leaving = True
        self._leave_if_idle()
        return True

    @property
    def _may_leave(self) -> bool:
        """Whether everything that there is to know of this connection is its socket, but for what is being answered."""
        return not (
            self._partial
            or self.is_receiving
            or self._is_closing
            or self._is_half_closed
            or self._fd < 0
            or self.sequences
            or self.unsent_bytes
            or self._frontend.is_draining
        )

    def _leave_if_idle(self) -> None:
        if self._is_waited_for:
            return
        self._is_leaving = False
        if self._may_leave and self._frontend.hand_over(self._fd):
            # The other one has a descriptor of its own, and what the client has sent since is still with the kernel.
            self.abort()

    def time_out(self) -> None:
        """The client has not done in time what was expected of it."""
        if self._is_lingering:
            self.abort()
        elif self._is_half_closed:
            self._close_after_writing()
        else:
            self._refuse(text_reply(408, "the request did not arrive in time", connection=CLOSE_LINE))

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the client has not taken yet."""
        return self._transport.get_write_buffer_size()

    # --- flow ---

    def _update_reading(self) -> None:
        """Read only while there is somewhere to put a further request, and while the client takes its answers."""
        busy = (
            not self._is_writable
            or len(self._calls) >= PIPELINE_MAX
            or (self._side_door is not None and self._side_door.is_busy)
            or (self._is_blocked and bool(self._calls))
        )
        if busy != self._is_paused and self._fd >= 0 and not self._is_half_closed and not self._transport.is_closing():
            self._is_paused = busy
            if busy:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _nothing_expected(self) -> None:
        if self.deadline_s and not self._is_half_closed:
            self._frontend.expect_nothing(self)
