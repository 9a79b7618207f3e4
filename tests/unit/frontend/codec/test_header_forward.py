"""Headers as request parameters (spec H-158, H-159)."""

import pytest

from forebay.frontend.codec.header_forward import HeaderForwarder
from forebay.frontend.codec.infer_request import ParsedInfer
from forebay.ipc.errors import InvalidArgument

REQUEST = ParsedInfer(inputs=(), parameters={"a": 1})


def test_matching_headers_become_parameters():
    """Case is ignored and a part of the name is enough; the name stays as sent."""
    headers = [("X-Fwd-User", "u"), ("my-x-fwd", "v"), ("Host", "h")]
    request = HeaderForwarder("X-Fwd.*").add_parameters(REQUEST, headers)
    assert request.parameters == {"a": 1, "X-Fwd-User": "u", "my-x-fwd": "v"}
    assert REQUEST.parameters == {"a": 1}


def test_nothing_to_forward():
    assert HeaderForwarder("").add_parameters(REQUEST, [("X", "y")]) is REQUEST
    assert not HeaderForwarder("").is_active
    assert HeaderForwarder("^Z").add_parameters(REQUEST, [("X", "y")]) is REQUEST
    assert HeaderForwarder("^Z").is_active


@pytest.mark.parametrize("name", ["priority", "Timeout", "headers", "triton_x", "sequence_id"])
def test_reserved_names(name):
    with pytest.raises(InvalidArgument) as caught:
        HeaderForwarder(".*").add_parameters(REQUEST, [(name, "1")])
    assert caught.value.text == f"Header '{name}' is reserved for Triton usage and cannot be forwarded."


def test_bad_pattern():
    with pytest.raises(InvalidArgument, match="invalid header forward pattern"):
        HeaderForwarder("(")
