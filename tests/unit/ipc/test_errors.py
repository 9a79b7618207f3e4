"""Errors whose texts clients read."""

from __future__ import annotations

from forebay.ipc.errors import Internal


def test_any_text_can_be_told() -> None:
    """Python keeps bytes that are no UTF-8 as lone surrogates, which no encoder takes."""
    assert Internal("cannot open 'a\udc80é'").text == "cannot open 'a\\udc80é'"
    assert Internal("plain").text == "plain"
