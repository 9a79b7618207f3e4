"""What a request carries besides its tensors."""

from __future__ import annotations

import time

import msgspec

from forebay.ipc.messages import ParameterValue
from forebay.ipc.spans import Trace


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
    trace: Trace | None = None
    """Of a request that is made for one that is traced."""

    @property
    def is_bare(self) -> bool:
        """Whether a model sees no difference to a request that carries nothing but tensors."""
        return not (
            self.request_id
            or self.outputs
            or self.timeout_us
            or self.sequence_start
            or self.sequence_end
            or self.trace
            or self.needs_parcel
        )

    @property
    def needs_parcel(self) -> bool:
        return bool(self.sequence_id or self.parameters)


NO_OPTIONS = Options()


def deadline_after(timeout_s: float | None) -> int:
    """Return the monotonic time in ns at which ``timeout_s`` has passed; 0 for None."""
    return 0 if timeout_s is None else time.monotonic_ns() + int(timeout_s * 1e9)
