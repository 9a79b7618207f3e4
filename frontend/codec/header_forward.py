"""Which headers may become request parameters: ``--http-header-forward-pattern``, ``--grpc-header-forward-pattern``."""

from __future__ import annotations

from forebay.ipc.errors import InvalidArgument

#: Parameter names with a meaning of their own; a client must not set them through a header.
_RESERVED_NAMES = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)


def reserved_name_error(name: str) -> InvalidArgument | None:
    """Return why a header that matches the operator's pattern is refused (spec H-159); None: it may be forwarded."""
    lowered = name.lower()
    if lowered in _RESERVED_NAMES or lowered.startswith("triton_"):
        return InvalidArgument(f"Header '{name}' is reserved for Triton usage and cannot be forwarded.")
    return None
