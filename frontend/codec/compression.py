"""Compressed request bodies in, compressed replies out (spec H-140..H-145). HTTP frontend; pure.

`DataCompressor` and `CompressionTypeUsed` of Triton's server.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

from forebay.frontend.codec.json_tensor import Buffer
from forebay.ipc.errors import InvalidArgument, Unsupported

Encoding: TypeAlias = Literal["identity", "gzip", "deflate"]

#: Sent along with the error for an unknown ``Content-Encoding`` (spec H-140).
ACCEPTED_ENCODINGS = "gzip, deflate"

#: zlib's window bits: for reading, gzip and zlib streams told apart by their first bytes.
_READ_EITHER = 32 + zlib.MAX_WBITS
_ENCODINGS: dict[str, Encoding] = {"identity": "identity", "gzip": "gzip", "deflate": "deflate"}
_WRITE = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

#: How the number behind ``;q=`` starts; what follows it is ignored, as std::stod does.
_WEIGHT = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")


def request_encoding(content_encoding: str | None) -> Encoding:
    """Return how a request body is encoded.

    Raises:
        Unsupported: anything but gzip, deflate and identity, spelled exactly so.
    """
    try:
        return "identity" if content_encoding is None else _ENCODINGS[content_encoding]
    except KeyError:
        raise Unsupported("Unsupported compression type") from None


def decompress(body: Buffer, encoding: Encoding, *, max_bytes: int) -> Buffer:
    """Return the decompressed body; of several gzip members the first.

    Memory stays below ``max_bytes`` plus one buffer, whatever the body claims to hold.

    Raises:
        InvalidArgument: there is no body, more than ``max_bytes`` come out (spec H-143), or the stream is broken or cut
            short.
    """
    if encoding == "identity":
        return body
    if not len(body):
        raise InvalidArgument("nothing to be decompressed")
    inflater = zlib.decompressobj(_READ_EITHER)
    try:
        content = inflater.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidArgument("unable to decompress request body: invalid data") from None
    if len(content) > max_bytes:
        raise InvalidArgument(
            f"decompressed request size exceeds the maximum allowed input size of {max_bytes} bytes. "
            "Use --http-max-input-size to increase the limit."
        )
    if not inflater.eof:
        raise InvalidArgument("unable to decompress request body: unexpected end of data")
    return content


def response_encoding(accept_encoding: str | None) -> Encoding:
    """Return how to encode a reply: the highest weight wins, of equal ones the first (spec H-142)."""
    chosen: Encoding = "identity"
    best = 0.0
    for item in (accept_encoding or "").split(","):
        name, separator, weight_text = item.lstrip(" ").partition(";q=")
        weight = 1.0
        if separator:
            number = _WEIGHT.match(weight_text)
            if number is None:
                continue
            weight = float(number.group(1))
        if weight > best and name in _ENCODINGS:
            chosen, best = _ENCODINGS[name], weight
    return chosen


def compress(buffers: Sequence[Buffer], encoding: Literal["gzip", "deflate"]) -> bytes:
    """Return the whole reply body in one compressed piece."""
    deflater = zlib.compressobj(wbits=_WRITE[encoding])
    parts = [deflater.compress(buffer) for buffer in buffers]
    parts.append(deflater.flush())
    return b"".join(parts)
