"""A request at an edge of the HTTP protocol, and short ways to write one."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from http_wire import get, post


@dataclass(frozen=True)
class Probe:
    """One request."""

    what: str
    message: bytes
    metrics: bool = False


def a_post(path: str, body: object = b"", *headers: str) -> Probe:
    """Return a POST; a body that is no bytes or text is sent as JSON."""
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    shown = data if len(data) < 400 else data[:400] + b"..."
    return Probe(f"POST {path} {' '.join(headers)} {shown!r}", post(path, data, *headers))


def a_get(path: str, *headers: str) -> Probe:
    """Return a GET."""
    return Probe(f"GET {path} {' '.join(headers)}", get(path, *headers))


def a_method(method: str, path: str) -> Probe:
    """Return a request of another method."""
    return Probe(f"{method} {path}", f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n".encode())


def tensor(
    name: object = "INPUT0", datatype: object = "FP32", shape: object = (2,), data: object = (1, 2), **more: object
) -> dict[str, object]:
    """Return one member of ``inputs``; None leaves a key out."""
    members = {"name": name, "datatype": datatype, "shape": shape, "data": data, **more}
    return {key: value for key, value in members.items() if value is not None}


def infer(model: str, inputs: object, *headers: str, **more: object) -> Probe:
    """Return an inference request in JSON."""
    return a_post(f"/v2/models/{model}/infer", {**more, "inputs": inputs}, *headers)


def binary(model: str, head: object, data: bytes, *headers: str, length: str | None = None) -> Probe:
    """Return an inference request with tensors behind its JSON."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    said = str(len(text)) if length is None else length
    return a_post(f"/v2/models/{model}/infer", text + data, f"Inference-Header-Content-Length: {said}", *headers)


def packed(*elements: bytes) -> bytes:
    """Return BYTES as they lie in memory."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
