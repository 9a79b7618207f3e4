"""The sequences of one connection that have begun and not ended: a server that stops lets them go on (spec R-112)."""

from __future__ import annotations

import time

from forebay.frontend.codec.infer_request import ParsedInfer
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import Unavailable
from forebay.ipc.validation import id_prefix

#: More of one connection are not remembered.
_SEQUENCES_MAX = 1024

#: A model version's route and the correlation id.
_Key = tuple[int, int | str]


class OpenSequences:
    """Which they are, and until when their next request may come."""

    __slots__ = ("_ends_s",)

    def __init__(self) -> None:
        #: The one that was asked last is the last.
        self._ends_s: dict[_Key, float] = {}

    def asked(self, entry: ModelEntry, request: ParsedInfer) -> None:
        """A request is handed over."""
        key = _key(entry, request)
        self._ends_s.pop(key, None)
        if request.sequence_id and not request.sequence_end:
            self._ends_s[key] = time.monotonic() + entry.sequence_idle_us / 1e6
        if len(self._ends_s) > _SEQUENCES_MAX:
            self._ends_s.pop(next(iter(self._ends_s)))

    def answered(self, entry: ModelEntry, request: ParsedInfer, *, has_failed: bool) -> None:
        """A request of a sequence has its answer; one that failed may have been no part of it."""
        key = _key(entry, request)
        if key not in self._ends_s:
            return
        if has_failed:
            del self._ends_s[key]
        else:
            self._ends_s[key] = time.monotonic() + entry.sequence_idle_us / 1e6

    def check_goes_on(self, entry: ModelEntry, request: ParsedInfer) -> None:
        """Refuse a request, while the server stops, unless its sequence has begun.

        Raises:
            Unavailable: it belongs to no sequence, or to a new one.
        """
        if request.sequence_start or _key(entry, request) not in self._ends_s:
            raise Unavailable(
                f"{id_prefix(request.id)}Server is stopping, scheduler for model has stopped accepting new inference "
                "requests"
            )

    def __bool__(self) -> bool:
        """Whether any of them may get further requests."""
        now_s = time.monotonic()
        return any(end_s > now_s for end_s in self._ends_s.values())


def _key(entry: ModelEntry, request: ParsedInfer) -> _Key:
    return entry.route, request.sequence_id
