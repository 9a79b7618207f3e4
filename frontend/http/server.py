"""What all connections of one HTTP frontend share: the scratch buffer, the caches, the engine, the limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from forebay.frontend.app import ControlServer
from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.http.connection import SCRATCH_BYTES, Connection
from forebay.frontend.http.general_path import DirectUpload, GeneralCall
from forebay.frontend.http.head import Head, HeadError, HeadParser
from forebay.frontend.http.settings import HttpView
from forebay.frontend.http.side_door import NotifyingConnection

#: Seconds a client may take to send a request it has begun.
REQUEST_SECS_MAX = 60.0
#: How often that is looked at.
_SWEEP_SECS = 5.0


class HttpFrontend:
    """The shared part. Used by one event loop."""

    def __init__(
        self, engine: EngineClient, settings: HttpView, control: ControlServer, catalog: CatalogView, heads: HeadParser
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.catalog = catalog
        self.heads = heads
        self.scratch = bytearray(SCRATCH_BYTES)
        self.scratch_view = memoryview(self.scratch)
        #: Bytes of an inference request's body at most: it must fit into shared memory.
        self.body_bytes_max = engine.arena.byte_size
        #: Bytes of any other request's body at most; kept in private memory, so bounded more tightly.
        self.control_bytes_max = settings.max_input_size
        self._control = control
        self._connections: set[Connection] = set()
        self._waiting: dict[Connection, float] = {}
        self._is_draining = False
        #: Bytes of replies that had to be copied because the client or an earlier reply was slow.
        self.copied_out_bytes = 0

    def connection(self) -> Connection:
        """Make the protocol object of a new connection."""
        return Connection(self)

    def make_control_connection(self, on_finished: Callable[[], None]) -> NotifyingConnection:
        return NotifyingConnection(self._control, on_finished)

    def take_catalog(self, catalog: CatalogView) -> None:
        """Route by a new catalog from now on."""
        self.catalog = catalog
        self.engine.update_catalog(catalog.catalog)
        self.heads.clear()

    def check_length(self, head: Head) -> None:
        """Refuse bodies that could never be taken.

        Raises:
            HeadError: too large; the connection is closed because the body is not read.
        """
        limit = self.settings.max_input_size
        if head.header_length is None and head.content_length > limit:
            raise HeadError(
                400,
                f"request JSON size of {head.content_length} bytes exceeds the maximum allowed input size of {limit} "
                "bytes. Use --http-max-input-size to increase the limit.",
            )
        if head.content_length > self.body_bytes_max:
            raise HeadError(
                413,
                f"request body of {head.content_length} bytes exceeds the {self.body_bytes_max} bytes of shared memory "
                "for requests in flight; raise --arena-byte-size",
            )

    def new_call(self, connection: Connection, head: Head) -> GeneralCall:
        return GeneralCall(self, connection, head)

    def open_upload(self, connection: Connection, head: Head, data: memoryview) -> DirectUpload:
        """Begin to receive a large body; ``data`` is what has arrived of it, the JSON included."""
        return DirectUpload(self, GeneralCall(self, connection, head), head, data)

    def copied_out(self, count: int) -> None:
        self.copied_out_bytes += count

    # --- connections ---

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._waiting.pop(connection, None)

    def waiting(self, connection: Connection) -> None:
        """The connection has begun a request and not finished it."""
        connection.since = time.monotonic()
        if not self._waiting:
            asyncio.get_running_loop().call_later(_SWEEP_SECS, self._sweep)
        self._waiting[connection] = connection.since

    def no_longer_waiting(self, connection: Connection) -> None:
        connection.since = 0.0
        self._waiting.pop(connection, None)

    def _sweep(self) -> None:
        deadline = time.monotonic() - REQUEST_SECS_MAX
        for connection, since in list(self._waiting.items()):
            if since < deadline:
                self.no_longer_waiting(connection)
                connection.time_out()
        if self._waiting:
            asyncio.get_running_loop().call_later(_SWEEP_SECS, self._sweep)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def drain(self) -> None:
        """Close what is idle, and the rest as soon as it has been answered."""
        self._is_draining = True
        for connection in list(self._connections):
            connection.drain()

    def abort(self) -> None:
        """Close everything now."""
        for connection in list(self._connections):
            connection.abort()
