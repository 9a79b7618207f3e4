"""The settings that the HTTP port obeys, picked from what the supervisor sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from forebay.frontend.handlers.context import RestrictedApi


class HttpView(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of ``HttpSettings``; see engine/settings.py for their meaning."""

    max_input_size: int = 67_108_864
    header_forward_pattern: str = ""
    restricted_apis: tuple[RestrictedApi, ...] = ()
    max_connections: int = 10_000
    request_timeout_secs: float = 60.0

    @classmethod
    def from_groups(cls, groups: Mapping[str, Any]) -> HttpView:
        """Pick them from ``FrontendStart.settings``; what is missing keeps its default."""
        group: Mapping[str, Any] = groups.get("http") or {}
        return msgspec.convert({name: group[name] for name in cls.__struct_fields__ if name in group}, cls)

    @property
    def inference_keys(self) -> tuple[tuple[str, str], ...]:
        """(header, value) that inference requests need (spec H-010)."""
        return tuple((api.key, api.value) for api in self.restricted_apis if "inference" in api.apis)
