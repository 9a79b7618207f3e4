"""Routing, restrictions, body limits and error bodies of everything that is not inference; real sockets."""

from __future__ import annotations

import asyncio

import pytest
from fake_frontend import ask, entry, make_context, serving

from forebay.frontend.handlers.context import ControlSettings, RestrictedApi

NOT_FOUND = (404, "text/plain", b'{"error":"Not Found"}')


@pytest.mark.parametrize(
    "path",
    [
        "/v2/",
        "/",
        "/v2/models/",
        "/v2/models/f32/",
        "/v2/models/f32/versions/a",
        "/v2/models/f32/versions/1/trace/setting",
        "/v2/models/f32/infer/",
        "/v2/health",
        "/v2/repository/models/f32",
        "/v2x",
        "/metrics",
    ],
)
def test_unknown_paths_are_not_found(path: str) -> None:
    """Spec H-005, H-007, H-260, E-002."""
    assert ask(make_context(entry("f32")), "GET", path).triple == NOT_FOUND


@pytest.mark.parametrize(
    ("method", "path", "content_type"),
    [
        ("GET", "/v2/models/f32/infer", "text/plain"),  # E-049
        ("GET", "/v2/repository/index", "application/json"),  # E-097
        ("POST", "/v2/health/live", "text/plain"),
        ("POST", "/v2/models/f32/ready", "text/plain"),
        ("POST", "/v2", "application/json"),
        ("DELETE", "/v2/logging", "application/json"),
        ("GET", "/v2/systemsharedmemory/region/r/register", "application/json"),
        ("POST", "/v2/cudasharedmemory/status", "application/json"),
        ("PUT", "/v2/trace/setting", "application/json"),
        ("PATCH", "/v2/models/f32", "application/json"),
    ],
)
def test_wrong_method_is_405(method: str, path: str, content_type: str) -> None:
    """Spec H-004."""
    context = make_context(entry("f32"))
    assert ask(context, method, path).triple == (405, content_type, b'{"error":"Method Not Allowed"}')


def test_paths_are_raw_and_queries_are_ignored() -> None:
    """Spec H-008: percent escapes stay, a query changes nothing; the absolute form names the same path."""
    context = make_context(entry("my%20model"))
    assert ask(context, "GET", "/v2/models/my%20model/ready?a=b/c").status == 200
    assert ask(context, "GET", "/v2/models/my+model/ready").status == 400
    assert ask(context, "GET", "http://elsewhere/v2/health/live").status == 200


def test_bytes_that_are_no_utf8_in_a_path_are_answered() -> None:
    answer = ask(make_context(), "GET", "/v2/models/a\udcffb")
    assert answer.status in (400, 404)
    assert answer.body.startswith(b'{"error":"')


def test_replies_name_no_server_software() -> None:
    headers = ask(make_context(), "GET", "/v2/health/live").headers
    assert "server" not in headers


def test_errors_keep_the_connection() -> None:
    """Spec H-017."""

    async def run() -> list[int]:
        async with serving(make_context(entry("f32"))) as client:
            return [
                (await client.ask("GET", path)).status
                for path in ("/nope", "/v2/models/nope", "/v2/models/f32", "/v2/health/live")
            ]

    assert asyncio.run(run()) == [404, 404, 200, 200]


def test_pipelined_requests_are_answered_in_order() -> None:
    """Spec H-017."""

    async def run() -> list[int]:
        async with serving(make_context()) as client:
            await client.send(
                b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\n\r\nGET /x HTTP/1.1\r\nHost: t\r\n\r\n"
                b"POST /v2 HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n"
            )
            return [(await client.receive()).status for _ in range(3)]

    assert asyncio.run(run()) == [200, 404, 405]


def test_restricted_api_needs_its_header() -> None:
    """Spec H-010, E-015: the name is case-insensitive, the value exact; the method is checked after it."""
    restricted = (RestrictedApi(apis=("logging", "health"), key="lk", value="lv"),)
    context = make_context(entry("f32"), replies={"log_get": {}}, settings=ControlSettings(restricted_apis=restricted))
    refused = (403, "text/plain", b'{"error":"This API is restricted, expecting header \'lk\'"}')
    assert ask(context, "GET", "/v2/logging").triple == refused
    assert ask(context, "GET", "/v2/logging", lk="LV").triple == refused
    assert ask(context, "PUT", "/v2/logging").triple == refused
    assert ask(context, "GET", "/v2/models/f32/ready").triple == refused
    assert ask(context, "GET", "/v2/logging", LK="lv").status == 200
    assert ask(context, "GET", "/v2/models/f32").status == 200


def test_exiting_server_answers_503() -> None:
    """Spec H-009."""
    context = make_context()
    context.is_exiting = True
    assert ask(context, "GET", "/v2/health/live").triple == (503, "text/plain", b'{"error":"Server exiting"}')


def test_a_body_above_the_limit_names_the_flag() -> None:
    """Spec H-013; a lying or absent Content-Length changes nothing."""
    context = make_context(replies={"index": []}, settings=ControlSettings(max_input_size=10))
    answer = ask(context, "POST", "/v2/repository/index", b" " * 11)
    assert answer.status == 400
    assert answer.body == (
        b'{"error":"request JSON size of 11 bytes exceeds the maximum allowed input size of 10 bytes. '
        b'Use --http-max-input-size to increase the limit."}'
    )

    async def chunked(size: int) -> int:
        async with serving(context) as client:
            await client.send(b"POST /v2/repository/index HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            await client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"{}".ljust(size)))
            return (await client.receive()).status

    assert asyncio.run(chunked(10)) == 200
    assert asyncio.run(chunked(11)) == 400


def test_expect_100_continue_is_answered_before_the_body() -> None:
    async def run() -> tuple[bytes, int]:
        async with serving(make_context(replies={"index": []})) as client:
            await client.send(
                b"POST /v2/repository/index HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
            )
            interim = await client.reader.readuntil(b"\r\n\r\n")
            await client.send(b"{}")
            return interim, (await client.receive()).status

    assert asyncio.run(run()) == (b"HTTP/1.1 100 Continue\r\n\r\n", 200)


def test_garbage_gets_our_error_body_and_the_connection_closes() -> None:
    async def run() -> tuple[int, str, bytes, bytes]:
        async with serving(make_context()) as client:
            await client.send(b"\x16\x03\x01 garbage\r\n\r\n")
            answer = await client.receive()
            return answer.status, answer.headers["content-type"], answer.body, await client.reader.read()

    status, content_type, body, rest = asyncio.run(run())
    assert (status, content_type.split(";")[0], rest) == (400, "application/json", b"")
    assert body.startswith(b'{"error":"invalid HTTP request: ')


def test_unexpected_exceptions_tell_the_client_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    context = make_context(replies={"log_get": RuntimeError("secret /path")})
    answer = ask(context, "GET", "/v2/logging")
    assert answer.triple == (500, "application/json", b'{"error":"internal error, see the server\'s log"}')
    assert "secret /path" in capfd.readouterr().err


def test_inference_requests_are_the_protocols_in_front() -> None:
    assert ask(make_context(entry("f32")), "POST", "/v2/models/f32/infer", b"{}").status == 501
