"""Statuses and bodies of errors (spec 00, H-001, H-002)."""

import pytest

from forebay.frontend.errors import HTTP_STATUS, error_body, http_status
from forebay.ipc.errors import (
    AlreadyExists,
    BackendFailed,
    Cancelled,
    Code,
    Internal,
    InvalidArgument,
    NotFound,
    QueueFull,
    ServingError,
    Unavailable,
    Unsupported,
    from_wire,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ServingError("x"), 400),
        (Internal("x"), 500),
        (BackendFailed("x"), 500),
        (NotFound("x"), 404),
        (InvalidArgument("x"), 400),
        (Unavailable("x"), 503),
        (QueueFull("x"), 503),
        (Unsupported("x"), 501),
        (AlreadyExists("x"), 400),
        (Cancelled("x"), 400),
        (from_wire(99, "x"), 400),
        (ValueError("a fault of ours"), 500),
    ],
)
def test_status(error, status):
    assert http_status(error) == status


def test_every_code_has_a_status():
    assert set(HTTP_STATUS) == set(Code)


def test_body():
    """E-103, E-165: newlines escaped, non-ASCII raw."""
    assert error_body("a;\n'b' \"é\" \\") == '{"error":"a;\\n\'b\' \\"é\\" \\\\"}'.encode()
    assert error_body("") == b'{"error":""}'
    assert error_body("\udcff") == b'{"error":"\xff"}'
