"""One client connection: the transport's callbacks, keep-alive, age, and new calls.

The read buffer is one scratch area of the whole process, so an idle connection costs no buffer. Keep-alive follows
grpc-core: what a client may ping is policed ("too_many_pings"), and a silent client is pinged (spec G-082, G-083).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from forebay.frontend.grpc.call import Call, FailedCall
from forebay.frontend.grpc.http2.connection import Connection
from forebay.frontend.grpc.http2.frames import Http2Code
from forebay.frontend.grpc.http2.hpack_decoder import HpackDecoder
from forebay.frontend.grpc.http2.hpack_encoder import ReplyEncoder
from forebay.frontend.grpc.http2.stream import Stream
from forebay.frontend.grpc.status import ACCEPT_ENCODING, CONTENT_TYPE, STATUS_OK, STOPPING_TEXT, RpcError, Status

if TYPE_CHECKING:
    from forebay.frontend.grpc.request_head import RequestHead
    from forebay.frontend.grpc.server import GrpcFrontend

#: Bytes in the transport beyond which replies wait with their streams.
_WRITE_HIGH_BYTES = 1024 * 1024
#: What is written within one event-loop turn is gathered up to so many bytes: one system call for many replies.
_GATHERED_BYTES_MAX = 64 * 1024
#: Seconds a new connection has to say that it speaks HTTP/2.
_GREETING_SECS = 20.0
#: Seconds between pings of a client without calls, at least, unless such pings are permitted (grpc-core).
_IDLE_PING_SECS = 7200.0
#: Seconds from when a ping should have been answered to the end: whatever has come is read within.
_LAST_LOOK_SECS = 0.01
#: Seconds between two looks at a silent client, at least; grpc-core has 1 ms, which would be its own flood.
_KEEPALIVE_SECS_MIN = 0.01
#: Connections end up to a tenth earlier or later than configured, so that not all come back at once (grpc-core).
_AGE_JITTER = 0.1
#: Seconds from the first GOAWAY of a drained connection to the second: time for calls on their way.
_DRAIN_SECS = 0.25


class GrpcConnection(asyncio.BufferedProtocol):
    """The protocol object of one connection."""

    def __init__(self, frontend: GrpcFrontend) -> None:
        self._frontend = frontend
        self._settings = frontend.settings
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._fd = -1
        self._http2: Connection[RequestHead] = cast("Connection[RequestHead]", None)
        self._is_ending = False
        #: Calls that are open, as ``_http2`` has them.
        self._streams: Mapping[int, Stream] = {}
        #: What is written at the end of the turn.
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        #: The bytes being received go straight into shared memory.
        self._is_direct = False
        # Pings of the client
        self._last_ping_s = 0.0
        self._strikes = 0
        self._frames_at_ping = 0
        # Pings of ours
        self._pings_without_data = 0
        self._frames_at_keepalive = 0
        #: Runs while a ping is not answered.
        self._silence: asyncio.TimerHandle | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._keepalive_secs = _KEEPALIVE_SECS_MIN
        self._keepalive: asyncio.TimerHandle | None = None

    # --- transport callbacks ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        frontend = self._frontend
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._fd = transport.get_extra_info("socket").fileno()
        self._http2 = Connection(
            self,
            self._write,
            HpackDecoder(frontend.heads.read),
            ReplyEncoder(CONTENT_TYPE, ACCEPT_ENCODING, STATUS_OK),
            time.monotonic,
        )
        self._streams = self._http2.streams
        frontend.opened(self)
        self._timers.append(frontend.loop.call_later(_GREETING_SECS, self._check_greeting))
        age_ms = self._settings.max_connection_age
        if age_ms is not None:
            age_s = age_ms / 1000 * random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)
            self._timers.append(frontend.loop.call_later(age_s, self._grow_old))
        self._keepalive_secs = max(self._settings.keepalive_time / 1000, _KEEPALIVE_SECS_MIN)
        self._keepalive = frontend.loop.call_later(self._keepalive_secs, self._keep_alive)
        if frontend.is_draining:
            self.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._keepalive is not None:
            self._keepalive.cancel()
        self._end_silence()
        self._is_ending = True
        self._gathered.clear()
        self._http2.lost()
        self._frontend.closed(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        place = self._http2.direct_place()
        self._is_direct = place is not None
        return self._frontend.scratch_view if place is None else place

    def buffer_updated(self, nbytes: int) -> None:
        # Whatever it is, the client is there.
        if self._silence is not None:
            self._end_silence()
        self._frontend.engine.cores.client_fd = self._fd
        if self._is_direct:
            self._http2.received_direct(nbytes)
        else:
            self._http2.receive(self._frontend.scratch_view[:nbytes])

    def eof_received(self) -> bool:
        # A client that has closed its side takes no answers either, as gRPC clients do it.
        return False

    def pause_writing(self) -> None:
        self._http2.pause_writing()

    def resume_writing(self) -> None:
        self._http2.resume_writing()

    # --- writing ---

    def _write(self, data: bytes) -> None:
        """Take bytes for the client: written at the end of the turn, or now if no other reply can follow."""
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if not self._streams or self._gathered_bytes > _GATHERED_BYTES_MAX:
            self._flush()
        elif len(self._gathered) == 1:
            self._frontend.loop.call_soon(self._flush)

    def _flush(self) -> None:
        gathered = self._gathered
        if gathered:
            data = gathered[0] if len(gathered) == 1 else b"".join(gathered)
            gathered.clear()
            self._gathered_bytes = 0
            self._transport.write(data)

    # --- the HTTP/2 connection's application ---

    def open_stream(self, number: int, head: RequestHead, *, is_end: bool) -> Stream:
        """Make the call that a header asks for."""
        frontend, http2 = self._frontend, self._http2
        factory = frontend.methods.get(head.path)
        if factory is not None and head.error is None and not frontend.is_draining:
            call = factory(frontend, http2, number, head)
            http2.streams[number] = call
            if is_end:
                call.is_remote_closed = True
                call.on_data(memoryview(b""), is_end=True)
            return call
        refused = FailedCall(frontend, http2, number, head)
        http2.streams[number] = refused
        refused.is_remote_closed = is_end
        self._refuse(refused, head)
        return refused

    def are_trailers(self, head: RequestHead) -> bool:
        return head.is_trailers

    def _refuse(self, call: FailedCall, head: RequestHead) -> None:
        if head.is_malformed:
            self._http2.abort(call, Http2Code.PROTOCOL_ERROR)
        elif head.http_status != 200:
            # No gRPC client at all.
            call.answer_plainly(head.http_status)
        elif head.error is not None:
            call.fail(head.error)
        elif self._frontend.is_draining:
            call.fail(RpcError(Status.UNAVAILABLE, STOPPING_TEXT))
        else:
            # Without a text, as grpc-core (spec G-021).
            call.fail(RpcError(Status.UNIMPLEMENTED))

    def on_ping(self) -> None:
        """Police the client's pings (spec G-082; grpc-core's PingAbusePolicy)."""
        http2 = self._http2
        now_s = time.monotonic()
        if http2.frames_written != self._frames_at_ping:
            self._frames_at_ping = http2.frames_written
            self._strikes = 0
            self._last_ping_s = now_s
            return
        if http2.streams or self._settings.keepalive_permit_without_calls:
            least_s = self._settings.http2_min_recv_ping_interval_without_data / 1000
        else:
            least_s = _IDLE_PING_SECS
        too_soon = self._last_ping_s > 0 and now_s - self._last_ping_s < least_s
        self._last_ping_s = now_s
        if not too_soon:
            return
        self._strikes += 1
        allowed = self._settings.http2_max_ping_strikes
        if allowed and self._strikes > allowed:
            http2.close(Http2Code.ENHANCE_YOUR_CALM, "too_many_pings")

    def on_pong(self) -> None:
        """The client is there, as the bytes have said already."""

    def on_idle(self) -> None:
        """No call is left."""
        if self._http2.is_draining:
            self._end()

    def on_closed(self) -> None:
        """A GOAWAY with an error is out."""
        self._end()

    def _end(self) -> None:
        if not self._is_ending:
            self._is_ending = True
            self._flush()
            self._transport.close()

    # --- time ---

    def _check_greeting(self) -> None:
        if not self._http2.is_greeted and not self._is_ending:
            self.abort()

    def _keep_alive(self) -> None:
        """Ping a silent client, if there is reason to."""
        loop, settings, http2 = self._frontend.loop, self._settings, self._http2
        self._keepalive = loop.call_later(self._keepalive_secs, self._keep_alive)
        if self._is_ending or not (http2.streams or settings.keepalive_permit_without_calls):
            return
        if http2.frames_written != self._frames_at_keepalive:
            self._frames_at_keepalive = http2.frames_written
            self._pings_without_data = 0
        limit = settings.http2_max_pings_without_data
        if limit and self._pings_without_data >= limit:
            return
        self._pings_without_data += 1
        http2.ping()
        if self._silence is None:
            self._silence = loop.call_later(settings.keepalive_timeout / 1000, self._check_silence)

    def _check_silence(self) -> None:
        # The answer may have come while we were busy: what is there is read first.
        self._silence = self._frontend.loop.call_later(_LAST_LOOK_SECS, self._abort_if_silent)

    def _abort_if_silent(self) -> None:
        self._silence = None
        if not self._is_ending:
            self.abort()

    def _end_silence(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _grow_old(self) -> None:
        """Have the client move to a new connection (spec G-083)."""
        self.drain()
        grace_ms = self._settings.max_connection_age_grace
        if grace_ms is not None:
            self._timers.append(self._frontend.loop.call_later(grace_ms / 1000, self.abort))

    # --- the end ---

    @property
    def is_pending(self) -> bool:
        """Whether a message is being received, or answered without the engine (a load may take long)."""
        return any(isinstance(stream, Call) and stream.is_pending for stream in self._http2.streams.values())

    def drain(self) -> None:
        """Say that no further calls are wanted; close when the last one is answered."""
        if self._is_ending or self._http2.is_draining:
            return
        self._http2.drain(refuse=False)
        self._timers.append(self._frontend.loop.call_later(_DRAIN_SECS, self._drain_now))

    def _drain_now(self) -> None:
        if self._is_ending:
            return
        self._http2.drain(refuse=True)
        if not self._http2.streams:
            self._end()

    def wind_up(self) -> None:
        """The server stops: end calls that would never end by themselves, and take no more."""
        for stream in list(self._http2.streams.values()):
            if isinstance(stream, Call):
                stream.wind_up()
        self.drain()

    def abort(self) -> None:
        """Close at once."""
        self._is_ending = True
        self._transport.abort()
