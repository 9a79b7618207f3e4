"""Header blocks of replies: literals without a table, and short forms for the two blocks that every good call gets.

The first good reply of a connection puts its three fields into the client's table; later ones are indexes, four bytes
for header and trailers together. Blocks that may be written later than they are encoded never refer to that table.
"""

from __future__ import annotations

from collections.abc import Iterable

from forebay.frontend.grpc.http2.hpack_decoder import TABLE_BYTES_MAX

#: Names with an entry in the static table that replies use.
_STATIC_NAMES = {b"content-type": 31, b"allow": 22, b"content-length": 28}
#: Whole fields of the static table.
_STATIC_FIELDS = {(b":status", b"200"): 8, (b":status", b"400"): 12, (b":status", b"404"): 13, (b":status", b"500"): 14}
_STATUS_NAME = 8


def _integer(value: int, mask: int, pattern: int) -> bytes:
    if value < mask:
        return bytes((pattern | value,))
    parts = bytearray((pattern | mask,))
    value -= mask
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _string(text: bytes) -> bytes:
    return _integer(len(text), 0x7F, 0) + text


def _literal(name: bytes, value: bytes, mask: int, pattern: int) -> bytes:
    index = _STATUS_NAME if name == b":status" else _STATIC_NAMES.get(name, 0)
    start = _integer(index, mask, pattern)
    return start + _string(value) if index else start + _string(name) + _string(value)


def encode_plain(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a block that neither uses nor changes the client's table."""
    parts: list[bytes] = []
    for name, value in fields:
        index = _STATIC_FIELDS.get((name, value))
        parts.append(bytes((0x80 | index,)) if index else _literal(name, value, 0x0F, 0x00))
    return b"".join(parts)


class ReplyEncoder:
    """Blocks of one connection that are written in the order in which they are asked for."""

    __slots__ = ("_head_fields", "_is_plain", "_plain_head", "_plain_tail", "_tail_field", "head", "tail")

    def __init__(
        self, content_type: tuple[bytes, bytes], accept: tuple[bytes, bytes], status_ok: tuple[bytes, bytes]
    ) -> None:
        """Take the fields of a good reply: header ``:status: 200`` and the first two, trailers the third."""
        self._head_fields = (content_type, accept)
        self._tail_field = status_ok
        self._plain_head = encode_plain(((b":status", b"200"), content_type, accept))
        self._plain_tail = encode_plain((status_ok,))
        self._is_plain = False
        #: The next block of a good header; empty: ask :meth:`next_head`.
        self.head = b""
        self.tail = b""

    def use_table_of(self, byte_size: int) -> bytes:
        """Follow the client's limit; return what must stand in front of the next block that is written.

        A table made smaller must be announced (RFC 7541, 4.2); ours is then given up for good.
        """
        if byte_size >= TABLE_BYTES_MAX or self._is_plain:
            return b""
        self._is_plain = True
        self.head, self.tail = self._plain_head, self._plain_tail
        return b"\x20"

    def next_pair(self) -> tuple[bytes, bytes]:
        """Return header and trailers for the next good reply; both are written now, in this order."""
        if not self.head:
            first = b"\x88" + b"".join(_literal(name, value, 0x3F, 0x40) for name, value in self._head_fields)
            # Newest entries come first: status 62, accept 63, content type 64.
            self.head, self.tail = b"\x88\xc0\xbf", b"\xbe"
            return first, _literal(*self._tail_field, 0x3F, 0x40)
        return self.head, self.tail

    @property
    def plain_head(self) -> bytes:
        """A good header for any time."""
        return self._plain_head

    @property
    def plain_tail(self) -> bytes:
        """Good trailers for any time."""
        return self._plain_tail
