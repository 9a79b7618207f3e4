"""What a request carries besides its tensors."""

from __future__ import annotations

import msgspec

from forebay.ipc.messages import ParameterValue


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a request carries besides its tensors. Names and meanings as in the KServe protocol."""

    request_id: str = ""
    outputs: tuple[str, ...] = ()
    """Outputs wanted; empty: all."""
    parameters: dict[str, ParameterValue] = {}
    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    priority: int = 0
    timeout_us: int = 0
    """For the model's queue policy; how long the caller waits is another matter."""
    deadline_ns: int = 0
    """Monotonic time after which nobody waits."""

    @property
    def needs_parcel(self) -> bool:
        return bool(self.sequence_id or self.parameters)


NO_OPTIONS = Options()
