"""Shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from triton_probes.probe import Probe, a_get, a_post, infer, tensor


def regions() -> Iterator[Probe]:
    """Shared memory; ``/triton_probe`` is 64 bytes that the comparison makes."""
    at = "/v2/systemsharedmemory/region/r/register"
    bodies: Sequence[object] = (
        "",
        "xx",
        "[]",
        "5",
        "null",
        {},
        {"key": "/triton_probe"},
        {"byte_size": 8},
        {"key": 5, "byte_size": 8},
        {"key": None, "byte_size": 8},
        {"key": "/triton_probe", "byte_size": "8"},
        {"key": "/triton_probe", "byte_size": -1},
        {"key": "/triton_probe", "byte_size": 1.5},
        {"key": "/triton_probe", "byte_size": 8, "offset": "0"},
        {"key": "/triton_probe", "byte_size": 8, "offset": -1},
        {"key": "/nope", "byte_size": 8},
        {"key": "", "byte_size": 8},
        {"key": "nope", "byte_size": 8},
        {"key": "/a/b", "byte_size": 8},
        {"key": "../../etc/passwd", "byte_size": 8},
        {"key": "x" * 300, "byte_size": 8},
        {"key": "/triton_probe", "byte_size": 65},
        {"key": "/triton_probe", "byte_size": 2**40},
        {"key": "/triton_probe", "byte_size": 2**64 - 1},
        {"key": "/triton_probe", "byte_size": 64, "offset": 8},
        {"key": "/triton_probe", "byte_size": 8, "offset": 2**63},
        {"key": "/triton_probe", "byte_size": 8, "offset": 64},
        {"key": "/triton_python_backend_shm_region_x", "byte_size": 8},
        {"key": "triton_python_backend_shm_region_x", "byte_size": 8},
        {"key": "/triton_probe", "byte_size": 0},
    )
    yield from (a_post(at, body) for body in bodies)
    yield a_get("/v2/systemsharedmemory/status")
    yield a_post("/v2/systemsharedmemory/region/r/unregister")
    yield a_post(at, {"key": "/triton_probe", "byte_size": 64})
    yield a_post(at, {"key": "/triton_probe", "byte_size": 64})
    yield a_post("/v2/systemsharedmemory/region/s/register", {"key": "/triton_probe", "byte_size": 16, "offset": 0})
    yield a_post("/v2/systemsharedmemory/region/a%20b/register", {"key": "/triton_probe", "byte_size": 16})
    yield a_get("/v2/systemsharedmemory/status")
    yield a_get("/v2/systemsharedmemory/region/r/status")
    yield a_get("/v2/systemsharedmemory/region/zz/status")
    yield a_get("/v2/cudasharedmemory/region/r/status")
    places: Sequence[dict[str, object]] = (
        {"shared_memory_byte_size": 8},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 8},
        {},
        {"shared_memory_byte_size": 12},
        {"shared_memory_byte_size": 4},
        {"shared_memory_byte_size": 65},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 57},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 64},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 63},
        {"shared_memory_byte_size": 0},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 1000},
        {"shared_memory_byte_size": "8"},
        {"shared_memory_byte_size": -8},
        {"shared_memory_byte_size": 8, "shared_memory_offset": "0"},
        {"shared_memory_byte_size": 2**64 - 1},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 2**64 - 8},
    )
    for place in places:
        where = {"shared_memory_region": "r", **place}
        yield infer("f32", [tensor(data=None, parameters=where)])
        yield infer("f32", [tensor()], outputs=[{"name": "OUTPUT0", "parameters": where}])
        yield infer("f32", [tensor(data=None, parameters={**where, "shared_memory_region": "zz"})])
        yield infer(
            "f32", [tensor()], outputs=[{"name": "OUTPUT0", "parameters": {**where, "shared_memory_region": "zz"}}]
        )
    both = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    yield infer("f32", [tensor(data=None, parameters=both)], outputs=[{"name": "OUTPUT0", "parameters": both}])
    yield infer(
        "f32", [tensor(data=None, parameters=both)], outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}]
    )
    yield infer("f32", [tensor(parameters=both)])
    yield infer("str", [tensor("INPUT0", "BYTES", [2], None, parameters=both)])
    yield infer("f32", [tensor(shape=[0], data=None, parameters={**both, "shared_memory_byte_size": 0})])
    yield a_post("/v2/cudasharedmemory/region/r/unregister")
    yield a_post("/v2/systemsharedmemory/region/r/unregister", "xx")
    yield a_post("/v2/systemsharedmemory/region/r/unregister")
    yield a_get("/v2/systemsharedmemory/status")
    yield a_post("/v2/systemsharedmemory/unregister")
    yield a_get("/v2/systemsharedmemory/status")
    yield a_post("/v2/systemsharedmemory/register", {"key": "/triton_probe", "byte_size": 64})
    handle = "A" * 86 + "=="
    cuda: Sequence[object] = (
        "",
        "xx",
        "[]",
        {},
        {"raw_handle": {}},
        {"raw_handle": 5},
        {"raw_handle": {"b64": 5}},
        {"raw_handle": {"b64": handle}},
        {"raw_handle": {"b64": handle}, "byte_size": 8},
        {"raw_handle": {"b64": handle}, "byte_size": 8, "device_id": "0"},
        {"raw_handle": {"b64": handle}, "byte_size": 8, "device_id": -1},
        {"raw_handle": {"b64": "AAAA"}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": "!!!"}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": ""}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": handle}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": handle[:-2]}, "byte_size": 8, "device_id": 0},
    )
    yield from (a_post("/v2/cudasharedmemory/region/c/register", body) for body in cuda)
    yield a_post("/v2/cudasharedmemory/register", {})
    yield a_post("/v2/cudasharedmemory/region/c/unregister")
    yield a_post("/v2/cudasharedmemory/unregister")
