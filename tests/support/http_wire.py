"""HTTP as bytes on a socket: what no client library would send, and exactly what came back."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from forebay_server import PATIENCE_S


@dataclass(frozen=True)
class Answer:
    """One reply."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names in lower case."""
    body: bytes = b""
    chunks: tuple[bytes, ...] = ()
    """The chunks of a chunked body."""

    @property
    def text(self) -> str:
        """The error text of the body."""
        return str(json.loads(self.body)["error"])

    def json(self) -> Any:
        """The JSON part of the body."""
        length = self.headers.get("inference-header-content-length")
        return json.loads(self.body if length is None else self.body[: int(length)])

    @property
    def tensors(self) -> bytes:
        """What follows the JSON part."""
        return self.body[int(self.headers["inference-header-content-length"]) :]


class Ended(Exception):
    """The server closed the connection before the reply was complete."""


class WireClient:
    """One connection."""

    def __init__(self, port: int, *, receive_buffer_bytes: int = 0, timeout_s: float = PATIENCE_S) -> None:
        self.sock = socket.socket()
        if receive_buffer_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.sock.settimeout(timeout_s)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> Self:
        self.sock.sendall(b"".join(parts))
        return self

    def finish_sending(self) -> Self:
        """Half-close."""
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Close with a reset, as a killed client's kernel does for unread data."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(262144)
        if not data:
            raise Ended(bytes(self._received))
        self._received += data

    def _take(self, count: int) -> bytes:
        while len(self._received) < count:
            self._more()
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    def _line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            self._more()
        return self._take(end + 2)[:-2]

    def answer(self) -> Answer:
        """Read one reply, interim ones too.

        Raises:
            Ended: there is none, or only part of one.
        """
        status = int(self._line().split(b" ", 2)[1])
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if status < 200:
            return Answer(status, headers)
        if headers.get("transfer-encoding") == "chunked":
            chunks: list[bytes] = []
            while size := int(self._line(), 16):
                chunks.append(self._take(size))
                assert self._line() == b""
            assert self._line() == b""
            return Answer(status, headers, b"".join(chunks), tuple(chunks))
        if "content-length" in headers:
            return Answer(status, headers, self._take(int(headers["content-length"])))
        return Answer(status, headers, self.rest())

    def rest(self) -> bytes:
        """Read to the end of the connection."""
        try:
            while True:
                self._more()
        except Ended:
            rest, self._received = bytes(self._received), bytearray()
            return rest

    @property
    def is_ended(self) -> bool:
        """Wait for the server's end of the connection; whether nothing came before it."""
        try:
            return self.rest() == b""
        except ConnectionError:
            return True


def post(path: str, body: bytes = b"", *headers: str, version: str = "1.1", length: int | None = None) -> bytes:
    """Return a POST request; ``length`` lies about the body's."""
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: test",
        *headers,
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path: str, *headers: str, version: str = "1.1") -> bytes:
    """Return a GET request."""
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: test", *headers]).encode() + b"\r\n\r\n"


def chunked(*chunks: bytes) -> bytes:
    """Return a chunked body."""
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def infer(
    model: str,
    inputs: Sequence[tuple[str, str, Sequence[int], bytes]],
    *headers: str,
    version: str = "1.1",
    binary_output: bool = True,
    request_id: str = "",
) -> bytes:
    """Return an inference request with binary inputs ``(name, datatype, shape, bytes)``."""
    document: dict[str, Any] = {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": list(shape), "parameters": {"binary_data_size": len(data)}}
            for name, datatype, shape, data in inputs
        ]
    }
    if binary_output:
        document["parameters"] = {"binary_data_output": True}
    if request_id:
        document["id"] = request_id
    head = json.dumps(document).encode()
    body = head + b"".join(data for *_, data in inputs)
    return post(
        f"/v2/models/{model}/infer", body, f"Inference-Header-Content-Length: {len(head)}", *headers, version=version
    )
