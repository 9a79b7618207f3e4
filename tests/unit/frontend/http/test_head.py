"""Request heads: what is accepted, what it means, and that what is remembered was parsed strictly."""

from __future__ import annotations

import pytest

from forebay.frontend.http.head import HEAD_BYTES_MAX, HeadError, HeadParser, Target, check_beginning
from forebay.ipc.errors import InvalidArgument

INFER = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\n"


def parse(*lines: bytes, first: bytes = INFER, parser: HeadParser | None = None):
    return (parser or HeadParser()).parse(first + b"".join(line + b"\r\n" for line in lines) + b"\r\n")


@pytest.mark.parametrize(
    ("path", "target", "model", "version"),
    [
        (b"/v2/models/m/infer", Target.INFER, "m", None),
        (b"/v2/models/m/versions/12/infer", Target.INFER, "m", 12),
        (b"/v2/models/my%20model/infer?x=1", Target.INFER, "my%20model", None),
        (b"http://host:8000/v2/models/m/infer", Target.INFER, "m", None),
        (b"/v2/models/m/generate", Target.GENERATE, "m", None),
        (b"/v2/models/m/versions/3/generate_stream", Target.GENERATE_STREAM, "m", 3),
        (b"/v2/models/m/infer/", Target.OTHER, "", None),
        (b"/v2/models/m/versions/a/infer", Target.OTHER, "", None),
        (b"/v2/models/a/b/infer", Target.OTHER, "", None),
        (b"/V2/models/m/infer", Target.OTHER, "", None),
        (b"/v2/models/m/INFER", Target.OTHER, "", None),
        (b"/v2", Target.OTHER, "", None),
    ],
)
def test_who_answers(path: bytes, target: Target, model: str, version: int | None) -> None:
    """H-007, H-008: paths stay raw."""
    head = parse(first=b"POST %s HTTP/1.1\r\nHost: a\r\n" % path)
    assert (head.target, head.model, head.version) == (target, model, version)


def test_other_methods_are_answered_elsewhere() -> None:
    assert parse(first=b"GET /v2/models/m/infer HTTP/1.1\r\n").target is Target.OTHER


def test_restricted_inference_without_its_header_is_answered_elsewhere() -> None:
    """H-010: the refusal is that of all other APIs. The name's case does not count, the value's does."""
    parser = HeadParser("", [("Key", "Value")])
    assert parse(parser=parser).target is Target.OTHER
    assert parse(b"key: value", parser=parser).target is Target.OTHER
    assert parse(b"kEy: Value", parser=parser).target is Target.INFER


@pytest.mark.parametrize(
    ("lines", "json_bytes"),
    [
        ((b"Inference-Header-Content-Length: 7", b"Content-Length: 9"), 7),
        ((b"Inference-Header-Content-Length: 0", b"Content-Length: 9"), 0),
        ((b"Inference-Header-Content-Length: 10", b"Content-Length: 9"), -1),
        ((b"Inference-Header-Content-Length: -1", b"Content-Length: 9"), -1),
        ((b"Inference-Header-Content-Length: 1e1", b"Content-Length: 99"), -1),
        ((b"Content-Length: 9",), -1),
    ],
)
def test_json_bytes_of_a_plain_request(lines: tuple[bytes, ...], json_bytes: int) -> None:
    head = parse(*lines)
    assert (head.is_plain, head.json_bytes) == (True, json_bytes)


@pytest.mark.parametrize(
    "line",
    [
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Content-Encoding: gzip",
        b"Content-Encoding: br",
        b"Accept-Encoding: gzip, deflate",
        b"Accept-Encoding: *",
    ],
)
def test_what_makes_a_request_no_plain_one(line: bytes) -> None:
    assert not parse(line).is_plain


def test_identity_encodings_are_plain() -> None:
    assert parse(b"Content-Encoding: identity", b"Accept-Encoding: identity").is_plain


def test_forwarded_headers() -> None:
    """H-158, H-159."""
    parser = HeadParser("X-Fwd.*|priority")
    head = parse(b"x-fwd-User: me", b"Y: no", parser=parser)
    assert (head.forwarded, head.is_plain) == ({"x-fwd-User": "me"}, False)
    with pytest.raises(InvalidArgument, match="Header 'Priority' is reserved for Triton usage and cannot be forwarded"):
        parse(b"Priority: 1", parser=parser)


@pytest.mark.parametrize(
    ("first", "lines", "keep_alive", "connection_line"),
    [
        (INFER, (), True, b""),
        (INFER, (b"Connection: keep-alive",), True, b""),
        (INFER, (b"Connection: close",), False, b"Connection: close\r\n"),
        (INFER, (b"Connection: close", b"Content-Length: 5"), False, b"Connection: close\r\n"),
        (INFER.replace(b"1.1", b"1.0"), (), False, b"Connection: close\r\n"),
        (INFER.replace(b"1.1", b"1.0"), (b"Connection: keep-alive",), True, b"Connection: keep-alive\r\n"),
    ],
)
def test_what_is_said_about_the_connection(
    first: bytes, lines: tuple[bytes, ...], keep_alive: bool, connection_line: bytes
) -> None:
    head = parse(*lines, first=first)
    assert (head.keep_alive, head.connection_line) == (keep_alive, connection_line)


def test_requests_that_must_be_alone() -> None:
    assert not parse().is_exclusive
    assert not parse(first=INFER.replace(b"infer", b"generate")).is_exclusive
    assert parse(first=INFER.replace(b"infer", b"generate_stream")).is_exclusive
    assert parse(b"Expect: 100-continue").is_exclusive
    assert parse(first=b"GET /v2 HTTP/1.1\r\n").is_exclusive


def test_http_1_0_expects_nothing() -> None:
    assert not parse(b"Expect: 100-continue", first=INFER.replace(b"1.1", b"1.0")).expects_continue


def test_an_offered_upgrade_is_declined() -> None:
    head = parse(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 4")
    assert (head.is_upgrade, head.content_length, head.keep_alive) == (True, 4, True)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\n\r\n", 505),
        (b"GET / HTTP/3\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\n\r\n", 400),
        (b"FETCH / HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 400),
        (INFER + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (INFER + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (INFER + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
        (INFER.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (INFER + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (INFER + b"Expect: 200-ok\r\n\r\n", 417),
    ],
)
def test_what_is_refused(raw: bytes, status: int) -> None:
    with pytest.raises(HeadError) as caught:
        HeadParser().parse(raw)
    assert caught.value.status == status


def test_equal_blocks_are_parsed_once_and_forgotten_with_the_models() -> None:
    parser = HeadParser()
    head = parse(parser=parser)
    assert parse(parser=parser) is head
    assert parse(b"X: 1", parser=parser) is not head
    parser.clear()
    assert parse(parser=parser) is not head


def test_memory_for_blocks_is_bounded() -> None:
    parser = HeadParser()
    long = parse(b"X: " + b"a" * 5_000, parser=parser)
    assert parse(b"X: " + b"a" * 5_000, parser=parser) is not long
    first = parse(parser=parser)
    for number in range(4_096):
        parse(b"X: %d" % number, parser=parser)
    assert parse(parser=parser) is not first


@pytest.mark.parametrize(
    ("byte", "count", "status"), [(0x16, 5, 400), (0, 1, 400), (ord("G"), HEAD_BYTES_MAX + 1, 431)]
)
def test_beginnings_that_cannot_become_a_head(byte: int, count: int, status: int) -> None:
    with pytest.raises(HeadError) as caught:
        check_beginning(byte, count)
    assert caught.value.status == status
    check_beginning(ord("P"), HEAD_BYTES_MAX)
