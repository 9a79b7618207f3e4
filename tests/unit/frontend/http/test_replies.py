"""Reply heads."""

from __future__ import annotations

import zlib

from forebay.frontend.codec.infer_response import RenderedReply
from forebay.frontend.http.head import CLOSE_LINE
from forebay.frontend.http.replies import error_reply, infer_reply, stream_head, text_reply
from forebay.ipc.errors import NotFound, Unsupported


def test_error() -> None:
    assert error_reply(NotFound("no 'x'")) == (
        b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n"
        + b'{"error":"no \'x\'"}'
    )
    assert b"\r\nConnection: close\r\n" in error_reply(NotFound("x"), "text/plain", CLOSE_LINE)
    assert text_reply(431, "x").startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")


def test_unknown_compression_names_the_known_ones() -> None:
    """H-140."""
    assert b"\r\nAccept-Encoding: gzip, deflate\r\n" in error_reply(Unsupported("Unsupported compression type"))
    assert b"Accept-Encoding" not in error_reply(Unsupported("x"))


def test_tensors_stay_where_they_are() -> None:
    """I-1, H-120."""
    tensor = memoryview(b"12345678")
    head, json, body = infer_reply(RenderedReply((b"{}", tensor), 2, "application/octet-stream"), None, CLOSE_LINE)
    assert body is tensor
    assert json == b"{}"
    assert bytes(head) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n"
        b"Inference-Header-Content-Length: 2\r\nContent-Length: 10\r\n\r\n"
    )


def test_more_buffers_than_one_system_call_takes_are_joined() -> None:
    reply = RenderedReply((b"{}", *[b"1234"] * 3_000), 2, "application/octet-stream")
    head, body = infer_reply(reply, None)
    assert bytes(body) == b"{}" + b"1234" * 3_000
    assert b"Content-Length: 12002\r\n" in bytes(head)


def test_compressed() -> None:
    """H-142."""
    head, body = infer_reply(RenderedReply((b"{}",), None, "application/json"), "deflate;q=0.5, br")
    assert b"\r\nContent-Encoding: deflate\r\n" in bytes(head)
    assert zlib.decompress(body) == b"{}"


def test_head_of_a_stream() -> None:
    """H-277."""
    assert b"\r\nTransfer-Encoding: chunked\r\n" in stream_head(200, "text/event-stream", b"", is_chunked=True)
    assert b"\r\nConnection: close\r\n" in stream_head(200, "text/event-stream", CLOSE_LINE, is_chunked=False)
