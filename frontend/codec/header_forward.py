"""HTTP headers as request parameters: ``--http-header-forward-pattern`` (spec H-158, H-159). HTTP frontend; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from forebay.frontend.codec.infer_request import ParsedInfer
from forebay.ipc.errors import InvalidArgument

#: Parameter names with a meaning of their own; a client must not set them through a header.
RESERVED_NAMES = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)


class HeaderForwarder:
    """Adds the headers that match the operator's pattern to inference requests; not to generate requests."""

    def __init__(self, pattern: str) -> None:
        """Take the pattern of the flag; empty: forward nothing.

        Raises:
            InvalidArgument: it is no regular expression; for the operator, at start-up.
        """
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE) if pattern else None
        except re.error as error:
            raise InvalidArgument(f"invalid header forward pattern '{pattern}': {error}") from None

    @property
    def is_active(self) -> bool:
        return self._pattern is not None

    def add_parameters(self, request: ParsedInfer, headers: Iterable[tuple[str, str]]) -> ParsedInfer:
        """Return the request with each matching header as a string parameter, named as it was sent.

        Raises:
            InvalidArgument: a matching header bears a reserved name.
        """
        if self._pattern is None:
            return request
        forwarded = {name: value for name, value in headers if self._pattern.search(name)}
        for name in forwarded:
            if name.lower() in RESERVED_NAMES or name.lower().startswith("triton_"):
                raise InvalidArgument(f"Header '{name}' is reserved for Triton usage and cannot be forwarded.")
        if not forwarded:
            return request
        return msgspec.structs.replace(request, parameters={**request.parameters, **forwarded})
