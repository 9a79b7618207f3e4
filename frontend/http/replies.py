"""HTTP reply heads of inference requests, as bytes."""

from __future__ import annotations

import http
from collections.abc import Sequence

from forebay.frontend.codec.compression import compress, response_encoding
from forebay.frontend.codec.infer_response import JSON_TYPE, RenderedReply
from forebay.frontend.codec.json_tensor import Buffer
from forebay.frontend.errors import error_body, http_status
from forebay.frontend.http.head import CLOSE_LINE
from forebay.ipc.errors import ServingError, Unsupported

__all__ = (
    "CLOSE_LINE",
    "TEXT_TYPE",
    "error_reply",
    "head_bytes",
    "infer_reply",
    "stream_head",
    "text_reply",
    "with_close_line",
)

TEXT_TYPE = "text/plain"

#: Buffers that one system call may write.
_IOV_MAX = 1024

_CHUNKED_LINE = b"Transfer-Encoding: chunked\r\n"


def _head(status: int, content_type: str, lines: bytes) -> bytes:
    phrase = http.HTTPStatus(status).phrase
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n%s\r\n" % (
        status,
        phrase.encode(),
        content_type.encode(),
        lines,
    )


def head_bytes(status: int, content_type: str, length: int, lines: bytes = b"") -> bytes:
    """Return status line and headers of a reply with a body of ``length`` bytes.

    Args:
        lines: further header lines, each with its CRLF.
    """
    return _head(status, content_type, b"%sContent-Length: %d\r\n" % (lines, length))


def stream_head(status: int, content_type: str, connection: bytes, *, is_chunked: bool) -> bytes:
    """Return status line and headers of a reply whose end is not known yet: chunks, or all that comes."""
    return _head(status, content_type, connection + (_CHUNKED_LINE if is_chunked else b""))


def error_reply(error: ServingError, content_type: str = JSON_TYPE, connection: bytes = b"") -> bytes:
    """Return a complete error reply.

    Args:
        connection: header line about the connection, or nothing.
    """
    extra = b""
    if isinstance(error, Unsupported) and error.text == "Unsupported compression type":
        extra = b"Accept-Encoding: gzip, deflate\r\n"  # spec H-140
    body = error_body(error.text)
    return head_bytes(http_status(error), content_type, len(body), extra + connection) + body


def text_reply(status: int, text: str, content_type: str = JSON_TYPE, connection: bytes = b"") -> bytes:
    """Return a complete error reply with a status of its own."""
    body = error_body(text)
    return head_bytes(status, content_type, len(body), connection) + body


def with_close_line(head: Buffer) -> Buffer:
    """Return a reply's first buffer with ``Connection: close``; what begins no reply (the end of a stream) as it is."""
    data = bytes(head)
    if not data.startswith(b"HTTP/1.1 "):
        return head
    lines, blank, body = data.partition(b"\r\n\r\n")
    return lines.replace(b"\r\nConnection: keep-alive", b"") + b"\r\n" + CLOSE_LINE + blank[2:] + body


def infer_reply(
    reply: RenderedReply, accept_encoding: str | None, connection: bytes = b"", binary_type: str = ""
) -> list[Buffer]:
    """Return the buffers of a successful reply; uncompressed tensors stay where they are (I-1).

    Args:
        binary_type: content type of a reply with binary tensors, which the bytes of its JSON complete; empty: Triton's.
    """
    extra, content_type = connection, reply.content_type
    if reply.header_length is not None and binary_type:
        content_type = f"{binary_type}{reply.header_length}"
    elif reply.header_length is not None:
        extra += b"Inference-Header-Content-Length: %d\r\n" % reply.header_length
    encoding = response_encoding(accept_encoding)
    if encoding in ("gzip", "deflate"):
        body = compress(reply.buffers, encoding)
        extra += b"Content-Encoding: %s\r\n" % encoding.encode()
        return [head_bytes(200, content_type, len(body), extra), body]
    buffers: Sequence[Buffer] = reply.buffers
    if len(buffers) >= _IOV_MAX:
        buffers = [b"".join(buffers)]
    return [head_bytes(200, content_type, reply.body_bytes, extra), *buffers]
