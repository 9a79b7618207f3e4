"""The HTTP frontend process: ``python -m forebay.frontend.http_main --lifeline-fd N``."""

from __future__ import annotations

import asyncio

from forebay.frontend.app import build_server
from forebay.frontend.frontend_process import FrontendProcess, Served, run_frontend
from forebay.frontend.handlers.context import ControlContext, ControlSettings
from forebay.frontend.http.head import HeadParser
from forebay.frontend.http.server import HttpFrontend
from forebay.frontend.http.settings import HttpView

#: Connections that the kernel completes while the loop is busy.
_BACKLOG = 4096


class HttpServed:
    """The listening sockets and their connections."""

    def __init__(self, frontend: HttpFrontend, context: ControlContext, servers: list[asyncio.Server]) -> None:
        self._frontend = frontend
        self._context = context
        self._servers = servers

    def stop_accepting(self) -> None:
        self._context.is_exiting = True
        for server in self._servers:
            server.close()

    def drain(self) -> None:
        self._frontend.drain()

    @property
    def connection_count(self) -> int:
        return self._frontend.connection_count

    def abort(self) -> None:
        self._frontend.abort()


async def open_servers(process: FrontendProcess) -> Served:
    """Listen on the sockets that came with FrontendStart."""
    settings = HttpView.from_groups(process.start.settings)
    context = ControlContext(
        ControlSettings.from_groups(process.start.settings), process.control, process.counters.words
    )
    heads = HeadParser(settings.header_forward_pattern, settings.inference_keys)
    frontend = HttpFrontend(process.engine, settings, build_server(context), process.control.catalog, heads)
    frontend.take_catalog(process.control.catalog)
    process.control.add_listener(frontend.take_catalog)
    servers = [
        await process.loop.create_server(frontend.connection, sock=sock, backlog=_BACKLOG) for sock in process.sockets
    ]
    return HttpServed(frontend, context, servers)


def main() -> int:
    """Entry of the process."""
    return run_frontend("http", open_servers)


if __name__ == "__main__":
    raise SystemExit(main())
