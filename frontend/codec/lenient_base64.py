"""Base64 as Triton's clients send it."""

from __future__ import annotations

import base64
import binascii


def decode_base64(text: str) -> bytes | None:
    """Return the bytes, or None for what is no base64; line breaks and missing padding are forgiven, as by libb64."""
    bare = text.encode("ascii", "replace").translate(None, b"\r\n\t =")
    try:
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except binascii.Error:
        return None
