"""Everything that HTTP serves besides inference: the table of routes, and the aiohttp server around it.

The HTTP frontend process passes every request that its fast path does not take to the server made here. Matching is
Triton's, not aiohttp's: raw paths, whole-pattern matches, in a fixed order (spec H-004..H-011).
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aiohttp import hdrs, web

from forebay.frontend.errors import error_body, http_status
from forebay.frontend.handlers import (
    health,
    log_settings,
    metadata,
    model_statistics,
    regions,
    repository,
    trace_settings,
)
from forebay.frontend.handlers.context import JSON_TYPE, TEXT_TYPE, Call, ControlContext, Handler, Reply
from forebay.frontend.plain_server import PlainConnection, PlainServer
from forebay.ipc.errors import InvalidArgument, ServingError, Unsupported
from forebay.ipc.log import log


@dataclass(frozen=True)
class Route:
    """Paths, and what answers them."""

    pattern: re.Pattern[str]
    api: str
    """The restricted API that it belongs to (spec H-011)."""
    methods: Mapping[str, Handler]
    error_type: str = JSON_TYPE
    """Content type of its errors and 405s: those raised before Triton's handler sets the header are text (H-003)."""


async def _infer(context: ControlContext, call: Call) -> Reply:
    """Refuse: the protocol in front takes these, and passes on only those that the checks before this one answer."""
    raise Unsupported(f"{call.groups['action']} requests are not served on this connection")


def _routes(*table: tuple[str, str, Mapping[str, Handler], str]) -> tuple[Route, ...]:
    return tuple(Route(re.compile(pattern), api, methods, error_type) for pattern, api, methods, error_type in table)


_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?"
_REGION = r"/v2/(?P<kind>system|cuda)sharedmemory(?:/region/(?P<region>[^/]+))?"
_REPOSITORY = r"/v2/repository(?:/(?P<repository>[^/]+))?"

_TRACE: Mapping[str, Handler] = {"GET": trace_settings.trace_settings, "POST": trace_settings.trace_settings}

#: First match wins; the order is Triton's, so that a model called ``stats`` is unreachable (spec H-006, H-007).
ROUTES = _routes(
    (r"/v2/models/stats", "statistics", {"GET": model_statistics.statistics}, JSON_TYPE),
    (r"/v2/logging", "logging", {"GET": log_settings.log_settings, "POST": log_settings.log_settings}, JSON_TYPE),
    (rf"{_MODEL}/(?P<action>infer)", "inference", {"POST": _infer}, TEXT_TYPE),
    (rf"{_MODEL}/(?P<action>generate|generate_stream)", "inference", {"POST": _infer}, JSON_TYPE),
    (rf"{_MODEL}/ready", "health", {"GET": health.model_ready}, TEXT_TYPE),
    (rf"{_MODEL}/config", "model-config", {"GET": metadata.model_config}, JSON_TYPE),
    (rf"{_MODEL}/stats", "statistics", {"GET": model_statistics.statistics}, JSON_TYPE),
    # No version here: with one the path is unknown (spec H-260).
    (r"/v2/models/(?P<model>[^/]+)/trace/setting", "trace", _TRACE, JSON_TYPE),
    (_MODEL, "metadata", {"GET": metadata.model_metadata}, JSON_TYPE),
    (r"/v2", "metadata", {"GET": metadata.server_metadata}, JSON_TYPE),
    (r"/v2/health/(?P<probe>live|ready)", "health", {"GET": health.server_health}, TEXT_TYPE),
    (rf"{_REGION}/status", "shared-memory", {"GET": regions.status}, JSON_TYPE),
    (rf"{_REGION}/register", "shared-memory", {"POST": regions.register}, JSON_TYPE),
    (rf"{_REGION}/unregister", "shared-memory", {"POST": regions.unregister}, JSON_TYPE),
    (rf"{_REPOSITORY}/index", "model-repository", {"POST": repository.index}, JSON_TYPE),
    (rf"{_REPOSITORY}/models/(?P<model>[^/]+)/load", "model-repository", {"POST": repository.load}, JSON_TYPE),
    (rf"{_REPOSITORY}/models/(?P<model>[^/]+)/unload", "model-repository", {"POST": repository.unload}, JSON_TYPE),
    (r"/v2/trace/setting", "trace", _TRACE, JSON_TYPE),
    (
        r"/forebay/explain/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?",
        "statistics",
        {"GET": model_statistics.explain},
        JSON_TYPE,
    ),
)

_NOT_FOUND = Reply(error_body("Not Found"), status=404, content_type=TEXT_TYPE)
_EXITING = Reply(error_body("Server exiting"), status=503, content_type=TEXT_TYPE)
_METHOD_NOT_ALLOWED = Reply(error_body("Method Not Allowed"), status=405)


class Dispatcher:
    """From an aiohttp request to its reply."""

    def __init__(self, context: ControlContext, routes: Sequence[Route] = ROUTES) -> None:
        self._context = context
        self._routes = routes
        self._restrictions = {
            api: (restricted.key, restricted.value)
            for restricted in context.settings.restricted_apis
            for api in restricted.apis
        }

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        reply = await self._answer(request)
        return web.Response(body=reply.body, status=reply.status, headers={hdrs.CONTENT_TYPE: reply.content_type})

    async def _answer(self, request: web.BaseRequest) -> Reply:
        path = request_path(request)
        log.verbose(1, f"HTTP request: {request.method} {path}")
        if self._context.is_exiting:
            return _EXITING
        for route in self._routes:
            match = route.pattern.fullmatch(path)
            if match is not None:
                return await self._run(route, match.groupdict(default=""), request)
        return _NOT_FOUND

    async def _run(self, route: Route, groups: dict[str, str], request: web.BaseRequest) -> Reply:
        """Check what Triton's handlers check first, in their order, then call the handler."""
        refusal = self._restriction(route.api, request)
        if refusal is not None:
            return refusal
        handler = route.methods.get(request.method)
        if handler is None:
            return replace(_METHOD_NOT_ALLOWED, content_type=route.error_type)
        try:
            body = await self._read_body(request) if request.method == hdrs.METH_POST else b""
            return await handler(self._context, Call(request.method, groups, body))
        except ServingError as error:
            return Reply(error_body(error.text), http_status(error), route.error_type)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.error(f"{request.method} {request_path(request)} failed:\n{traceback.format_exc()}")
            return Reply(error_body("internal error, see the server's log"), 500, route.error_type)

    def _restriction(self, api: str, request: web.BaseRequest) -> Reply | None:
        """Return the refusal if the API needs a header that the request lacks (spec H-010)."""
        restriction = self._restrictions.get(api)
        if restriction is None or request.headers.get(restriction[0]) == restriction[1]:
            return None
        text = f"This API is restricted, expecting header '{restriction[0]}'"
        return Reply(error_body(text), status=403, content_type=TEXT_TYPE)

    async def _read_body(self, request: web.BaseRequest) -> bytes:
        """Read the body, however it is framed, but no more of it than ``--http-max-input-size``.

        Raises:
            InvalidArgument: it is larger (spec H-013). This holds for loads with files too: their base64 text is
                buffered here, so the flag is what bounds this process's memory.
        """
        limit = self._context.settings.max_input_size
        if request.content_length is not None and request.content_length > limit:
            raise _too_large(request.content_length, limit)
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # else aiohttp believes that the reply has begun
        body = bytearray()
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > limit:
                raise _too_large(len(body), limit)
        return bytes(body)


def request_path(request: web.BaseRequest) -> str:
    """Return the path exactly as sent, percent escapes and all, without query (spec H-008).

    Bytes that are not UTF-8 become U+FFFD, so that the path may travel in JSON and MessagePack.
    """
    target = request.raw_path
    if not target.startswith("/"):
        # The absolute form, which proxies send: http://host/path
        _, _, rest = target.partition("://")
        _, slash, path = rest.partition("/")
        target = slash + path
    path = target.partition("?")[0]
    return path if path.isascii() else path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _too_large(size: int, limit: int) -> InvalidArgument:
    return InvalidArgument(
        f"request JSON size of {size} bytes exceeds the maximum allowed input size of {limit} bytes. "
        "Use --http-max-input-size to increase the limit."
    )


#: The server of these endpoints, and one client's connection to it; a fast path may derive from the latter.
ControlServer = PlainServer
ControlConnection = PlainConnection


def build_server(context: ControlContext, routes: Sequence[Route] = ROUTES) -> ControlServer:
    """Return the server of all endpoints besides inference, for the running event loop.

    Call it to get a protocol per connection; end it with ``pre_shutdown()`` and ``await shutdown(timeout)``.
    """
    return ControlServer(Dispatcher(context, routes))
