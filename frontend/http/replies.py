"""HTTP reply heads of inference requests, as bytes."""

from __future__ import annotations

import http
from collections.abc import Sequence

from forebay.frontend.codec.compression import compress, response_encoding
from forebay.frontend.codec.infer_response import JSON_TYPE, RenderedReply
from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.errors import error_body, http_status
from forebay.ipc.errors import ServingError

TEXT_TYPE = "text/plain"


def head_bytes(status: int, content_type: str, length: int, extra: bytes = b"", *, close: bool = False) -> bytes:
    """Return status line and headers."""
    phrase = http.HTTPStatus(status).phrase
    ending = b"Connection: close\r\n\r\n" if close else b"\r\n"
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n%sContent-Length: %d\r\n%s" % (
        status,
        phrase.encode(),
        content_type.encode(),
        extra,
        length,
        ending,
    )


def error_reply(error: ServingError, content_type: str = JSON_TYPE, *, close: bool = False) -> bytes:
    """Return a complete error reply."""
    return text_reply(http_status(error), error.text, content_type, close=close, unsupported=error)


def text_reply(
    status: int,
    text: str,
    content_type: str = JSON_TYPE,
    *,
    close: bool = False,
    unsupported: ServingError | None = None,
) -> bytes:
    """Return a complete error reply with a status of its own."""
    body = error_body(text)
    extra = b""
    if unsupported is not None and text == "Unsupported compression type":
        extra = b"Accept-Encoding: gzip, deflate\r\n"  # spec H-140
    return head_bytes(status, content_type, len(body), extra, close=close) + body


def infer_reply(reply: RenderedReply, accept_encoding: str | None, *, close: bool = False) -> list[Buffer]:
    """Return the buffers of a successful reply; uncompressed tensors stay where they are (I-1)."""
    extra = b""
    if reply.header_length is not None:
        extra = b"Inference-Header-Content-Length: %d\r\n" % reply.header_length
    encoding = response_encoding(accept_encoding)
    if encoding in ("gzip", "deflate"):
        body = compress(reply.buffers, encoding)
        extra += b"Content-Encoding: %s\r\n" % encoding.encode()
        return [head_bytes(200, reply.content_type, len(body), extra, close=close), body]
    buffers: Sequence[Buffer] = reply.buffers
    return [head_bytes(200, reply.content_type, reply.body_bytes, extra, close=close), *buffers]
