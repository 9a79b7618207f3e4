"""Errors as HTTP shows them: the one table of statuses, and the body (spec 00, H-001, H-002). Frontend processes."""

from __future__ import annotations

from forebay.frontend.codec.rapid_json import quote
from forebay.ipc.errors import Code, ServingError

#: HTTP status of each code; `HttpCodeFromError` in Triton's http_server.cc.
HTTP_STATUS: dict[Code, int] = {
    Code.UNKNOWN: 400,
    Code.INTERNAL: 500,
    Code.NOT_FOUND: 404,
    Code.INVALID_ARG: 400,
    Code.UNAVAILABLE: 503,
    Code.UNSUPPORTED: 501,
    Code.ALREADY_EXISTS: 400,
    Code.CANCELLED: 400,
}


def http_status(error: BaseException) -> int:
    """Return the status for an error; what is no `ServingError` is a fault of ours: 500."""
    return HTTP_STATUS[error.code] if isinstance(error, ServingError) else 500


def error_body(text: str) -> bytes:
    """Return ``{"error":"<text>"}``, newlines escaped, non-ASCII raw."""
    return b'{"error":%s}' % quote(text)
