"""gRPC statuses: numbers, how they travel, and what our errors become (spec 00, G-090)."""

from __future__ import annotations

import enum
import re

from forebay.frontend.grpc.http2.hpack_encoder import encode_plain
from forebay.ipc.errors import Code, ServingError

#: Bytes of a status message at most: clients refuse headers beyond 8 KiB.
_MESSAGE_BYTES_MAX = 4096


class Status(enum.IntEnum):
    """Status codes of gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


#: Status of each code; `GrpcStatusUtil::CodeToStatus` in Triton's grpc_utils.cc.
STATUS_OF: dict[Code, Status] = {
    Code.UNKNOWN: Status.UNKNOWN,
    Code.INTERNAL: Status.INTERNAL,
    Code.NOT_FOUND: Status.NOT_FOUND,
    Code.INVALID_ARG: Status.INVALID_ARGUMENT,
    Code.UNAVAILABLE: Status.UNAVAILABLE,
    Code.UNSUPPORTED: Status.UNIMPLEMENTED,
    Code.ALREADY_EXISTS: Status.ALREADY_EXISTS,
    Code.CANCELLED: Status.CANCELLED,
}


class RpcError(Exception):
    """A call ends with a status that no :class:`ServingError` stands for."""

    def __init__(self, status: Status, text: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def status_of(error: BaseException) -> tuple[Status, str]:
    """Return status and message for an error; what is not meant for clients is INTERNAL without details."""
    if isinstance(error, RpcError):
        return error.status, error.text
    if isinstance(error, ServingError):
        return STATUS_OF[error.code], error.text
    return Status.INTERNAL, "internal error"


#: What new calls are told while the server stops (spec G-087).
STOPPING_TEXT = "GRPC server is shutting down and has stopped accepting new requests."

#: Everything that a status message may not hold as it is (gRPC over HTTP/2, "Percent-Encoded").
_NOT_PLAIN = re.compile(rb"[^ -$&-~]")


def percent_encode(text: str) -> bytes:
    """Return a status message as it travels."""
    raw = text.encode("utf-8", "replace")[:_MESSAGE_BYTES_MAX]
    return _NOT_PLAIN.sub(lambda match: b"%%%02X" % match.group()[0], raw)


def tail_fields(status: Status, text: str = "") -> list[tuple[bytes, bytes]]:
    """Return trailers."""
    found = [(b"grpc-status", b"%d" % status)]
    if text:
        found.append((b"grpc-message", percent_encode(text)))
    return found


#: Fields of every reply.
CONTENT_TYPE = (b"content-type", b"application/grpc")
ACCEPT_ENCODING = (b"grpc-accept-encoding", b"identity, deflate, gzip")
STATUS_OK = (b"grpc-status", b"0")


def tail_block(status: Status, text: str = "") -> bytes:
    """Return trailers that follow a header."""
    return encode_plain(tail_fields(status, text))


def only_tail_block(status: Status, text: str = "") -> bytes:
    """Return header and trailers in one, for a call that fails before its first reply ("Trailers-Only")."""
    return encode_plain([(b":status", b"200"), CONTENT_TYPE, *tail_fields(status, text)])
