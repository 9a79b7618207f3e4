"""What all connections of one HTTP frontend share: the scratch buffer, the caches, the engine, the limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from forebay.frontend.app import ControlServer
from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.http.connection import SCRATCH_BYTES, UPLOAD_HEAD_BYTES, Connection
from forebay.frontend.http.direct_upload import DirectUpload
from forebay.frontend.http.express import Express
from forebay.frontend.http.fast_path import InferPlan
from forebay.frontend.http.general_path import GeneralCall
from forebay.frontend.http.generate import GenerateCall
from forebay.frontend.http.head import Head, HeadError, HeadParser, Target
from forebay.frontend.http.known_request import find_plan
from forebay.frontend.http.planned_upload import PlannedUpload
from forebay.frontend.http.settings import HttpView
from forebay.frontend.http.side_door import NotifyingConnection
from forebay.frontend.regions import RegionTable
from forebay.ipc.errors import ArenaFull, ServingError, Unavailable
from forebay.ipc.log import log

#: How often deadlines of clients are looked at, s, while there are any.
_SWEEP_SECS = 1.0
#: A body must arrive at this rate on the average, once the time for a request is over, bytes per s.
_BODY_RATE_MIN = 64 * 1024
#: Incomplete requests of all connections together may take so many times the largest input in private memory.
_HELD_INPUTS_MAX = 4


class HttpFrontend:
    """The shared part. Used by one event loop."""

    def __init__(
        self,
        engine: EngineClient,
        settings: HttpView,
        control: ControlServer,
        catalog: CatalogView,
        heads: HeadParser,
        regions: RegionTable,
    ) -> None:
        self.engine = engine
        self.express = Express(engine)
        self.regions = regions
        self.settings = settings
        self.catalog = catalog
        self.heads = heads
        self.scratch = bytearray(SCRATCH_BYTES)
        self.scratch_view = memoryview(self.scratch)
        self.upload_head = self.scratch_view[:UPLOAD_HEAD_BYTES]
        #: Bytes of an inference request's body at most: it must fit into shared memory.
        self.body_bytes_max = engine.arena.byte_size
        self._control = control
        self._connections: set[Connection] = set()
        #: Connections that have something to do in a limited time.
        self._expecting: set[Connection] = set()
        #: Connections that do not take their replies: bytes left, and until when fewer must be left, s.
        self._stalled: dict[Connection, tuple[int, float]] = {}
        self._is_sweeping = False
        self._held_bytes = 0
        self._owed_bytes = 0
        #: Bytes of replies in private memory at most; the largest possible reply fits.
        self._owed_bytes_max = 2 * engine.arena.byte_size
        #: Called with True when there are as many connections as there may be, with False when there are fewer again.
        self.on_full: Callable[[bool], None] | None = None
        self._is_full = False
        #: Hands a socket, of which nothing is asked, over to another frontend, and says whether it has.
        self.hand_over: Callable[[int], bool] = _keep
        #: The server stops: each connection's next reply is its last.
        self.is_draining = False

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
        # Of a body with binary tensors only the JSON is bounded (spec H-013); chunks are counted as they come.
        json_bytes = head.content_length if head.header_length is None else head.json_bytes
        if json_bytes > limit:
            raise HeadError(
                400,
                f"request JSON size of {json_bytes} bytes exceeds the maximum allowed input size of {limit} bytes. "
                "Use --http-max-input-size to increase the limit.",
            )
        if head.content_length > self.body_bytes_max:
            raise HeadError(
                413,
                f"request body of {head.content_length} bytes exceeds the {self.body_bytes_max} bytes of shared memory "
                "for requests in flight; raise --arena-byte-size",
            )

    def hold(self, change: int) -> bool:
        """Count private memory of incomplete requests, bytes; False: it is more than may be."""
        self._held_bytes += change
        return self._held_bytes <= _HELD_INPUTS_MAX * self.settings.max_input_size

    def owe(self, change: int) -> None:
        """Count private memory of replies that clients have not taken, bytes; at the limit the largest is cut off."""
        self._owed_bytes += change
        if change > 0 and self._owed_bytes > self._owed_bytes_max:
            slowest = max(self._connections, key=lambda connection: connection.owed_bytes)
            log.warning(f"cut off a client that has not taken {slowest.owed_bytes} bytes of replies")
            slowest.abort()

    def no_memory(self) -> ServingError:
        """Return what a client is told whose request did not fit any more."""
        return Unavailable(
            f"incomplete requests of all clients take more than {_HELD_INPUTS_MAX} times --http-max-input-size; "
            "try again later"
        )

    def new_call(self, connection: Connection, head: Head) -> GeneralCall | GenerateCall:
        """Return the call for a request that no plan is known for."""
        if head.target is Target.INFER:
            return GeneralCall(self, connection, head)
        return GenerateCall(self, connection, head)

    def open_upload(self, connection: Connection, head: Head, data: memoryview) -> DirectUpload | PlannedUpload:
        """Begin to receive a large body; ``data`` is what has arrived of it, the JSON included."""
        plan = find_plan(head, data)
        if isinstance(plan, InferPlan) and plan.route.sampler is None:
            with contextlib.suppress(ArenaFull):  # One block may find room where a slab does not.
                return PlannedUpload(plan, head, data)
        return DirectUpload(self, GeneralCall(self, connection, head), head, data)

    # --- connections ---

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        if not self._is_full and len(self._connections) >= self.settings.max_connections:
            self._set_full(True)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._expecting.discard(connection)
        self._stalled.pop(connection, None)
        # Some fewer, so that the listening sockets are not switched with every connection.
        if self._is_full and len(self._connections) <= self.settings.max_connections * 15 // 16:
            self._set_full(False)

    def _set_full(self, is_full: bool) -> None:
        self._is_full = is_full
        if self.on_full is not None:
            self.on_full(is_full)

    @property
    def is_full(self) -> bool:
        """There are as many connections as there may be."""
        return self._is_full

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    @property
    def pending_count(self) -> int:
        """Connections on which a request is incomplete, or is answered without the engine."""
        return sum(connection.is_pending for connection in self._connections)

    def drain(self) -> None:
        """Make the next reply of each connection its last."""
        self.is_draining = True
        for connection in list(self._connections):
            connection.drain()

    def close_idle(self) -> None:
        """Close the connections on which nothing is asked."""
        for connection in list(self._connections):
            connection.close_if_idle()

    def abort(self) -> None:
        """Close everything now."""
        for connection in list(self._connections):
            connection.abort()

    # --- deadlines ---

    def expect_request(self, connection: Connection, body_bytes: int) -> None:
        """The connection has begun a request; ``body_bytes`` of it are to come at most."""
        self.expect(connection, self.settings.request_timeout_secs + body_bytes / _BODY_RATE_MIN)

    def expect(self, connection: Connection, seconds: float) -> None:
        """Call the connection's ``time_out`` unless :meth:`expect_nothing` comes before it."""
        connection.deadline_s = time.monotonic() + seconds
        self._expecting.add(connection)
        self._start_sweeping()

    def expect_nothing(self, connection: Connection) -> None:
        connection.deadline_s = 0.0
        self._expecting.discard(connection)

    def stalled(self, connection: Connection) -> None:
        """The client does not take its replies as fast as they come."""
        self._stalled[connection] = (connection.unsent_bytes, time.monotonic() + self.settings.request_timeout_secs)
        self._start_sweeping()

    def no_longer_stalled(self, connection: Connection) -> None:
        self._stalled.pop(connection, None)

    def _start_sweeping(self) -> None:
        if not self._is_sweeping:
            self._is_sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_SECS, self._sweep)

    def _sweep(self) -> None:
        now_s = time.monotonic()
        for connection in [each for each in self._expecting if each.deadline_s < now_s]:
            self.expect_nothing(connection)
            connection.time_out()
        for connection, (left_bytes, deadline_s) in list(self._stalled.items()):
            unsent_bytes = connection.unsent_bytes
            if unsent_bytes < left_bytes:
                self.stalled(connection)
            elif deadline_s < now_s:
                del self._stalled[connection]
                connection.abort()
        self._is_sweeping = False
        if self._expecting or self._stalled:
            self._start_sweeping()


def _keep(_fd: int) -> bool:
    """There is no other frontend."""
    return False
