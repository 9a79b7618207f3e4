"""gRPC as bytes: frames of HTTP/2 written by hand, for clients that no library would be."""

from __future__ import annotations

import socket

from forebay_server import PATIENCE_S


def connect(port: int) -> socket.socket:
    """Return a connection that has sent its preface and settings."""
    wire = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
    return wire


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def header_block(path: bytes) -> bytes:
    def literal(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value

    return b"\x83\x86" + b"\x04" + bytes((len(path),)) + path + literal(b"content-type", b"application/grpc")


INFER = header_block(b"/inference.GRPCInferenceService/ModelInfer")
