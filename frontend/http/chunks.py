"""The chunked transfer coding (RFC 9112, 7.1), decoded as it arrives and bounded."""

from __future__ import annotations

from forebay.frontend.http.head import HeadError

#: Non-empty chunks of one body at most (spec H-012).
CHUNKS_MAX = 65_536
#: Bytes of a chunk-size line with its extension, and of all trailer lines together.
_LINE_BYTES_MAX = 4096


class ChunkDecoder:
    """Collects one chunked body. Feed it until ``is_complete``."""

    def __init__(self, body_bytes_max: int) -> None:
        self.body = bytearray()
        self.is_complete = False
        self._body_bytes_max = body_bytes_max
        self._chunks = 0
        self._remaining = 0
        #: What is expected next: size line, data, the CRLF after data, or trailer lines.
        self._state = "size"
        self._line = bytearray()
        self._trailer_bytes = 0

    def feed(self, data: memoryview) -> int:
        """Take bytes; return how many belong to this body.

        Raises:
            HeadError: malformed, too many chunks or too large a body.
        """
        position, end = 0, len(data)
        while position < end and not self.is_complete:
            if self._state == "data":
                taken = min(self._remaining, end - position)
                self.body += data[position : position + taken]
                position += taken
                self._remaining -= taken
                if not self._remaining:
                    self._state = "crlf"
                continue
            position = self._take_line(data, position, end)
        return position

    def _take_line(self, data: memoryview, position: int, end: int) -> int:
        # One line, perhaps over several reads; the line feed ends it.
        window = bytes(data[position : min(end, position + _LINE_BYTES_MAX)])
        newline = window.find(b"\n")
        if newline < 0:
            self._line += window
            if len(self._line) >= _LINE_BYTES_MAX:
                raise HeadError(400, "invalid HTTP request: chunk line too long")
            return position + len(window)
        self._line += window[: newline + 1]
        line, self._line = bytes(self._line), bytearray()
        if not line.endswith(b"\r\n"):
            raise HeadError(400, "invalid HTTP request: chunk line does not end in CRLF")
        self._on_line(line[:-2])
        return position + newline + 1

    def _on_line(self, line: bytes) -> None:
        if self._state == "crlf":
            if line:
                raise HeadError(400, "invalid HTTP request: chunk data does not end in CRLF")
            self._state = "size"
        elif self._state == "size":
            digits = line.partition(b";")[0].strip(b" \t")
            if not digits or len(digits) > 16 or digits.translate(None, b"0123456789abcdefABCDEF"):
                raise HeadError(400, "invalid HTTP request: malformed chunk size")
            self._remaining = int(digits, 16)
            self._state = "data" if self._remaining else "trailer"
            if self._remaining:
                self._chunks += 1
            if self._chunks > CHUNKS_MAX:
                raise HeadError(400, f"request has more than {CHUNKS_MAX} chunks")
            if len(self.body) + self._remaining > self._body_bytes_max:
                raise HeadError(413, f"chunked request body exceeds {self._body_bytes_max} bytes")
        elif line:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _LINE_BYTES_MAX:
                raise HeadError(400, "invalid HTTP request: trailer too long")
        else:
            self.is_complete = True
