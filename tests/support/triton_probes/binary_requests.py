"""Inference requests with binary tensors, and compressed ones."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator

from http_wire import get, post

from triton_probes.probe import Probe, a_get, a_post, binary, packed, tensor


def binaries() -> Iterator[Probe]:
    """The binary extension, and raw requests."""

    def head(size: object = 8, **more: object) -> dict[str, object]:
        return {"inputs": [tensor(data=None, parameters={"binary_data_size": size})], **more}

    data = struct.pack("<2f", 1, 2)
    for size in (8, 0, 4, 12, 7, 9, -1, "8", 8.0, True, None, [], 2**31, 2**32, 2**63, 2**64 - 1):
        yield binary("f32", head(size), data)
    for tail in (b"", data[:4], data + b"x", data * 2):
        yield binary("f32", head(), tail)
    for length in (
        "0",
        "-1",
        "abc",
        "",
        " 100",
        "100000",
        "+0",
        "1",
        "10",
        "99999999999999999999",
        "1.5",
        "12abc",
        "0x10",
        "2147483648",
        "4294967296",
    ):
        yield binary("f32", head(), data, length=length)
    text = json.dumps(head()).encode()
    yield binary("f32", text, data, length=f" {len(text)} ")
    yield binary("f32", text, data, length=f"{len(text)}abc")
    yield binary("f32", text, data, length=f"+{len(text)}")
    yield binary("f32", text, data, length=f"00{len(text)}")
    yield a_post("/v2/models/f32/infer", text + data)
    yield a_post("/v2/models/f32/infer", text)
    yield binary("f32", json.dumps({"inputs": [tensor()]}).encode(), b"")
    yield binary("f32", json.dumps({"inputs": [tensor()]}).encode(), b"x")
    yield binary("f32", head(0), b"")
    yield binary("f32", {"inputs": [tensor(shape=[0], data=None, parameters={"binary_data_size": 0})]}, b"")
    both = tensor(parameters={"binary_data_size": 8})
    yield binary("f32", {"inputs": [both]}, data)
    yield binary("f32", {"inputs": [tensor(parameters={"binary_data_size": 8, "shared_memory_region": "r"})]}, data)
    shm = {"shared_memory_region": "r", "binary_data_size": 8}
    yield binary("f32", {"inputs": [tensor(data=None, parameters=shm)]}, data)
    yield binary(
        "f32", {"inputs": [tensor(data=None, parameters={"binary_data_size": 8, "shared_memory_region": 5})]}, data
    )
    for payload in (
        packed(b"a", b"b"),
        packed(b"a"),
        packed(b"a", b"b", b"c"),
        b"",
        b"\1",
        b"\1\0\0\0",
        b"\5\0\0\0abc",
        packed(b"a") + b"\2\0",
        packed(b"a") + b"\xff\xff\xff\xffx",
        packed(b"\xff\xfe", b"\0"),
        packed(b"", b""),
        packed(b'"\\\n\x01\x7f', "é".encode()),
    ):
        spec = tensor("INPUT0", "BYTES", [2], None, parameters={"binary_data_size": len(payload)})
        yield binary("str", {"inputs": [spec]}, payload)
        yield binary("str", {"inputs": [spec], "parameters": {"binary_data_output": True}}, payload)
    mixed = [tensor(shape=[1, 2]), tensor("INPUT4", "INT8", [1, 3], None, parameters={"binary_data_size": 3})]
    yield binary("id_all", {"inputs": mixed}, b"\x01\x02\xff")
    yield binary("id_all", {"inputs": mixed, "parameters": {"binary_data_output": True}}, b"\x01\x02\xff")
    for model, payloads in {
        "f32": (b"", data, data[:3], data[:4], data * 100),
        "str": (b"", b"x", b"hello"),
        "id_all": (b"", b"abc"),
        "seen": (b"", b"abcd"),
        "boolm": (b"\1\0\2", b""),
        "seq": (b"\1\0\0\0",),
        "i8": (b"\x80\x7f", b""),
        "f16": (b"\0\x3c",),
        "bf16": (b"\0\x3c",),
        "u64": (b"\1" * 8, b"\1" * 12),
        "dec": (b"",),
        "multi": (b"\0" * 8,),
        "auto": (b"\0" * 16, b"\0" * 8),
    }.items():
        for payload in payloads:
            yield binary(model, b"", payload, length="0")
    yield a_post("/v2/models/multi/infer", struct.pack("<f", 30), "Inference-Header-Content-Length: 0")


def encodings() -> Iterator[Probe]:
    """Compression both ways, and other headers."""
    at, plain = "/v2/models/f32/infer", json.dumps({"inputs": [tensor()]}).encode()
    squeezed = {"gzip": gzip.compress(plain, mtime=0), "deflate": zlib.compress(plain)}
    for encoding in ("gzip", "deflate", "identity", "", "br", "GZIP", "gzip, deflate", "x-gzip", "zstd"):
        for body in (plain, squeezed["gzip"], squeezed["deflate"], b""):
            yield a_post(at, body, f"Content-Encoding: {encoding}")
    raw_deflate = zlib.compressobj(wbits=-15)
    yield a_post(at, raw_deflate.compress(plain) + raw_deflate.flush(), "Content-Encoding: deflate")
    yield a_post(at, squeezed["gzip"][:-9], "Content-Encoding: gzip")
    yield a_post(at, squeezed["gzip"] + b"junk", "Content-Encoding: gzip")
    yield a_post(at, squeezed["gzip"] * 2, "Content-Encoding: gzip")
    head = json.dumps({"inputs": [tensor(data=None, parameters={"binary_data_size": 8})]}).encode()
    whole = head + struct.pack("<2f", 1, 2)
    for encoding, body in (("gzip", gzip.compress(whole, mtime=0)), ("deflate", zlib.compress(whole))):
        yield a_post(at, body, f"Content-Encoding: {encoding}", f"Inference-Header-Content-Length: {len(head)}")
        yield a_post(at, body, f"Content-Encoding: {encoding}", "Inference-Header-Content-Length: 0")
        yield a_post(at, body, f"Content-Encoding: {encoding}", "Inference-Header-Content-Length: 100000")
    accepts = (
        "gzip",
        "deflate",
        "identity",
        "br",
        "*",
        "",
        "gzip;q=0",
        "gzip;q=0.5, deflate;q=0.8",
        "identity, gzip",
        "gzip, deflate, br",
        "deflate, gzip",
        "GZIP",
        "gzip;q=x",
        "gzip; q=0.5",
        " gzip",
        "gzip ",
        ",,gzip",
        "gzip;q=1, identity;q=1",
        "gzip;q=0.5, identity;q=0.4",
        "gzip;q=-1",
        "gzip;q=2, deflate;q=1",
    )
    for accept in accepts:
        yield a_post(at, plain, f"Accept-Encoding: {accept}")
    yield a_post(
        at, json.dumps({"inputs": [tensor()], "parameters": {"binary_data_output": True}}), "Accept-Encoding: gzip"
    )
    yield a_post(at, "xx", "Accept-Encoding: gzip")
    yield a_get("/v2", "Accept-Encoding: gzip")
    yield a_get("/v2/models/stats", "Accept-Encoding: gzip")
    ask = {"inputs": [tensor("A", "INT32", [1, 1], [1])]}
    for header in ("X-Fwd: a", "x-fwd-b: c", "My-X-Fwd-D: e", "X-Fw: a", "X-FWD: \u00e9", "X-Fwd:", "X-Fwd-1: a b  "):
        yield a_post("/v2/models/seen/infer", ask, header)
        yield a_post("/v2/models/seen/generate", {"A": 1}, header)
    yield a_post("/v2/models/seen/infer", {**ask, "parameters": {"X-Fwd": "p", "z": 1}}, "X-Fwd: h", "x-fwd: i")
    yield a_post(at, plain, "Content-Type: text/plain")
    yield a_post(at, plain, "Accept: text/html")
    yield a_post(at, plain, "Connection: close")
    yield a_get("/v2", "Connection: close")
    yield a_get("/v2/health/live", "Connection: close")
    yield Probe("HTTP/1.0 GET /v2", get("/v2", version="1.0"))
    yield Probe("HTTP/1.0 GET /v2 keep-alive", get("/v2", "Connection: keep-alive", version="1.0"))
    yield Probe("HTTP/1.0 POST infer", post(at, plain, version="1.0"))
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(plain), plain)
    yield Probe(
        "chunked infer", f"POST {at} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks
    )
    yield Probe(
        "chunked index",
        b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'c\r\n{"ready":1} \r\n0\r\n\r\n',
    )
