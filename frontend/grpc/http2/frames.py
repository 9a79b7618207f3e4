"""Frame types, flags, error codes and settings of HTTP/2 (RFC 9113), and how frames are written."""

from __future__ import annotations

import enum
import struct

#: What every client sends first (RFC 9113, 3.4).
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

FRAME_HEADER_BYTES = 9

# Frame types. Plain integers, because they are compared once per frame.
DATA = 0
HEADERS = 1
PRIORITY = 2
RST_STREAM = 3
SETTINGS = 4
PUSH_PROMISE = 5
PING = 6
GOAWAY = 7
WINDOW_UPDATE = 8
CONTINUATION = 9

# Flags.
END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20

#: Largest flow-control window and stream number.
MAX_31_BITS = 2**31 - 1
#: Frame payload that every peer accepts, and the largest one that a setting can allow.
FRAME_BYTES_DEFAULT = 16_384
FRAME_BYTES_LIMIT = 2**24 - 1
#: Flow-control window before any setting.
WINDOW_DEFAULT = 65_535


class Http2Code(enum.IntEnum):
    """Error codes of RST_STREAM and GOAWAY (RFC 9113, 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Setting(enum.IntEnum):
    """Identifiers of settings (RFC 9113, 6.5.2)."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6


class Http2Error(Exception):
    """The peer broke a rule that ends the connection; ``code`` goes into the GOAWAY."""

    def __init__(self, code: Http2Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


#: Length (high 16 bits, low 8), type, flags, stream.
HEADER = struct.Struct(">HBBBI")
UINT32 = struct.Struct(">I")
SETTING = struct.Struct(">HI")
GOAWAY_FIELDS = struct.Struct(">II")

pack_header = HEADER.pack
unpack_header = HEADER.unpack_from


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    size = len(payload)
    return pack_header(size >> 8, size & 0xFF, kind, flags, stream) + payload


def settings_frame(settings: dict[Setting, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(name, value) for name, value in settings.items()))


def window_update(stream: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, UINT32.pack(increment))


def reset(stream: int, code: Http2Code) -> bytes:
    """Return a RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, UINT32.pack(code))


def goaway(last_stream: int, code: Http2Code, text: str = "") -> bytes:
    """Return a GOAWAY frame; the text is for people."""
    return frame(GOAWAY, 0, 0, GOAWAY_FIELDS.pack(last_stream, code) + text.encode())
