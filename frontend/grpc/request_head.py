"""What the header of a call says: the method, the deadline, compression, metadata (gRPC over HTTP/2, "Requests").

Made once for each different header block of a connection, so everything that depends on the header alone is settled
here: whether the protocol is restricted, which metadata become parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from forebay.frontend.codec.header_forward import reserved_name_error
from forebay.frontend.grpc.http2.hpack_decoder import Field
from forebay.frontend.grpc.status import RpcError, Status
from forebay.ipc.errors import InvalidArgument

#: Compressions that we read and write.
ENCODINGS = ("identity", "gzip", "deflate")

#: ``<digits><unit>``; nanoseconds per unit.
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_NS = {
    "H": 3_600_000_000_000,
    "M": 60_000_000_000,
    "S": 1_000_000_000,
    "m": 1_000_000,
    "u": 1_000,
    "n": 1,
}
#: A deadline so far away, 146 years, is none; clients say "never" like that, and messages carry 64 bits.
_FOREVER_NS = 2**62

#: Characters of a header name (RFC 9113, 8.2.1): no upper case, no control characters, a colon only in front.
_NAME = re.compile(rb":?[!#$%&'*+.^_`|~0-9a-z-]+")
#: Fields that belong to one connection and may not be sent (RFC 9113, 8.2.2).
_CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority"})


class RequestHead(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The header of a call."""

    path: str = ""
    """``/package.Service/Method``."""
    timeout_ns: int = 0
    """How long the client waits; 0: for ever."""
    encoding: str = "identity"
    """How messages with the compressed flag are compressed."""
    accepts: tuple[str, ...] = ()
    """Compressions that the client reads."""
    forwarded: Mapping[str, str] = {}
    """Metadata that become request parameters (spec G-056)."""
    trace_context: str = ""
    """W3C ``traceparent`` (spec O-024)."""
    wants_grpc_errors: bool = False
    """``triton_grpc_error: true`` (spec G-067)."""
    error: RpcError | InvalidArgument | None = None
    """Why the call is refused, whatever it carries."""
    content_length: int = -1
    """Bytes that the client says it will send; -1: it does not say."""
    http_status: int = 200
    """Not 200: this is no gRPC request."""
    is_malformed: bool = False
    """It breaks HTTP/2's own rules: the stream is reset."""
    is_trailers: bool = False
    """It could stand behind a request's data, and only there."""


class HeadReader:
    """Makes heads; one per frontend process."""

    def __init__(self, forward_pattern: str, restrictions: Mapping[str, tuple[str, str]]) -> None:
        """Take the settings.

        Args:
            forward_pattern: ``--grpc-header-forward-pattern``; empty: forward nothing.
            restrictions: path to the metadata key and value that its calls need (spec G-080).

        Raises:
            InvalidArgument: the pattern is no regular expression; for the operator, at start-up.
        """
        try:
            self._pattern = re.compile(forward_pattern, re.IGNORECASE) if forward_pattern else None
        except re.error as error:
            raise InvalidArgument(f"invalid header forward pattern '{forward_pattern}': {error}") from None
        self._restrictions = restrictions

    def read(self, fields: Sequence[Field]) -> RequestHead:
        """Return the head for decoded fields; never raises."""
        pseudo: dict[bytes, bytes] = {}
        values: dict[bytes, bytes] = {}
        for name, value in fields:
            if name.startswith(b":"):
                if values or name in pseudo or name not in _PSEUDO:
                    return RequestHead(is_malformed=True)
                pseudo[name] = value
                continue
            if _NAME.fullmatch(name) is None or name in _CONNECTION_FIELDS or not _is_plain(value):
                return RequestHead(is_malformed=True)
            # Of repeated metadata Triton looks at the first; what is forwarded is the last.
            values.setdefault(name, value)
        if not pseudo:
            return RequestHead(is_malformed=True, is_trailers=True)
        if not (b":method" in pseudo and b":scheme" in pseudo and pseudo.get(b":path")):
            return RequestHead(is_malformed=True)
        if values.get(b"te", b"trailers") != b"trailers":
            return RequestHead(is_malformed=True)
        if pseudo[b":method"] != b"POST":
            return RequestHead(http_status=405)
        if not values.get(b"content-type", b"").startswith(b"application/grpc"):
            return RequestHead(http_status=415)
        return self._read(pseudo[b":path"].decode("latin-1"), values, fields)

    def _read(self, path: str, values: Mapping[bytes, bytes], fields: Sequence[Field]) -> RequestHead:
        error: RpcError | InvalidArgument | None = None
        timeout_ns = 0
        if (timeout := values.get(b"grpc-timeout")) is not None:
            match = _TIMEOUT.fullmatch(timeout.decode("latin-1"))
            if match is None:
                error = RpcError(Status.INTERNAL, "invalid grpc-timeout value")
            else:
                timeout_ns = max(int(match.group(1)) * _UNIT_NS[match.group(2)], 1)
                if timeout_ns >= _FOREVER_NS:
                    timeout_ns = 0
        length = values.get(b"content-length", b"")
        encoding = values.get(b"grpc-encoding", b"identity").decode("latin-1")
        if encoding not in ENCODINGS:
            error = RpcError(Status.UNIMPLEMENTED, f'Compression algorithm "{encoding[:64]}" is unknown')
        accepts = tuple(
            name
            for key, value in fields
            if key == b"grpc-accept-encoding"
            for item in value.decode("latin-1").split(",")
            if (name := item.strip()) in ENCODINGS
        )
        restriction = self._restrictions.get(path)
        if restriction is not None and values.get(restriction[0].encode()) != restriction[1].encode():
            error = RpcError(Status.UNAVAILABLE, f"This protocol is restricted, expecting header '{restriction[0]}'")
        forwarded: dict[str, str] = {}
        if self._pattern is not None and error is None:
            forwarded = {
                name.decode("latin-1"): value.decode("utf-8", "replace")
                for name, value in fields
                if not name.startswith(b":") and self._pattern.search(name.decode("latin-1"))
            }
            for name in forwarded:
                error = reserved_name_error(name) or error
        return RequestHead(
            path=path,
            timeout_ns=timeout_ns,
            content_length=int(length) if length.isdigit() and len(length) < 19 else -1,
            encoding=encoding,
            accepts=accepts,
            forwarded=forwarded,
            trace_context=values.get(b"traceparent", b"").decode("latin-1"),
            wants_grpc_errors=values.get(b"triton_grpc_error") == b"true",
            error=error,
        )


def _is_plain(value: bytes) -> bool:
    """Return whether a field's value may be sent (RFC 9113, 8.2.1)."""
    return not (b"\0" in value or b"\r" in value or b"\n" in value)
