"""What a request carries besides its tensors."""

from __future__ import annotations

import time

from forebay.ipc.request_options import RequestOptions

#: A timeout so long, some 30 years, is none; ``math.inf`` among others.
_FOREVER_S = 1e9


class Options(RequestOptions, frozen=True, kw_only=True):
    """What a request carries besides its tensors."""

    request_id: str = ""

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
    """Return the monotonic time in ns at which ``timeout_s`` has passed; 0, which is never, for None."""
    return 0 if timeout_s is None or timeout_s >= _FOREVER_S else time.monotonic_ns() + int(timeout_s * 1e9)
