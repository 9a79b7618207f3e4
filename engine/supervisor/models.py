"""What is known of each model: its directory, what serves, its versions' states, and why something does not serve.

A version's states (spec R-099)::

    (unknown) -> LOADING -> READY -> UNLOADING -> UNAVAILABLE "unloaded"
                    |         ^ |
                    v         | v
               UNAVAILABLE(reason)       its workers died / were replaced
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from forebay.engine.repository.found_model import FoundModel
from forebay.engine.supervisor.served_version import ServedVersion
from forebay.ipc.errors import Code, Internal, InvalidArgument, ServingError

#: Reason of a version that somebody unloaded (spec H-213).
UNLOADED = "unloaded"


@dataclass(slots=True)
class VersionStatus:
    """What the index says of one version."""

    state: str
    reason: str = ""
    is_excused: bool = False
    """Failed for want of an optional library."""


@dataclass(slots=True)
class Model:
    """Everything about one model name."""

    name: str
    found: FoundModel | None = None
    """The directory as it was when last loaded or tried."""
    serving: dict[int, ServedVersion] = field(default_factory=dict[int, ServedVersion])
    status: dict[int, VersionStatus] = field(default_factory=dict[int, VersionStatus])
    problem: str = ""
    """Why it could not even be polled, or why its last update failed."""
    has_no_version: bool = False
    """When it was last tried, no version satisfied its policy."""
    is_excused: bool = False
    backend: str = ""
    """As configured when it was last loaded or tried; for tables."""
    load_error: str = ""
    """Why its last load failed, as Triton says it behind the model's name."""
    lacks_models: bool = False
    """That was because of the models of which this ensemble consists."""
    is_implicit: bool = False
    """Loaded because an ensemble needs it, not because anybody asked for it (spec R-095)."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def forget_failures(self) -> None:
        """Know no version any more that could not be loaded and does not serve."""
        for version, status in list(self.status.items()):
            if version not in self.serving and status.state == "UNAVAILABLE" and status.reason != UNLOADED:
                del self.status[version]


class LoadFailed(ServingError):
    """A load failed; what served before goes on. Carries Triton's text and code."""

    code = Code.INVALID_ARG


class DependencyFailed(InvalidArgument):
    """An ensemble cannot be made of its models; Triton says so of the ensemble, not of a version (spec R-097)."""


class PollFailed(Internal):
    """A model's directory or configuration cannot be used (spec H-218)."""
