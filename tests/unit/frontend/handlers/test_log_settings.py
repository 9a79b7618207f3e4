"""Logging settings over HTTP."""

from __future__ import annotations

import pytest
from fake_frontend import FakeControl, ask, make_context

CURRENT = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
CURRENT_BODY = (
    b'{"log_file":"","log_info":true,"log_warning":true,"log_error":true,"log_verbose_level":0,"log_format":"default"}'
)


def test_get() -> None:
    """Spec H-261."""
    assert ask(make_context(replies={"log_get": CURRENT}), "GET", "/v2/logging").triple == (
        200,
        "application/json",
        CURRENT_BODY,
    )


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        (b'{"log_verbose_level":1,"log_info":false}', {"log_verbose_level": 1, "log_info": False}),  # E-141
        (b'{"log_format":"ISO8601"}', {"log_format": "ISO8601"}),  # E-142
        (b'{"foo":1,"log_error":null,"log_file":null}', {}),  # E-146
        (b'{"log_verbose_level":4294967301}', {"log_verbose_level": 5}),
        (b'{"log_verbose_level":2147483648}', {"log_verbose_level": 0}),
    ],
)
def test_post_changes_what_is_named(body: bytes, settings: dict[str, object]) -> None:
    context = make_context(replies={"log_set": CURRENT})
    assert ask(context, "POST", "/v2/logging", body).triple == (200, "application/json", CURRENT_BODY)
    assert isinstance(context.control, FakeControl)
    assert context.control.commands == [("log_set", {"settings": settings})]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"log_file":"x"}', 501, "log file location can not be updated through network protocol"),  # E-143
        (b'{"log_info":1}', 500, "attempt to access JSON non-boolean as boolean"),  # E-145
        (b'{"log_verbose_level":-1}', 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),  # E-147
        (b'{"log_format":"x"}', 503, "invalid argument for --log_format, got: x"),  # H-262
        (b'{"log_format":1}', 500, "attempt to access JSON non-string as string"),
        (b"", 500, "failed to parse the request JSON buffer: The document is empty. at 0"),
    ],
)
def test_bad_settings_change_nothing(body: bytes, status: int, text: str) -> None:
    context = make_context()
    answer = ask(context, "POST", "/v2/logging", body)
    assert answer.triple == (status, "application/json", b'{"error":"%s"}' % text.encode())
    assert isinstance(context.control, FakeControl)
    assert context.control.commands == []
