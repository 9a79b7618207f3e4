"""Request heads: parsed strictly once, then recognised by their exact bytes.

Clients repeat themselves: the header block of one call equals that of the next, byte for byte. :class:`HeadCache` keeps
what a block means, keyed by the block itself, so the cache can never accept what the strict parser (llhttp) would not.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import httptools

from forebay.frontend.codec.header_forward import reserved_name_error
from forebay.frontend.codec.infer_request import Parameter

#: Bytes of a header block at most; longer ones are refused with 431.
HEAD_BYTES_MAX = 32 * 1024
#: Blocks longer than this are parsed every time.
_CACHED_BYTES_MAX = 4096
#: Blocks kept; at the limit all are dropped.
_CACHED_COUNT_MAX = 4096

#: What 431 says.
TOO_LARGE = f"request header is larger than {HEAD_BYTES_MAX} bytes"

_INFER_PATH = re.compile(
    r"(?:[hH][tT][tT][pP][sS]?://[^/?]*)?"  # the absolute form, which proxies send
    r"/v2/models/([^/?]+)(?:/versions/([0-9]+))?/(infer|generate|generate_stream)(?:\?.*)?"
)
_PROTOCOL = re.compile(rb" HTTP/([0-9]+)(?:\.[0-9]+)?\r\n")

#: What a reply says about the connection, where it is not what HTTP/1.1 takes for granted.
CLOSE_LINE = b"Connection: close\r\n"
_KEEP_ALIVE_LINE = b"Connection: keep-alive\r\n"


class HeadError(Exception):
    """The bytes are no HTTP request that we accept; the connection is answered and closed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Target(enum.Enum):
    """Who answers a request."""

    INFER = "infer"
    GENERATE = "generate"
    GENERATE_STREAM = "generate_stream"
    OTHER = "other"
    """Everything else: aiohttp."""


class Head:
    """What a header block means."""

    __slots__ = (
        "accept_encoding",
        "binary_type",
        "connection_line",
        "content_encoding",
        "content_length",
        "expects_continue",
        "forwarded",
        "header_length",
        "is_chunked",
        "is_exclusive",
        "is_http_1_0",
        "is_plain",
        "is_upgrade",
        "json_bytes",
        "keep_alive",
        "model",
        "plans",
        "raw",
        "target",
        "trace_context",
        "version",
    )

    def __init__(self, raw: bytes) -> None:
        #: The block, blank line included.
        self.raw = raw
        self.target = Target.OTHER
        self.model = ""
        #: Version in the path; None: the latest.
        self.version: int | None = None
        self.keep_alive = True
        #: Header line about it that the reply needs; empty for HTTP/1.1 connections that stay open.
        self.connection_line = b""
        self.is_http_1_0 = False
        #: The client offers another protocol, which we do not take: the request is served as it is (RFC 9110, 7.8).
        self.is_upgrade = False
        self.is_chunked = False
        #: Bytes of the body; 0 if there is none or it is chunked.
        self.content_length = 0
        self.expects_continue = False
        #: ``Inference-Header-Content-Length`` as sent, or None.
        self.header_length: str | None = None
        self.content_encoding: str | None = None
        self.accept_encoding: str | None = None
        #: Content type of a reply with binary tensors, up to the bytes of its JSON, where it is not Triton's (H-300).
        self.binary_type = ""
        #: Headers that become request parameters (spec H-158).
        self.forwarded: dict[str, Parameter] = {}
        #: Taken only when nothing else of the connection is in flight: aiohttp writes to the transport by itself, a
        #: stream has no end to wait for, and an interim reply must not stand between two others.
        self.is_exclusive = True
        #: True for an inference request without chunks, compression, expectation or forwarded headers.
        self.is_plain = False
        #: Bytes of the JSON at the start of the body, for a plain request with a sane header length; else -1. 0: raw.
        self.json_bytes = -1
        #: W3C ``traceparent``, for tracing (spec O-024).
        self.trace_context = ""
        #: JSON of earlier requests with this head, to what is to be done for it (see ``fast_path``).
        self.plans: dict[bytes, object] = {}


class _Parser:
    """Collects what llhttp finds in one header block."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False
        self.keep_alive = False
        self.parser = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.is_complete = True
        # Not known any more once the parser has seen the end of a request without a body.
        self.keep_alive = self.parser.should_keep_alive()


class HeadParser:
    """Parses and remembers header blocks for one frontend."""

    def __init__(self, forward_pattern: str = "", restricted: Sequence[tuple[str, str]] = ()) -> None:
        """
        Args:
            forward_pattern: ``--http-header-forward-pattern``.
            restricted: (header, value) that inference requests need, if that API is restricted (spec H-010).
        """
        self._forward = re.compile(forward_pattern, re.IGNORECASE) if forward_pattern else None
        self._restricted = [(name.lower(), value) for name, value in restricted]
        self._cache: dict[bytes, Head] = {}

    def clear(self) -> None:
        """Forget everything; the plans in it name models that may have changed."""
        self._cache.clear()

    def parse(self, raw: bytes) -> Head:
        """Return what a header block (blank line included) means.

        Raises:
            HeadError: it is malformed, or of a protocol version that we do not speak.
            InvalidArgument: a header that would be forwarded has a reserved name.
        """
        head = self._cache.get(raw)
        if head is None:
            head = self._parse(raw)
            if len(raw) <= _CACHED_BYTES_MAX:
                if len(self._cache) >= _CACHED_COUNT_MAX:
                    self._cache.clear()
                self._cache[raw] = head
        return head

    def _parse(self, raw: bytes) -> Head:
        protocol = _PROTOCOL.search(raw)
        if protocol is not None and protocol[1] != b"1":
            raise HeadError(505, "HTTP version not supported")
        found = _Parser()
        parser = found.parser
        head = Head(raw)
        try:
            parser.feed_data(raw)
        except httptools.HttpParserUpgrade:
            head.is_upgrade = True
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            raise HeadError(400, f"invalid HTTP request: {error}") from None
        if not found.is_complete or parser.get_method() == b"CONNECT":
            raise HeadError(400, "invalid HTTP request: incomplete header")
        head.is_http_1_0 = parser.get_http_version() == "1.0"
        head.keep_alive = found.keep_alive
        if not head.keep_alive:
            head.connection_line = CLOSE_LINE
        elif head.is_http_1_0:
            head.connection_line = _KEEP_ALIVE_LINE
        unmet = dict(self._restricted)
        for name_bytes, value_bytes in found.headers:
            self._read_header(head, name_bytes.decode("latin-1"), value_bytes.decode("latin-1"), unmet)
        if head.is_chunked:
            head.content_length = 0
        if parser.get_method() == b"POST":
            match = _INFER_PATH.fullmatch(found.url.decode("latin-1"))
            if match is not None and not unmet:
                head.target = Target(match[3])
                head.model = match[1]
                head.version = int(match[2]) if match[2] else None
        self._judge(head)
        return head

    def _read_header(self, head: Head, name: str, value: str, unmet: dict[str, str]) -> None:
        lowered = name.lower()
        if lowered == "content-length":
            head.content_length = int(value)  # llhttp has refused anything but one decimal number
        elif lowered == "transfer-encoding":
            if value.strip().lower() != "chunked":
                raise HeadError(501, "only the transfer encoding 'chunked' is supported")
            if head.is_http_1_0:
                raise HeadError(400, "invalid HTTP request: HTTP/1.0 has no transfer encodings")
            head.is_chunked = True
        elif lowered == "inference-header-content-length":
            head.header_length = value
        elif lowered == "content-encoding":
            head.content_encoding = value
        elif lowered == "accept-encoding":
            head.accept_encoding = value
        elif lowered == "traceparent":
            head.trace_context = value
        elif lowered == "expect":
            if value.strip().lower() != "100-continue":
                raise HeadError(417, "Expectation Failed")
            # HTTP/1.0 knows no interim replies; its clients do not wait for one (RFC 9110, 10.1.1).
            head.expects_continue = not head.is_http_1_0
        if unmet.get(lowered) == value:
            del unmet[lowered]
        if self._forward is not None and self._forward.search(name):
            if (error := reserved_name_error(name)) is not None:
                raise error
            head.forwarded[name] = value.encode("latin-1").decode("utf-8", "replace")

    @staticmethod
    def _judge(head: Head) -> None:
        head.is_exclusive = head.expects_continue or head.target in (Target.OTHER, Target.GENERATE_STREAM)
        if head.target is not Target.INFER or head.is_chunked or head.expects_continue or head.forwarded:
            return
        if head.content_encoding not in (None, "", "identity"):
            return
        if head.accept_encoding is not None and _may_compress(head.accept_encoding):
            return
        head.is_plain = True
        length = head.header_length
        if (
            length is not None
            and length.isascii()
            and length.isdigit()
            and len(length) < 19
            and int(length) <= head.content_length
        ):
            head.json_bytes = int(length)


def check_beginning(first_byte: int, count: int) -> None:
    """Refuse bytes without the end of a header block that cannot become one.

    Raises:
        HeadError: they are too many, or no method begins so (a TLS client, for example).
    """
    if not 65 <= first_byte <= 90 and not 97 <= first_byte <= 122:
        raise HeadError(400, "invalid HTTP request: this port speaks HTTP/1.1 without TLS")
    if count > HEAD_BYTES_MAX:
        raise HeadError(431, TOO_LARGE)


def _may_compress(accept_encoding: str) -> bool:
    lowered = accept_encoding.lower()
    return "gzip" in lowered or "deflate" in lowered or "*" in lowered
