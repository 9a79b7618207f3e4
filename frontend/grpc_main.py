"""The gRPC frontend process: ``python -m forebay.frontend.grpc_main --lifeline-fd N``."""

from __future__ import annotations

import asyncio

from forebay.frontend.frontend_process import FrontendProcess, Served, run_frontend
from forebay.frontend.grpc.methods import build_methods
from forebay.frontend.grpc.server import GrpcFrontend
from forebay.frontend.grpc.settings import GrpcView
from forebay.frontend.grpc.tls import server_context
from forebay.frontend.handlers.context import ControlSettings
from forebay.ipc.frontend_messages import FrontendStart

#: Connections that the kernel completes while the loop is busy.
_BACKLOG = 4096


class GrpcServed:
    """The listening sockets and their connections."""

    def __init__(self, frontend: GrpcFrontend, servers: list[asyncio.Server]) -> None:
        self._frontend = frontend
        self._servers = servers

    def stop_accepting(self) -> None:
        for server in self._servers:
            server.close()

    def drain(self) -> None:
        self._frontend.drain()

    def close_idle(self) -> None:
        """Nothing: connections have been told with GOAWAY."""

    @property
    def connection_count(self) -> int:
        return self._frontend.connection_count

    @property
    def pending_count(self) -> int:
        return self._frontend.pending_count

    def abort(self) -> None:
        self._frontend.abort()


async def open_servers(process: FrontendProcess) -> Served:
    """Listen on the sockets that came with FrontendStart."""
    groups = process.start.settings
    settings = GrpcView.from_groups(groups)
    control_settings = ControlSettings.from_groups(groups)
    tls = server_context(settings)
    frontend = GrpcFrontend(
        process.loop,
        process.engine,
        process.control,
        settings,
        process.counters.words,
        build_methods(),
        process.regions,
        server_id=control_settings.server_id,
        allow_client_shm=control_settings.allow_client_shm,
    )
    frontend.take_catalog(process.control.catalog)
    process.control.add_listener(frontend.take_catalog)
    servers = [
        await process.loop.create_server(frontend.connection, sock=sock, backlog=_BACKLOG, ssl=tls)
        for sock in process.sockets
    ]
    return GrpcServed(frontend, servers)


def _check_tls(start: FrontendStart) -> None:
    server_context(GrpcView.from_groups(start.settings))


def main() -> int:
    """Entry of the process."""
    return run_frontend("grpc", open_servers, check=_check_tls)


if __name__ == "__main__":
    raise SystemExit(main())
