"""Index, load and unload: what is asked of the supervisor, and what the client reads."""

from __future__ import annotations

import json

import pytest
from fake_frontend import FakeControl, ask, make_context

from forebay.frontend.handlers.context import ControlContext
from forebay.ipc.errors import Internal, InvalidArgument, ServingError, Unavailable


def commands(context: ControlContext) -> list[tuple[str, dict[str, object]]]:
    assert isinstance(context.control, FakeControl)
    return context.control.commands


@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/repository/foo/index"])
@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"ready":false}'])
def test_index(path: str, body: bytes | None) -> None:
    """Spec H-210, H-211, E-013, E-095."""
    entries = [
        {"name": "bad"},
        {"name": "dec", "version": "1", "state": "READY", "reason": ""},
        {"state": "UNAVAILABLE", "reason": "Internal: no init\n", "version": 1, "name": "initfail"},
    ]
    context = make_context(replies={"index": entries})
    assert ask(context, "POST", path, body).triple == (
        200,
        "application/json",
        b'[{"name":"bad"},{"name":"dec","version":"1","state":"READY"},'
        b'{"name":"initfail","version":"1","state":"UNAVAILABLE","reason":"Internal: no init\\n"}]',
    )
    assert commands(context) == [("index", {"ready": False})]


def test_index_of_ready_models_only() -> None:
    """Spec H-212, E-014."""
    context = make_context(replies={"index": []})
    assert ask(context, "POST", "/v2/repository/index", b'{"ready":true}').body == b"[]"
    assert commands(context) == [("index", {"ready": True})]
    assert ask(context, "POST", "/v2/repository/index", b'{"ready":1}').triple == (
        500,
        "application/json",
        b'{"error":"attempt to access JSON non-boolean as boolean"}',
    )


def test_load_answers_empty_json() -> None:
    """Spec H-214, E-081."""
    context = make_context()
    assert ask(context, "POST", "/v2/repository/models/f64/load").triple == (200, "application/json", b"")
    assert commands(context) == [("load", {"name": "f64", "config": None, "files": {}})]


def test_load_with_config_and_files() -> None:
    """Spec H-215, H-216, H-316: base64 with or without line breaks and padding."""
    context = make_context()
    config = '{"backend":"identity"}'
    body = {"parameters": {"config": config, "file:1/model.onnx": "AAEC\nAw==", "file:1/b": "AAE"}}
    assert ask(context, "POST", "/v2/repository/models/m/load", json.dumps(body).encode()).status == 200
    files = {"1/model.onnx": b"\0\1\2\3", "1/b": b"\0\1"}
    assert commands(context) == [("load", {"name": "m", "config": config, "files": files})]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"parameters":{"foo":"x"}}', 500, "unexpected error on creating Triton parameter"),  # E-098
        (b'{"parameters":{"config":5}}', 500, "attempt to access JSON non-string as string"),  # H-217
        (b'{"parameters":[]}', 500, "attempt to get members for non-object"),
        (b"xx", 500, "failed to parse the request JSON buffer: Invalid value. at 0"),
        (b'{"parameters":{"file:1/x":"*"}}', 400, "load parameter 'file:1/x' is not valid base64"),
    ],
)
def test_load_of_a_bad_body_reaches_no_supervisor(body: bytes, status: int, text: str) -> None:
    context = make_context()
    answer = ask(context, "POST", "/v2/repository/models/m/load", body)
    assert answer.triple == (status, "application/json", b'{"error":"%s"}' % text.encode())
    assert commands(context) == []


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (
            Internal("failed to load 'nope', failed to poll from model repository"),  # E-090
            500,
            b'{"error":"failed to load \'nope\', failed to poll from model repository"}',
        ),
        (
            InvalidArgument("load failed for model 'f32': version 1 is at UNAVAILABLE state: Invalid argument: x.;\n"),
            400,  # E-103: a real newline at the end
            b'{"error":"load failed for model \'f32\': version 1 is at UNAVAILABLE state: Invalid argument: x.;\\n"}',
        ),
        (
            Unavailable("explicit model load / unload is not allowed if polling is enabled"),  # E-163
            503,
            b'{"error":"explicit model load / unload is not allowed if polling is enabled"}',
        ),
    ],
)
def test_errors_of_the_supervisor_keep_code_and_text(error: ServingError, status: int, body: bytes) -> None:
    """Spec H-218, H-221."""
    context = make_context(replies={"load": error})
    assert ask(context, "POST", "/v2/repository/models/m/load").triple == (status, "application/json", body)


def test_named_repository_is_not_supported() -> None:
    """Spec H-222, E-094."""
    for action in ("load", "unload"):
        assert ask(make_context(), "POST", f"/v2/repository/foo/models/f32/{action}").triple == (
            501,
            "application/json",
            b'{"error":"\'repository_name\' specification is not supported"}',
        )


@pytest.mark.parametrize("name", ["..", ".", "a\\b"])
def test_names_that_leave_the_repository_are_refused(name: str) -> None:
    """Spec H-223."""
    context = make_context()
    answer = ask(context, "POST", f"/v2/repository/models/{name}/load")
    assert answer.status == 400
    assert b"model name must not contain path traversal characters" in answer.body
    assert commands(context) == []


def test_escaped_traversal_is_an_ordinary_name() -> None:
    """Spec H-223, E-093: nothing is decoded, so the supervisor simply does not find it."""
    context = make_context()
    ask(context, "POST", "/v2/repository/models/..%2fx/load")
    assert commands(context)[0][1]["name"] == "..%2fx"


@pytest.mark.parametrize(
    ("body", "dependents"),
    [(None, False), (b"{}", False), (b'{"parameters":{"unload_dependents":true}}', True)],
)
def test_unload(body: bytes | None, dependents: bool) -> None:
    """Spec H-220."""
    context = make_context()
    assert ask(context, "POST", "/v2/repository/models/m/unload", body).triple == (200, "application/json", b"")
    assert commands(context) == [("unload", {"name": "m", "unload_dependents": dependents})]


def test_unload_with_a_flag_that_is_no_bool() -> None:
    answer = ask(make_context(), "POST", "/v2/repository/models/m/unload", b'{"parameters":{"unload_dependents":"x"}}')
    assert answer.triple == (
        500,
        "application/json",
        b'{"error":"Unable to parse \'unload_dependents\': attempt to access JSON non-boolean as boolean"}',
    )
