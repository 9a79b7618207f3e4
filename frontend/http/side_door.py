"""Passes one request at a time to an aiohttp protocol object that shares the connection's transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from forebay.frontend.app import ControlConnection, ControlServer
from forebay.frontend.http.head import Head

if TYPE_CHECKING:
    from forebay.frontend.http.connection import Connection


class NotifyingConnection(ControlConnection):
    """aiohttp's protocol that says when it has finished a reply."""

    __slots__ = ("_on_finished",)

    def __init__(self, server: ControlServer, on_finished: Callable[[], None]) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), auto_decompress=False)
        self._on_finished = on_finished

    async def finish_response(self, request: web.BaseRequest, resp: Any, start_time: float | None) -> Any:
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._on_finished()

    def _process_keepalive(self) -> None:
        """Do not close the connection an hour after aiohttp's last request on it: inference is none of those."""


MakeControlConnection = Callable[[Callable[[], None]], NotifyingConnection]


class SideDoor:
    """aiohttp's half of one connection."""

    __slots__ = ("_connection", "_keep_alive", "_protocol", "is_busy")

    def __init__(self, connection: Connection, make: MakeControlConnection, transport: asyncio.Transport) -> None:
        self._connection = connection
        self._protocol = make(self._finished)
        self._protocol.connection_made(transport)
        self._keep_alive = True
        #: True from a request until its reply is written.
        self.is_busy = False

    def request(self, head: Head, body: memoryview) -> None:
        """Hand over one whole request; chunks have been joined."""
        self.is_busy = True
        self._keep_alive = head.keep_alive
        raw = head.raw
        if head.is_chunked or head.expects_continue or head.is_upgrade:
            raw = _plain_head(raw, len(body))
        self._protocol.data_received(raw + bytes(body) if body else raw)

    def _finished(self) -> None:
        self.is_busy = False
        # Not now: aiohttp is still in its own bookkeeping of this reply.
        asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._connection.side_door_done(keep_alive=self._keep_alive)

    def connection_lost(self, error: BaseException | None) -> None:
        self._protocol.connection_lost(error)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


def _plain_head(raw: bytes, length: int) -> bytes:
    """Return the block with a Content-Length in place of what has been dealt with: chunks, expectation, upgrade."""
    lines = raw[:-4].split(b"\r\n")
    dropped = (b"transfer-encoding:", b"expect:", b"content-length:", b"upgrade:", b"http2-settings:")
    kept = [line for line in lines if not line.lower().startswith(dropped)]
    kept.append(b"Content-Length: %d" % length)
    return b"\r\n".join(kept) + b"\r\n\r\n"
