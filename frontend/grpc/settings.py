"""The settings that the gRPC port obeys, picked from what the supervisor sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from forebay.frontend.handlers.context import RestrictedApi

#: What the metadata key of a restriction starts with (spec G-080).
_RESTRICTED_PREFIX = "triton-grpc-protocol-"

_SERVICE = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"

#: The calls of each protocol that can be restricted; `RestrictedFeatures` and grpc_server.cc of Triton.
PROTOCOL_PATHS: dict[str, tuple[str, ...]] = {
    "health": (
        *(_SERVICE + name for name in ("ServerLive", "ServerReady", "ModelReady")),
        _HEALTH + "Check",
        _HEALTH + "Watch",
    ),
    "metadata": (_SERVICE + "ServerMetadata", _SERVICE + "ModelMetadata"),
    "inference": (_SERVICE + "ModelInfer", _SERVICE + "ModelStreamInfer"),
    "shared-memory": tuple(
        f"{_SERVICE}{kind}SharedMemory{verb}"
        for kind in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    ),
    "model-config": (_SERVICE + "ModelConfig",),
    "model-repository": tuple(
        _SERVICE + name for name in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
    ),
    "statistics": (_SERVICE + "ModelStatistics",),
    "trace": (_SERVICE + "TraceSetting",),
    "logging": (_SERVICE + "LogSettings",),
}


class GrpcView(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of ``GrpcSettings``; see engine/settings.py for their meaning."""

    header_forward_pattern: str = ""
    max_response_pool_size: int = 2_147_483_647
    use_ssl: bool = False
    use_ssl_mutual: bool = False
    server_cert: str = ""
    server_key: str = ""
    root_cert: str = ""
    infer_response_compression_level: Literal["none", "low", "medium", "high"] = "none"
    keepalive_time: int = 7_200_000
    keepalive_timeout: int = 20_000
    keepalive_permit_without_calls: bool = False
    http2_max_pings_without_data: int = 2
    http2_min_recv_ping_interval_without_data: int = 300_000
    http2_max_ping_strikes: int = 2
    max_connection_age: int | None = None
    max_connection_age_grace: int | None = None
    restricted_protocols: tuple[RestrictedApi, ...] = ()

    @classmethod
    def from_groups(cls, groups: Mapping[str, Any]) -> GrpcView:
        """Pick them from ``FrontendStart.settings``; what is missing keeps its default."""
        group: Mapping[str, Any] = groups.get("grpc") or {}
        return msgspec.convert({name: group[name] for name in cls.__struct_fields__ if name in group}, cls)

    @property
    def restrictions(self) -> dict[str, tuple[str, str]]:
        """Path to the metadata key and value that its calls need (spec G-080)."""
        return {
            path: (_RESTRICTED_PREFIX + rule.key.lower(), rule.value)
            for rule in self.restricted_protocols
            for protocol in rule.apis
            for path in PROTOCOL_PATHS.get(protocol, ())
        }
