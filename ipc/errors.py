"""The one tree of errors that may reach a client, with Triton's status of each.

::

    ServingError            UNKNOWN         the base of all
      InvalidArgument       INVALID_ARG     the request is wrong; the text names the field
      NotFound              NOT_FOUND       no such model, version or region
      AlreadyExists         ALREADY_EXISTS  a region of that name is registered
      Unavailable           UNAVAILABLE     try again, or elsewhere
        QueueFull                           the model's queue is at its limit
        ArenaFull                           no room for the request's tensors
        NotReady                            the model version is loading or unloading
          Moved                             it has left the GPU that a tensor of the request lies on
        Draining                            the server is stopping
      Cancelled             CANCELLED       the client left, or its deadline passed
      Unsupported           UNSUPPORTED     known, and not offered here
      Internal              INTERNAL        our side failed
        BackendFailed                       the model's code raised or answered nonsense
        WorkerDied                          the process that ran the request ended

Every process raises these; an error crosses a process as ``(code, text)`` and is rebuilt with :func:`from_wire`.
Only ``frontend/errors.py`` knows HTTP statuses. Codes: spec 00.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Code(enum.IntEnum):
    """Triton's eight codes; the numbers are ours and travel on the wire."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7

    @property
    def label(self) -> str:
        """How Triton prints the code in reasons and logs, for example ``Invalid argument``."""
        return _LABELS[self]


_LABELS = {
    Code.UNKNOWN: "Unknown",
    Code.INTERNAL: "Internal",
    Code.NOT_FOUND: "Not found",
    Code.INVALID_ARG: "Invalid argument",
    Code.UNAVAILABLE: "Unavailable",
    Code.UNSUPPORTED: "Unsupported",
    Code.ALREADY_EXISTS: "Already exists",
    Code.CANCELLED: "Cancelled",
}


class ServingError(Exception):
    """Base of every error whose text a client may read."""

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(self, text: str) -> None:
        super().__init__(text)
        #: May cross a process: half a surrogate pair, as in a file name that is no UTF-8, is written as its number.
        self.text = text if text.isascii() else text.encode(errors="backslashreplace").decode()

    def __str__(self) -> str:
        return self.text


class InvalidArgument(ServingError):
    """The caller's request is wrong."""

    code = Code.INVALID_ARG


class NotFound(ServingError):
    """The caller named something that does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(ServingError):
    """The caller registered a name twice."""

    code = Code.ALREADY_EXISTS


class Unavailable(ServingError):
    """We cannot take the request now."""

    code = Code.UNAVAILABLE


#: Text of a request that its model's queue has no room for (spec S-025).
QUEUE_FULL_TEXT = "Exceeds maximum queue size"


class QueueFull(Unavailable):
    """The model's queue is at its configured limit (spec S-025)."""


class ArenaFull(Unavailable):
    """No free shared memory for the request's tensors; the limit's flag is named in the text."""


class NotReady(Unavailable):
    """The model version exists and is not READY."""


class Moved(NotReady):
    """The model has left the GPU that a tensor of the request lies on. It may be asked again."""


def moved_text(model: str, device_id: int) -> str:
    """Return the text of :class:`Moved`."""
    return f"model '{model}' has left GPU {device_id}, which a tensor of the request lies on; try again"


class Draining(Unavailable):
    """The server is stopping."""


class Cancelled(ServingError):
    """The client left or its deadline passed."""

    code = Code.CANCELLED


class Unsupported(ServingError):
    """Known, and not offered."""

    code = Code.UNSUPPORTED


class Internal(ServingError):
    """Our side failed; also JSON syntax and type errors, as Triton classes them (spec H-002)."""

    code = Code.INTERNAL


class BackendFailed(Internal):
    """The model's own code raised, or answered with the wrong tensors."""


class WorkerDied(Internal):
    """The worker process ended while it ran the request."""


_BY_CODE: dict[Code, type[ServingError]] = {
    Code.UNKNOWN: ServingError,
    Code.INTERNAL: Internal,
    Code.NOT_FOUND: NotFound,
    Code.INVALID_ARG: InvalidArgument,
    Code.UNAVAILABLE: Unavailable,
    Code.UNSUPPORTED: Unsupported,
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.CANCELLED: Cancelled,
}


def from_wire(code: int, text: str) -> ServingError:
    """Rebuild an error that crossed a process; an unknown code becomes ``UNKNOWN``."""
    try:
        return _BY_CODE[Code(code)](text)
    except ValueError:
        return ServingError(text)
