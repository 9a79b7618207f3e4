"""The floor that large bodies are compared with: a server that only receives a body straight into a buffer.

    python -m bench.bare_receiver PORT

uvloop, one `asyncio.BufferedProtocol` per connection: the header is looked at in a small scratch buffer, the body is
received directly into a slice of one shared-memory mapping (only the bytes that came with the header are copied), and a
fixed short answer is sent. Nothing is parsed beyond Content-Length. `GET /v2/health/ready` is answered alike.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
from typing import cast

import uvloop

SCRATCH_BYTES = 64 * 1024
SLOT_BYTES = 1 << 20
SLOT_COUNT = 64
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class SlotPool:
    """Equal slots of one anonymous shared mapping."""

    def __init__(self) -> None:
        descriptor = os.memfd_create("bare-receiver", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, SLOT_BYTES * SLOT_COUNT)
        mapping = memoryview(mmap.mmap(descriptor, SLOT_BYTES * SLOT_COUNT))
        self.free = [mapping[start : start + SLOT_BYTES] for start in range(0, len(mapping), SLOT_BYTES)]


class BareReceiver(asyncio.BufferedProtocol):
    """Receives one body after another into a slot of its own."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._scratch = bytearray(SCRATCH_BYTES)
        self._scratch_view = memoryview(self._scratch)
        self._scratch_bytes = 0
        self._body_left = 0
        self._body_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not derive from asyncio's
        self._slot = self._pool.free.pop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.free.append(self._slot)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._body_left:
            return self._slot[self._body_bytes - self._body_left : self._body_bytes]
        return self._scratch_view[self._scratch_bytes :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._body_left:
            self._body_left -= nbytes
            if not self._body_left:
                self._transport.write(ANSWER)
            return
        self._scratch_bytes += nbytes
        header_end = self._scratch.find(b"\r\n\r\n", 0, self._scratch_bytes)
        if header_end < 0:
            return
        start = header_end + 4
        came_along = self._scratch_bytes - start
        self._body_bytes = self._content_length(header_end)
        self._slot[:came_along] = self._scratch_view[start : self._scratch_bytes]
        self._body_left = self._body_bytes - came_along
        self._scratch_bytes = 0
        if not self._body_left:
            self._transport.write(ANSWER)

    def _content_length(self, header_end: int) -> int:
        # With the line break before it: Inference-Header-Content-Length ends alike.
        name = b"\r\nContent-Length: "
        start = self._scratch.find(name, 0, header_end)
        if start < 0:
            return 0
        start += len(name)
        return int(self._scratch[start : self._scratch.find(b"\r\n", start, header_end + 2)])


async def serve(port: int) -> None:
    """Serve until the process is ended."""
    pool = SlotPool()
    server = await asyncio.get_running_loop().create_server(lambda: BareReceiver(pool), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
