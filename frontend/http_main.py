"""The HTTP frontend process: ``python -m forebay.frontend.http_main --lifeline-fd N``."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from forebay.frontend.app import ROUTES, Route, build_server
from forebay.frontend.frontend_process import FrontendProcess, Served, run_frontend
from forebay.frontend.handlers.context import ControlContext, ControlSettings
from forebay.frontend.http.head import HeadParser
from forebay.frontend.http.relocation import Relocation
from forebay.frontend.http.server import HttpFrontend
from forebay.frontend.http.settings import HttpView
from forebay.ipc.log import log

#: Connections that the kernel completes while the loop is busy.
_BACKLOG = 4096


class HttpServed:
    """The listening sockets and their connections."""

    def __init__(self, frontend: HttpFrontend, context: ControlContext, sockets: Sequence[socket.socket]) -> None:
        """Accept nothing yet.

        Args:
            sockets: bound, or listening already; ours.
        """
        self._frontend = frontend
        self._context = context
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []
        self._is_full = False
        self._opening: asyncio.Task[None] | None = None
        frontend.on_full = self._on_full

    async def open(self) -> None:
        """Accept connections, as long as there are not too many."""
        loop = asyncio.get_running_loop()
        # Duplicates, because a server closes its socket; what comes while none is open waits in the kernel's queue.
        servers = [
            await loop.create_server(self._frontend.connection, sock=sock.dup(), backlog=_BACKLOG)
            for sock in self._sockets
        ]
        if self._is_full or self._servers or self._context.is_exiting:
            _close(servers)
        else:
            self._servers = servers

    def _on_full(self, is_full: bool) -> None:
        """Leave further connections to the kernel's queue, or take them out of it again (``--max-connections``)."""
        self._is_full = is_full
        if not self._sockets:
            return
        if is_full:
            count = self._frontend.connection_count
            log.warning(f"{count} HTTP connections are open, further ones wait; raise --max-connections")
            _close(self._servers)
            self._servers = []
        elif not self._context.is_exiting:
            self._opening = asyncio.get_running_loop().create_task(self.open())

    def stop_accepting(self) -> None:
        _close(self._servers)
        self._servers = []
        for sock in self._sockets:
            sock.close()

    def drain(self) -> None:
        self._context.is_exiting = True
        self._frontend.drain()

    def close_idle(self) -> None:
        self._frontend.close_idle()

    @property
    def connection_count(self) -> int:
        return self._frontend.connection_count

    @property
    def pending_count(self) -> int:
        return self._frontend.pending_count

    def abort(self) -> None:
        self._frontend.abort()


def _close(servers: Sequence[asyncio.Server]) -> None:
    for server in servers:
        server.close()


async def open_servers(process: FrontendProcess) -> Served:
    """Listen on the sockets that came with FrontendStart."""
    settings = HttpView.from_groups(process.start.settings)
    heads = HeadParser(settings.header_forward_pattern, settings.inference_keys)
    is_moving = bool(process.start.settings["http"]["quiet_frontend"]) and not process.start.cache_bytes
    return await serve_http(process, heads, may_relocate=is_moving)


async def serve_http(
    process: FrontendProcess, heads: HeadParser, routes: Sequence[Route] = ROUTES, *, may_relocate: bool = False
) -> Served:
    """Serve HTTP on the process's sockets.

    Args:
        heads: says what requests mean.
        routes: of everything besides inference.
        may_relocate: connections may be handed over to other frontends of this kind, and come from them.
    """
    settings = HttpView.from_groups(process.start.settings)
    context = ControlContext(
        ControlSettings.from_groups(process.start.settings), process.control, process.counters.words
    )
    frontend = HttpFrontend(
        process.engine, settings, build_server(context, routes), process.control.catalog, heads, process.regions
    )
    frontend.take_catalog(process.control.catalog)
    process.control.add_listener(frontend.take_catalog)
    served = HttpServed(frontend, context, process.sockets)
    await served.open()
    if may_relocate:
        Relocation(process, frontend)
    return served


def main() -> int:
    """Entry of the process."""
    return run_frontend("http", open_servers)


if __name__ == "__main__":
    raise SystemExit(main())
