"""A control context with a fake supervisor behind it, and the control server on a loopback socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from forebay.frontend.app import build_server
from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.handlers.context import ControlContext, ControlSettings
from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.tensor import TensorSpec


class FakeControl:
    """Answers commands from a table; an exception there is raised."""

    def __init__(self, catalog: Catalog, replies: Mapping[str, Any] | None = None) -> None:
        self.catalog = CatalogView(catalog)
        self.replies = dict(replies or {})
        self.commands: list[tuple[str, dict[str, Any]]] = []

    async def command(self, verb: str, arguments: Mapping[str, Any] | None = None) -> Any:
        self.commands.append((verb, dict(arguments or {})))
        reply = self.replies.get(verb)
        if isinstance(reply, Exception):
            raise reply
        return reply


class Answer(msgspec.Struct):
    """One HTTP response, header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def triple(self) -> tuple[int, str, bytes]:
        """Status, content type, body: a row of appendix E."""
        return self.status, self.headers["content-type"], self.body


def entry(name: str, version: int = 1, state: str = "READY", **fields: Any) -> ModelEntry:
    """Return a catalog entry with one FP32 input and output of [-1]."""
    defaults: dict[str, Any] = {
        "platform": "identity",
        "max_batch_size": 8,
        "inputs": (TensorSpec("INPUT0", "FP32", (-1,)),),
        "outputs": (TensorSpec("OUTPUT0", "FP32", (-1,)),),
    }
    return ModelEntry(name=name, version=version, state=state, **(defaults | fields))


def make_context(
    *models: ModelEntry,
    replies: Mapping[str, Any] | None = None,
    settings: ControlSettings | None = None,
    words: memoryview | None = None,
    live: bool = True,
    ready: bool = True,
) -> ControlContext:
    """Return a context whose control is a :class:`FakeControl`."""
    return ControlContext(
        settings=settings or ControlSettings(allow_client_shm=True),
        control=FakeControl(Catalog(generation=1, models=models, live=live, ready=ready), replies),
        words=words if words is not None else memoryview(bytearray(8 * 4096)).cast("Q"),
    )


class RawClient:
    """Sends exact bytes on one connection and reads responses with a Content-Length."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(head[0].split()[1]), headers, body)

    async def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b""))
        return await self.receive()


@asynccontextmanager
async def serving(context: ControlContext) -> AsyncIterator[RawClient]:
    """Serve ``context`` on a free port and yield one connection to it."""
    protocol_factory = build_server(context)
    server = await asyncio.get_running_loop().create_server(protocol_factory, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()
        server.close()
        await protocol_factory.shutdown(1.0)


def ask(context: ControlContext, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    """Send one request over a real socket and return the answer."""

    async def run() -> Answer:
        async with serving(context) as client:
            return await asyncio.wait_for(client.ask(method, path, body, **headers), 20)

    return asyncio.run(run())
