"""The shared-memory endpoints: fields, texts, and the commands they become."""

from __future__ import annotations

import base64
import json

import pytest
from fake_frontend import FakeControl, ask, make_context

from forebay.frontend.handlers.context import ControlSettings
from forebay.ipc.errors import NotFound


def test_status_is_an_array_in_triton_key_order() -> None:
    """Spec H-191, H-195, E-149, E-151."""
    system = [{"byte_size": 64, "key": "/k", "name": "r", "offset": 0, "kind": "system"}]
    context = make_context(replies={"region_status": system})
    assert ask(context, "GET", "/v2/systemsharedmemory/status").triple == (
        200,
        "application/json",
        b'[{"name":"r","key":"/k","offset":0,"byte_size":64}]',
    )
    context = make_context(replies={"region_status": [{"byte_size": 64, "device_id": 1, "name": "r"}]})
    assert ask(context, "GET", "/v2/cudasharedmemory/region/r/status").body == (
        b'[{"name":"r","device_id":1,"byte_size":64}]'
    )
    context = make_context(replies={"region_status": []})
    assert ask(context, "GET", "/v2/cudasharedmemory/status").body == b"[]"


def test_status_of_an_unknown_region() -> None:
    """E-150."""
    error = NotFound("Unable to find system shared memory region: 'zz'")
    answer = ask(make_context(replies={"region_status": error}), "GET", "/v2/systemsharedmemory/region/zz/status")
    assert answer.triple == (
        404,
        "application/json",
        b'{"error":"Unable to find system shared memory region: \'zz\'"}',
    )


def test_register_system_region() -> None:
    """Spec H-192: the offset is optional."""
    context = make_context()
    path = "/v2/systemsharedmemory/region/r/register"
    assert ask(context, "POST", path, b'{"key":"/k","byte_size":10}').triple == (200, "application/json", b"")
    assert ask(context, "POST", path, b'{"key":"/k","offset":4096,"byte_size":10}').status == 200
    assert isinstance(context.control, FakeControl)
    common = {"kind": "system", "name": "r", "key": "/k", "byte_size": 10}
    assert context.control.commands == [
        ("region_register", {**common, "offset": 0}),
        ("region_register", {**common, "offset": 4096}),
    ]


def test_register_cuda_region() -> None:
    """Spec H-196."""
    context = make_context()
    handle = bytes(range(64))
    body = {"raw_handle": {"b64": base64.b64encode(handle).decode()}, "device_id": 0, "byte_size": 10}
    assert ask(context, "POST", "/v2/cudasharedmemory/region/r/register", json.dumps(body).encode()).body == b""
    assert isinstance(context.control, FakeControl)
    expected = {"kind": "cuda", "name": "r", "raw_handle": handle, "device_id": 0, "byte_size": 10}
    assert context.control.commands == [("region_register", expected)]


@pytest.mark.parametrize(
    ("kind", "body", "status", "text"),
    [
        ("system", b'{"byte_size":10}', 400, "Shared memory register request has no 'key' field"),  # E-153
        ("system", b'{"key":"/k"}', 400, "Shared memory register request has no 'byte_size' field"),
        ("system", b'{"key":5,"byte_size":1}', 500, "attempt to access JSON non-string as string"),
        (
            "system",
            b'{"key":"/k","byte_size":-1}',
            500,
            "attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        ("system", b"", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),
        ("system", b"[]", 400, "Shared memory register request has no 'key' field"),
        (
            "cuda",
            b'{"raw_handle":{"b64":"AAAA"},"device_id":0,"byte_size":10}',  # E-157
            400,
            "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t",
        ),
        (
            "cuda",
            b'{"raw_handle":{"b64":"\xc3\xa9"},"device_id":0,"byte_size":10}',
            400,
            "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t",
        ),
        ("cuda", b'{"device_id":0}', 400, "Shared memory register request has no 'raw_handle' field"),
        ("cuda", b'{"raw_handle":5}', 500, "attempt to access non-existing object member 'b64'"),
    ],
)
def test_register_errors(kind: str, body: bytes, status: int, text: str) -> None:
    """Spec H-193, H-196."""
    answer = ask(make_context(), "POST", f"/v2/{kind}sharedmemory/region/zz/register", body)
    assert answer.triple == (status, "application/json", b'{"error":"%s"}' % text.encode())


@pytest.mark.parametrize("kind", ["system", "cuda"])
def test_register_without_a_region(kind: str) -> None:
    """Spec H-193."""
    answer = ask(make_context(), "POST", f"/v2/{kind}sharedmemory/register", b"{}")
    text = f"'region name' is necessary to register {kind} shared memory region"
    assert answer.triple == (400, "application/json", b'{"error":"%s"}' % text.encode())


def test_unregister_one_or_all() -> None:
    """Spec H-194, E-154, E-155."""
    context = make_context()
    for path in ("/v2/systemsharedmemory/region/zz/unregister", "/v2/cudasharedmemory/unregister"):
        assert ask(context, "POST", path).triple == (200, "application/json", b"")
    assert isinstance(context.control, FakeControl)
    assert context.control.commands == [
        ("region_unregister", {"kind": "system", "name": "zz"}),
        ("region_unregister", {"kind": "cuda", "name": ""}),
    ]


def test_disabled_client_memory_says_how_to_enable_it() -> None:
    """Spec H-190: status still works."""
    context = make_context(replies={"region_status": []}, settings=ControlSettings(allow_client_shm=False))
    for action in ("register", "unregister"):
        answer = ask(context, "POST", f"/v2/systemsharedmemory/region/r/{action}", b'{"key":"/k","byte_size":1}')
        assert answer.triple == (
            501,
            "application/json",
            b'{"error":"Client shared memory is disabled. '
            b"Start the server with '--allow-client-shm=true' to enable.\"}",
        )
    assert ask(context, "GET", "/v2/systemsharedmemory/status").status == 200
