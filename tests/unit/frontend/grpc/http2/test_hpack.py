"""Header compression against an independent implementation (RFC 7541)."""

from __future__ import annotations

import random

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.grpc.http2.frames import Http2Code, Http2Error
from forebay.frontend.grpc.http2.hpack_decoder import HpackDecoder
from forebay.frontend.grpc.http2.hpack_encoder import ReplyEncoder, encode_plain

Fields = list[tuple[bytes, bytes]]

NAMES = st.sampled_from([b":path", b"content-type", b"te", b"x-custom", b"grpc-timeout", b"user-agent"])
VALUES = st.one_of(st.sampled_from([b"/a", b"application/grpc", b"trailers"]), st.binary(max_size=200))
BLOCKS = st.lists(st.lists(st.tuples(NAMES, VALUES), max_size=12), min_size=1, max_size=8)


def keep(fields: Fields) -> Fields:
    return fields


@given(BLOCKS, st.booleans())
def test_blocks_of_another_encoder_are_understood(blocks: list[Fields], huffman: bool) -> None:
    encoder, decoder = hpack.Encoder(), HpackDecoder(keep)
    for fields in blocks:
        assert decoder.decode(encoder.encode(fields, huffman=huffman)) == fields


def test_repeated_blocks_mean_the_same_only_while_the_table_is_the_same() -> None:
    decoder = HpackDecoder(keep)
    add_a = b"\x40\x01a\x011"
    add_b = b"\x40\x01b\x012"
    newest = b"\xbe"
    decoder.decode(add_a)
    assert decoder.decode(newest) == decoder.decode(newest) == [(b"a", b"1")]
    decoder.decode(add_b)
    assert decoder.decode(newest) == [(b"b", b"2")]


def test_a_table_made_smaller_forgets_its_oldest_fields() -> None:
    encoder, decoder = hpack.Encoder(), HpackDecoder(keep)
    fields = [(b"x-%d" % number, b"value") for number in range(20)]
    assert decoder.decode(encoder.encode(fields)) == fields
    for size in (200, 0, 4096):
        encoder.header_table_size = size
        assert decoder.decode(encoder.encode(fields)) == fields


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x80", id="index 0"),
        pytest.param(b"\xbe", id="index behind the table"),
        pytest.param(b"\x82\x20", id="table size update after a field"),
        pytest.param(b"\x3f\xe2\x1f", id="table larger than allowed"),
        pytest.param(b"\x00\x01a", id="no value"),
        pytest.param(b"\x00\x7f\xff\xff\xff\xff\xff\xff\xff\x01", id="integer too long"),
        pytest.param(b"\x00\x05ab", id="string runs past the end"),
        pytest.param(b"\x00\x81\xff\x00", id="not Huffman coded"),
        pytest.param(b"\xff", id="cut within an integer"),
    ],
)
def test_broken_blocks_end_the_connection(block: bytes) -> None:
    with pytest.raises(Http2Error) as caught:
        HpackDecoder(keep).decode(block)
    assert caught.value.code is Http2Code.COMPRESSION_ERROR


def test_a_small_block_cannot_become_a_large_header() -> None:
    """A block of one-byte references to one large field ("HPACK bomb")."""
    decoder = HpackDecoder(keep)
    decoder.decode(b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000)
    with pytest.raises(Http2Error) as caught:
        decoder.decode(b"\xbe" * 100)
    assert caught.value.code is Http2Code.ENHANCE_YOUR_CALM


def test_random_bytes_decode_or_are_refused() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        try:
            HpackDecoder(keep).decode(chance.randbytes(chance.randrange(40)))
        except Http2Error:
            pass


def test_plain_blocks_are_understood_by_another_decoder() -> None:
    fields = [(b":status", b"200"), (b":status", b"415"), (b"content-type", b"application/grpc"), (b"x", b"y" * 300)]
    assert hpack.Decoder().decode(encode_plain(fields), raw=True) == fields


HEAD = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"identity")]
TAIL = [(b"grpc-status", b"0")]


def test_good_replies_become_indexes_and_may_mix_with_plain_blocks() -> None:
    encoder, decoder = ReplyEncoder(HEAD[1], HEAD[2], TAIL[0]), hpack.Decoder()
    for turn in range(3):
        head, tail = encoder.next_pair()
        assert decoder.decode(head, raw=True) == HEAD
        assert decoder.decode(encoder.plain_head, raw=True) == HEAD
        assert decoder.decode(tail, raw=True) == TAIL
        assert len(head) + len(tail) == 4 or turn == 0


@pytest.mark.parametrize("was_used", [False, True])
def test_a_client_with_a_smaller_table_gets_plain_blocks(was_used: bool) -> None:
    encoder, decoder = ReplyEncoder(HEAD[1], HEAD[2], TAIL[0]), hpack.Decoder()
    if was_used:
        for block in encoder.next_pair():
            decoder.decode(block)
    decoder.max_allowed_table_size = 100
    prefix = encoder.use_table_of(100)
    head, tail = encoder.next_pair()
    assert decoder.decode(prefix + head, raw=True) == HEAD
    assert decoder.decode(tail, raw=True) == TAIL
    assert encoder.use_table_of(4096) == b""
