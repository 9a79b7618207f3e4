"""aiohttp's HTTP server without what would show that it is one: no banner, no pages of its own, no decompression.

Serves everything but inference in the HTTP frontend, and the metrics. Below aiohttp's routes and applications, which we
do not use: paths must stay raw (spec H-008).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from forebay.frontend.errors import error_body
from forebay.ipc.log import log


class _PlainRequest(web.BaseRequest):
    """A request whose response tells nothing about what serves it."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.popall(hdrs.SERVER, None)
        response.headers.popall(hdrs.DATE, None)  # Triton sends none


class PlainConnection(web.RequestHandler):
    """aiohttp's HTTP protocol, with our error bodies in place of its pages."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, or what failed outside of a handler; the connection is closed after it."""
        if request.writer.output_size > 0:
            raise ConnectionError("the reply has already begun")
        if isinstance(exc, HttpProcessingError):
            reason = exc.message.partition("\n")[0].rstrip(" :")
            text = f"invalid HTTP request: {reason or 'malformed'}"
        else:
            log.error(f"{request.method} {request.raw_path} failed: {exc!r}")
            text = "internal error, see the server's log"
        response = web.Response(
            body=error_body(text),
            status=status,
            content_type="application/json",
            # aiohttp takes what it could not parse for HTTP/1.0, where this goes without saying.
            headers={hdrs.CONNECTION: "close"},
        )
        response.force_close()
        return response


class PlainServer(web.Server):
    """A factory of protocols, one per client connection; also for a fast path that passes bytes on."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        """Serve ``handler`` in the running event loop."""
        loop = asyncio.get_running_loop()

        def make_request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return _PlainRequest(message, payload, protocol, writer, task, loop)

        super().__init__(handler, request_factory=make_request)

    def __call__(self) -> web.RequestHandler:
        # auto_decompress: Triton reads these bodies as they come, and a bomb stays as small as it was sent.
        return PlainConnection(self, loop=asyncio.get_running_loop(), auto_decompress=False)
