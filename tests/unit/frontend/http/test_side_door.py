"""aiohttp's half of a connection."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

from aiohttp import web

from forebay.frontend.http.head import HeadParser
from forebay.frontend.http.side_door import NotifyingConnection, SideDoor
from forebay.frontend.plain_server import PlainServer


class Owner:
    """The connection, as a side door sees it."""

    def __init__(self) -> None:
        self.answered: list[bool] = []
        self.event = asyncio.Event()

    def side_door_done(self, *, keep_alive: bool) -> None:
        self.answered.append(keep_alive)
        self.event.set()


async def open_door() -> tuple[SideDoor, Owner, mock.Mock]:
    async def handler(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        names = ",".join(name for name in request.headers if name != "Host")
        return web.Response(text=f"{request.method} {request.raw_path} {names} {body.decode()}")

    server = PlainServer(handler)
    transport = mock.create_autospec(asyncio.Transport, instance=True)
    transport.is_closing.return_value = False
    transport.get_extra_info.return_value = None
    owner: Any = Owner()
    door = SideDoor(owner, lambda finished: NotifyingConnection(server, finished), transport)
    return door, owner, transport


async def answer(door: SideDoor, owner: Owner, transport: mock.Mock, raw: bytes, body: bytes = b"") -> bytes:
    """Pass one request on and return what aiohttp wrote."""
    transport.write.reset_mock()
    transport.writelines.reset_mock()
    owner.event.clear()
    door.request(HeadParser().parse(raw), memoryview(body))
    assert door.is_busy
    await owner.event.wait()
    assert not door.is_busy
    written = [call.args[0] for call in transport.write.mock_calls]
    written += [part for call in transport.writelines.mock_calls for part in call.args[0]]
    return b"".join(map(bytes, written))


def test_requests_one_after_the_other() -> None:
    async def scenario() -> None:
        door, owner, transport = await open_door()
        for number in range(3):
            reply = await answer(door, owner, transport, b"GET /a%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
            assert reply.endswith(b"GET /a%d  " % number)
            assert b"Server:" not in reply
        closing = b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        assert b"Connection: close" in await answer(door, owner, transport, closing)
        assert owner.answered == [True, True, True, False]
        door.connection_lost(None)

    asyncio.run(scenario())


def test_what_the_connection_has_dealt_with_is_not_passed_on() -> None:
    """Chunks are joined, expectations answered and offers declined before aiohttp sees a request."""

    async def scenario() -> None:
        door, owner, transport = await open_door()
        chunked = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        reply = await answer(door, owner, transport, chunked, b"body")
        assert reply.endswith(b"POST /a Content-Length body")
        offer = b"GET /b HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nConnection: Upgrade\r\n\r\n"
        reply = await answer(door, owner, transport, offer)
        assert reply.endswith(b"GET /b Connection,Content-Length ")
        door.connection_lost(None)

    asyncio.run(scenario())


def test_a_connection_is_not_closed_because_aiohttp_has_nothing_to_do() -> None:
    """It may be busy with inference, which aiohttp does not see."""

    async def scenario() -> None:
        with mock.patch("aiohttp.web_protocol.RequestHandler._process_keepalive") as closing:
            door, owner, transport = await open_door()
            await answer(door, owner, transport, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            door._protocol._process_keepalive()
            closing.assert_not_called()
            transport.close.assert_not_called()
            door.connection_lost(None)

    asyncio.run(scenario())
