"""Headers as request parameters (spec H-158, H-159)."""

import pytest

from forebay.frontend.codec.header_forward import reserved_name_error


@pytest.mark.parametrize("name", ["priority", "Timeout", "headers", "triton_x", "sequence_id"])
def test_reserved_names(name):
    error = reserved_name_error(name)
    assert error is not None
    assert error.text == f"Header '{name}' is reserved for Triton usage and cannot be forwarded."


def test_other_names():
    assert reserved_name_error("X-Fwd-User") is None
