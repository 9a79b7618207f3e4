"""The chunked coding, fed in pieces of every size."""

from __future__ import annotations

import pytest

from forebay.frontend.http.chunks import CHUNKS_MAX, ChunkDecoder
from forebay.frontend.http.head import HeadError

CODED = b"5\r\nhello\r\n6;name=value\r\n world\r\n0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize("step", range(1, len(CODED) + 1))
def test_pieces_of_every_size(step: int) -> None:
    decoder = ChunkDecoder(100)
    used = 0
    for start in range(0, len(CODED), step):
        used += decoder.feed(memoryview(CODED[start : start + step]))
    assert (bytes(decoder.body), decoder.is_complete, used) == (b"hello world", True, len(CODED))


def test_what_follows_the_body_is_left_alone() -> None:
    decoder = ChunkDecoder(100)
    assert decoder.feed(memoryview(b"1\r\na\r\n0\r\n\r\nGET /")) == 11
    assert decoder.feed(memoryview(b"GET /")) == 0


@pytest.mark.parametrize(
    "coded",
    [
        b"\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"g\r\n",
        b"1\n",
        b"1\r\nabc\r\n",
        b"1\r\na\n",
        b"fffffffffffffffff\r\n",
        b"1;" + b"x" * 5_000,
        b"0\r\n" + b"a: b\r\n" * 5_000,
    ],
)
def test_malformed(coded: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        ChunkDecoder(100).feed(memoryview(coded))
    assert caught.value.status == 400


def test_sizes_are_bounded_before_the_bytes_come() -> None:
    decoder = ChunkDecoder(10)
    decoder.feed(memoryview(b"a\r\n0123456789\r\n"))
    with pytest.raises(HeadError) as caught:
        decoder.feed(memoryview(b"1\r\n"))
    assert caught.value.status == 413


def test_number_of_chunks_is_bounded() -> None:
    """H-012."""
    decoder = ChunkDecoder(1 << 20)
    decoder.feed(memoryview(b"1\r\na\r\n" * CHUNKS_MAX))
    with pytest.raises(HeadError, match=f"more than {CHUNKS_MAX} chunks"):
        decoder.feed(memoryview(b"1\r\na\r\n"))
