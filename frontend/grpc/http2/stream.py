"""One stream of an HTTP/2 connection, and who answers it: what the protocol and those who use it know of each other."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from forebay.frontend.grpc.http2.connection import Connection

Buffer: TypeAlias = bytes | memoryview

#: What we allow a client to send on one stream before we say that it was taken.
STREAM_WINDOW = 4 * 1024 * 1024


class Stream:
    """One call's stream. The connection calls the ``on_`` methods; subclasses give them meaning."""

    __slots__ = (
        "connection", "id", "is_local_closed", "is_remote_closed", "queue", "queued_bytes", "receive_window",
        "send_window", "tail", "taken_bytes",
    )  # fmt: skip

    def __init__(self, connection: Connection[Any], number: int) -> None:
        self.connection = connection
        self.id = number
        self.send_window = connection.initial_send_window
        self.receive_window = STREAM_WINDOW
        self.taken_bytes = 0
        #: Reply bytes that wait for windows: header blocks (``bytes``) and DATA payload (``memoryview``).
        self.queue: deque[Buffer] = deque()
        self.queued_bytes = 0
        #: Trailers' block, once no more data will be added.
        self.tail: bytes | None = None
        self.is_remote_closed = False
        self.is_local_closed = False

    @property
    def holds_back(self) -> bool:
        """Whether the client is to send no more than it may already."""
        return False

    def on_data(self, chunk: memoryview, *, is_end: bool) -> None:
        """Some bytes of the request; the view is valid during the call only."""

    def direct_place(self, limit: int) -> memoryview | None:
        """Return where the next bytes of data, at most ``limit``, shall be received to; None: anywhere."""
        return None

    def direct_received(self, count: int) -> None:
        """``count`` bytes of data lie where :meth:`direct_place` said."""

    def on_reset(self) -> None:
        """The client, or the end of the connection, has ended the call."""

    def on_drained(self) -> None:
        """Everything that waited has been written."""


HeadIn = TypeVar("HeadIn", contravariant=True)


class Application(Protocol[HeadIn]):
    """Who answers the calls of a connection."""

    def open_stream(self, number: int, head: HeadIn, *, is_end: bool) -> Stream:
        """A request's header has arrived; return the stream object, which may have answered already."""
        ...

    def are_trailers(self, head: HeadIn) -> bool:
        """Return whether a block behind a request's data may stand there: it has no pseudo-fields (RFC 9113, 8.1)."""
        ...

    def on_ping(self) -> None:
        """The client has sent a PING, which has been answered."""
        ...

    def on_pong(self) -> None:
        """The client has answered our PING."""
        ...

    def on_idle(self) -> None:
        """The last open stream has ended."""
        ...

    def on_closed(self) -> None:
        """A GOAWAY with an error has been written: close the connection when it is out."""
        ...
