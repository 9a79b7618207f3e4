"""Compressed bodies (spec H-140..H-143)."""

import gzip
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec.compression import compress, decompress, request_encoding, response_encoding
from forebay.ipc.errors import InvalidArgument, ServingError, Unsupported

BODY = b'{"inputs":[]}' * 10


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (None, BODY),
        ("identity", BODY),
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("gzip", zlib.compress(BODY)),
        ("gzip", gzip.compress(BODY, mtime=0) + gzip.compress(b"more", mtime=0)),
    ],
)
def test_request_bodies(header, body):
    """Spec H-140; gzip and zlib streams are told apart by themselves, as in Triton."""
    assert bytes(decompress(memoryview(body), request_encoding(header), max_bytes=len(BODY))) == BODY


@pytest.mark.parametrize("header", ["br", "GZIP", "", "gzip, deflate"])
def test_unknown_request_encodings(header):
    """Spec H-140."""
    with pytest.raises(Unsupported, match=r"^Unsupported compression type$"):
        request_encoding(header)


def test_bombs_are_bounded():
    """Spec H-143."""
    bomb = gzip.compress(bytes(5_000_000), mtime=0)
    with pytest.raises(InvalidArgument, match=r"maximum allowed input size of 1000 bytes\. Use --http-max-input-size"):
        decompress(bomb, "gzip", max_bytes=1000)


@pytest.mark.parametrize("body", [BODY, gzip.compress(BODY, mtime=0)[:-12], gzip.compress(BODY, mtime=0)[:5]])
def test_broken_streams_are_refused(body):
    with pytest.raises(InvalidArgument, match=r"^unable to decompress request body: "):
        decompress(body, "gzip", max_bytes=1000)


def test_no_body_is_not_compressed():
    with pytest.raises(InvalidArgument, match=r"^nothing to be decompressed$"):
        decompress(b"", "deflate", max_bytes=1000)


@given(st.binary(max_size=60), st.sampled_from([b"", b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"\x78\x9c"]))
def test_any_stream_is_read_or_refused(tail, head):
    with suppress(ServingError):
        assert len(decompress(head + tail, "deflate", max_bytes=50)) <= 50


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        (None, "identity"),
        ("", "identity"),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate,gzip", "deflate"),
        ("gzip;q=0.5, deflate;q=0.6", "deflate"),
        ("identity;q=0.5, gzip", "gzip"),
        ("identity, gzip;q=0.9", "identity"),
        ("gzip;q=0", "identity"),
        ("gzip;q=x", "identity"),
        ("gzip;q=1.0;x", "gzip"),
        ("gzip ;q=1", "identity"),
        ("GZIP", "identity"),
        ("br", "identity"),
        ("*", "identity"),
        (";q=1", "identity"),
    ],
)
def test_reply_encoding_is_negotiated(header, encoding):
    """Spec H-142; each line was asked of a running server."""
    assert response_encoding(header) == encoding


@pytest.mark.parametrize(("encoding", "restore"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_replies_are_compressed_as_a_whole(encoding, restore):
    assert restore(compress([BODY, memoryview(b"tail")], encoding)) == BODY + b"tail"
