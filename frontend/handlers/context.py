"""What every handler gets and gives: the frontend's state, the call, the reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from forebay.frontend.codec.rapid_json import Json, parse_json
from forebay.frontend.control_client import CommandSender
from forebay.frontend.statistics import Words

#: Content types as Triton sends them (spec H-003).
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain"


class RestrictedApi(msgspec.Struct, frozen=True):
    """APIs that only answer requests with the header ``key`` of exactly this value (spec H-010, H-011)."""

    apis: tuple[str, ...]
    key: str
    value: str


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that these endpoints obey; spec F-002, F-046..F-048."""

    server_id: str = "triton"
    max_input_size: int = 67_108_864
    """Bytes of a request body at most."""
    restricted_apis: tuple[RestrictedApi, ...] = ()
    allow_client_shm: bool = False

    @classmethod
    def from_groups(cls, groups: Mapping[str, Any]) -> ControlSettings:
        """Pick them from the settings groups of `FrontendStart.settings`; what is missing keeps its default."""
        server: Mapping[str, Any] = groups.get("server", {})
        http: Mapping[str, Any] = groups.get("http", {})
        memory: Mapping[str, Any] = groups.get("memory", {})
        found: dict[str, Any] = {
            "server_id": server.get("id"),
            "max_input_size": http.get("max_input_size"),
            "restricted_apis": http.get("restricted_apis"),
            "allow_client_shm": memory.get("allow_client_shm"),
        }
        return msgspec.convert({name: value for name, value in found.items() if value is not None}, cls)


#: What answers the requests of a route; every error that the client may read is raised as a `ServingError`.
Handler = Callable[["ControlContext", "Call"], Awaitable["Reply"]]


@dataclass
class ControlContext:
    """One frontend process, as its handlers see it."""

    settings: ControlSettings
    control: CommandSender
    words: Words
    """uint64: the whole counters file."""
    is_exiting: bool = False
    """True from the moment the server drains: every new call is answered 503 (spec H-009)."""


@dataclass(frozen=True)
class Call:
    """One request, its path already matched."""

    method: str
    groups: Mapping[str, str]
    """Named groups of the route's pattern; an absent one is the empty string."""
    body: bytes = b""

    def json(self) -> Json:
        """Parse the body; an empty one is an error too, as in Triton (spec H-252)."""
        return parse_json(self.body)

    def optional_json(self) -> Json:
        """Parse the body, None if it is empty."""
        return parse_json(self.body) if self.body else None


@dataclass(frozen=True)
class Reply:
    """What to send back."""

    body: bytes = b""
    status: int = 200
    content_type: str = JSON_TYPE
