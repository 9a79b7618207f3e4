"""The metrics process: answers Prometheus on its own port, so that a slow scrape never stands in front of inference.

Started by the supervisor like every frontend: `FrontendStart` on the lifeline with the counters file and the bound
socket, catalogs over the control socket, `Serve` when the initial load is done. Nothing here wakes up between scrapes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import socket
import sys

import uvloop
from aiohttp import hdrs, web

from forebay.frontend.app import request_path
from forebay.frontend.control_client import ControlClient
from forebay.frontend.errors import error_body
from forebay.frontend.histograms import WINDOW_SECS, WINDOW_STEPS
from forebay.frontend.metrics import CONTENT_TYPE, MetricsPage, MetricsSettings
from forebay.frontend.plain_server import PlainServer
from forebay.ipc.counters import CountersFile
from forebay.ipc.errors import Code, ServingError
from forebay.ipc.frontend_messages import FrontendStart, Serve, SupervisorToFrontend
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.log import log
from forebay.ipc.messages import Failed, LogChanged, Started, Stop
from forebay.ipc.process import die_with_parent, ignore_terminal_signals, set_name
from forebay.ipc.worker_messages import ModelMetrics

#: Connections that may wait to be accepted: scrapers are few.
_BACKLOG = 128

#: Seconds that scrapes in progress get when the process is told to stop.
_SHUTDOWN_SECS = 1.0


class MetricsHandler:
    """`/metrics` and nothing else: other paths are empty, other methods refused (spec M-001, M-002)."""

    def __init__(self, page: MetricsPage) -> None:
        self._page = page

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method != hdrs.METH_GET:
            return _text(error_body("Method Not Allowed"), status=405, content_type="text/plain")
        if request_path(request) not in ("/metrics", "/metrics/"):
            return _text(b"")
        return _text(self._page.render())


def _text(body: bytes, *, status: int = 200, content_type: str = CONTENT_TYPE) -> web.Response:
    return web.Response(body=body, status=status, headers={hdrs.CONTENT_TYPE: content_type})


class MetricsProcess:
    """From `FrontendStart` to `Stop`."""

    def __init__(self, lifeline: Lifeline[SupervisorToFrontend], start: FrontendStart, fds: list[int]) -> None:
        """Take ownership of ``lifeline`` and ``fds``; runs in the event loop that is to serve."""
        loop = asyncio.get_running_loop()
        self._lifeline = lifeline
        # A metrics process submits nothing: of the descriptors in front of the counters file it needs none.
        first_socket = len(fds) - len(start.listen)
        for fd in fds[: first_socket - 1]:
            os.close(fd)
        self._counters = CountersFile(fds[first_socket - 1])
        os.close(fds[first_socket - 1])
        self._sockets = [socket.socket(fileno=fd) for fd in fds[first_socket:]]
        self._page = MetricsPage(self._counters.words, MetricsSettings.from_groups(start.settings))
        self._control = ControlClient(loop, start.runtime_directory, start.producer)
        self._control.add_listener(self._page.take_catalog)
        self._serve = asyncio.Event()
        self._stop = asyncio.Event()
        self._exit_code = 0
        loop.add_reader(lifeline.fileno(), self._on_lifeline)

    async def run(self) -> int:
        """Serve from `Serve` to `Stop` and return the exit code."""
        loop = asyncio.get_running_loop()
        self._lifeline.send(Started())
        factory = PlainServer(MetricsHandler(self._page))
        servers: list[asyncio.Server] = []
        # Everything imported so far stays for good.
        gc.freeze()
        try:
            await self._first(self._serve)
            if not self._stop.is_set():
                await self._control.wait_catalog()
                servers = [await loop.create_server(factory, sock=sock, backlog=_BACKLOG) for sock in self._sockets]
                if self._page.has_summaries:
                    self._step_windows()
            await self._stop.wait()
        finally:
            loop.remove_reader(self._lifeline.fileno())
            for server in servers:
                server.close()
            await factory.shutdown(_SHUTDOWN_SECS)
            self._control.close()
        return self._exit_code

    def _step_windows(self) -> None:
        # The only thing that wakes this process up by itself, and only for summaries.
        if not self._stop.is_set():
            self._page.step_windows()
            asyncio.get_running_loop().call_later(WINDOW_SECS / WINDOW_STEPS, self._step_windows)

    async def _first(self, event: asyncio.Event) -> None:
        """Wait for ``event`` or for the end."""
        tasks = [asyncio.ensure_future(waiting.wait()) for waiting in (event, self._stop)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    def _on_lifeline(self) -> None:
        try:
            messages = self._lifeline.receive_nowait()
        except PeerClosed:
            # The supervisor is gone, and with it the server.
            self._exit_code = 1
            self._stop.set()
            return
        for message, fds in messages:
            for fd in fds:
                os.close(fd)
            if isinstance(message, Serve):
                self._serve.set()
            elif isinstance(message, ModelMetrics):
                self._page.custom.take(message)
            elif isinstance(message, LogChanged):
                log.follow(message.options)
            elif isinstance(message, Stop):
                self._stop.set()


async def _run(lifeline: Lifeline[SupervisorToFrontend], start: FrontendStart, fds: list[int]) -> int:
    return await MetricsProcess(lifeline, start, fds).run()


def main(arguments: list[str] | None = None) -> int:
    """Run the process; started as ``python -m forebay.frontend.metrics_main --lifeline-fd N``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline-fd", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with_parent(os.getppid())
    ignore_terminal_signals()
    set_name("metrics")
    lifeline: Lifeline[SupervisorToFrontend] = Lifeline(socket.socket(fileno=options.lifeline_fd), SupervisorToFrontend)
    try:
        message, fds = lifeline.receive()
        if not isinstance(message, FrontendStart):
            return 0 if isinstance(message, Stop) else 1
        return uvloop.run(_run(lifeline, message, fds))
    except PeerClosed:
        return 1
    except Exception as error:
        log.error(f"the metrics process failed: {error!r}")
        code = error.code if isinstance(error, ServingError) else Code.INTERNAL
        lifeline.send(Failed(code=code, text=f"failed to start Metrics service: {error}"))
        return 1


if __name__ == "__main__":
    sys.exit(main())
