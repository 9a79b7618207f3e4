"""Header blocks of requests: HPACK (RFC 7541), with whole blocks remembered.

A client that has talked for a moment sends the same few bytes for the header of every call: indexes into the dynamic
table that both ends keep. A block that leaves that table alone means the same as long as the table stays the same, so
what it decodes to is kept under its bytes, and forgotten when the table changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import decode_huffman

from forebay.frontend.grpc.http2.frames import Http2Code, Http2Error

Field: TypeAlias = tuple[bytes, bytes]

T = TypeVar("T")

#: Bytes of the dynamic table that we keep for a client: the protocol's default.
TABLE_BYTES_MAX = 4096
#: What an entry counts on top of its name and value (RFC 7541, 4.1).
_ENTRY_BYTES = 32
#: Bytes of one decoded header list, counted as above, and its fields, at most.
LIST_BYTES_MAX = 64 * 1024
FIELDS_MAX = 256
#: Blocks remembered per connection; at the limit all are dropped.
_BLOCKS_MAX = 256
#: Blocks longer than this are decoded every time.
_BLOCK_BYTES_MAX = 512
#: An integer of more continuation bytes cannot be meant well (RFC 7541, 5.1).
_INTEGER_SHIFT_MAX = 28

#: RFC 7541, appendix A; index 0 is unused.
_STATIC: tuple[Field, ...] = (
    (b"", b""),
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    (b":status", b"200"),
    (b":status", b"204"),
    (b":status", b"206"),
    (b":status", b"304"),
    (b":status", b"400"),
    (b":status", b"404"),
    (b":status", b"500"),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"accept-language", b""),
    (b"accept-ranges", b""),
    (b"accept", b""),
    (b"access-control-allow-origin", b""),
    (b"age", b""),
    (b"allow", b""),
    (b"authorization", b""),
    (b"cache-control", b""),
    (b"content-disposition", b""),
    (b"content-encoding", b""),
    (b"content-language", b""),
    (b"content-length", b""),
    (b"content-location", b""),
    (b"content-range", b""),
    (b"content-type", b""),
    (b"cookie", b""),
    (b"date", b""),
    (b"etag", b""),
    (b"expect", b""),
    (b"expires", b""),
    (b"from", b""),
    (b"host", b""),
    (b"if-match", b""),
    (b"if-modified-since", b""),
    (b"if-none-match", b""),
    (b"if-range", b""),
    (b"if-unmodified-since", b""),
    (b"last-modified", b""),
    (b"link", b""),
    (b"location", b""),
    (b"max-forwards", b""),
    (b"proxy-authenticate", b""),
    (b"proxy-authorization", b""),
    (b"range", b""),
    (b"referer", b""),
    (b"refresh", b""),
    (b"retry-after", b""),
    (b"server", b""),
    (b"set-cookie", b""),
    (b"strict-transport-security", b""),
    (b"transfer-encoding", b""),
    (b"user-agent", b""),
    (b"vary", b""),
    (b"via", b""),
    (b"www-authenticate", b""),
)
_STATIC_COUNT = len(_STATIC) - 1


class HpackDecoder(Generic[T]):
    """The decoding half of a connection's header compression."""

    __slots__ = ("_blocks", "_changed", "_limit", "_make", "_size", "_table")

    def __init__(self, make: Callable[[list[Field]], T]) -> None:
        """Start with an empty table.

        Args:
            make: turns the fields of a header into what is kept for it; must depend on them alone.
        """
        self._make = make
        self._table: deque[Field] = deque()
        self._size = 0
        self._limit = TABLE_BYTES_MAX
        self._changed = False
        self._blocks: dict[bytes, T] = {}

    def decode(self, block: bytes) -> T:
        """Return what the block's fields were made into.

        Raises:
            Http2Error: the block breaks RFC 7541 or is too large; the connection cannot go on.
        """
        found = self._blocks.get(block)
        if found is not None:
            return found
        self._changed = False
        made = self._make(self._fields(block))
        if self._changed:
            self._blocks.clear()
        elif len(block) <= _BLOCK_BYTES_MAX:
            if len(self._blocks) >= _BLOCKS_MAX:
                self._blocks.clear()
            self._blocks[block] = made
        return made

    def _fields(self, block: bytes) -> list[Field]:
        fields: list[Field] = []
        position, end, total = 0, len(block), 0
        try:
            while position < end:
                first = block[position]
                if first >= 0x80:
                    index, position = _integer(block, position, 0x7F)
                    field = self._entry(index)
                elif first >= 0x40:
                    field, position = self._literal(block, position, 0x3F)
                    self._insert(field)
                elif first >= 0x20:
                    if fields:
                        raise _broken("a table size update after the first field")
                    limit, position = _integer(block, position, 0x1F)
                    self._resize(limit)
                    continue
                else:
                    field, position = self._literal(block, position, 0x0F)
                fields.append(field)
                total += len(field[0]) + len(field[1]) + _ENTRY_BYTES
                if total > LIST_BYTES_MAX or len(fields) > FIELDS_MAX:
                    raise Http2Error(Http2Code.ENHANCE_YOUR_CALM, "the header is too large")
        except IndexError:
            raise _broken("a header block ends within a field") from None
        return fields

    def _entry(self, index: int) -> Field:
        if 0 < index <= _STATIC_COUNT:
            return _STATIC[index]
        if index == 0 or index - _STATIC_COUNT > len(self._table):
            raise _broken(f"there is no header field {index}")
        return self._table[index - _STATIC_COUNT - 1]

    def _literal(self, block: bytes, position: int, mask: int) -> tuple[Field, int]:
        index, position = _integer(block, position, mask)
        if index:
            name = self._entry(index)[0]
        else:
            name, position = _string(block, position)
        value, position = _string(block, position)
        return (name, value), position

    def _insert(self, field: Field) -> None:
        self._changed = True
        self._table.appendleft(field)
        self._size += len(field[0]) + len(field[1]) + _ENTRY_BYTES
        self._evict()

    def _resize(self, limit: int) -> None:
        if limit > TABLE_BYTES_MAX:
            raise _broken(f"a table of {limit} bytes was not allowed")
        self._changed = True
        self._limit = limit
        self._evict()

    def _evict(self) -> None:
        while self._size > self._limit:
            name, value = self._table.pop()
            self._size -= len(name) + len(value) + _ENTRY_BYTES


def _broken(text: str) -> Http2Error:
    return Http2Error(Http2Code.COMPRESSION_ERROR, text)


def _integer(block: bytes, position: int, mask: int) -> tuple[int, int]:
    value = block[position] & mask
    position += 1
    if value < mask:
        return value, position
    shift = 0
    while True:
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > _INTEGER_SHIFT_MAX:
            raise _broken("an integer is too long")


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    is_huffman = block[position] >= 0x80
    length, position = _integer(block, position, 0x7F)
    end = position + length
    if end > len(block):
        raise _broken("a string runs past the end of its header block")
    raw = block[position:end]
    if not is_huffman:
        return raw, end
    try:
        return decode_huffman(raw), end
    except HPACKDecodingError:
        raise _broken("a string is not Huffman coded") from None
