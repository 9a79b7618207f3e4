"""What all connections of one gRPC frontend share: scratch buffer, plans, engine, limits, the table of methods."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.control_client import CommandSender
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.connection import GrpcConnection
from forebay.frontend.grpc.http2.connection import Connection
from forebay.frontend.grpc.infer_plan import PlanBook
from forebay.frontend.grpc.request_head import HeadReader, RequestHead
from forebay.frontend.grpc.settings import GrpcView
from forebay.frontend.grpc.status import RpcError, Status
from forebay.frontend.regions import RegionTable
from forebay.frontend.statistics import Words
from forebay.ipc.log import log

#: Bytes read from a connection at a time.
SCRATCH_BYTES = 256 * 1024
#: Bytes of messages that have begun to arrive, or were decompressed, in this process at most.
HELD_BYTES_MAX = 1024 * 1024 * 1024

#: zlib's level for each value of ``--grpc-infer-response-compression-level``.
_LEVELS = {"none": 0, "low": 1, "medium": 6, "high": 9}


class CallFactory(Protocol):
    """Makes the call object of a method."""

    def __call__(
        self, frontend: GrpcFrontend, connection: Connection[RequestHead], number: int, head: RequestHead
    ) -> Call: ...


class GrpcFrontend:
    """The shared part. Used by one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: EngineClient,
        control: CommandSender,
        settings: GrpcView,
        words: Words,
        methods: dict[str, CallFactory],
        regions: RegionTable,
        *,
        server_id: str = "triton",
        allow_client_shm: bool = False,
    ) -> None:
        """Serve nothing yet.

        Args:
            words: uint64, the whole counters file.
            methods: path to what makes its calls.
        """
        self.loop = loop
        self.engine = engine
        self.control = control
        self.settings = settings
        self.words = words
        self.methods = methods
        #: Shared memory that clients have registered.
        self.regions = regions
        self.server_id = server_id
        self.allow_client_shm = allow_client_shm
        self.catalog: CatalogView = control.catalog
        self.heads = HeadReader(settings.header_forward_pattern, settings.restrictions)
        self.plans = PlanBook()
        self.scratch = bytearray(SCRATCH_BYTES)
        self.scratch_view = memoryview(self.scratch)
        self.compression_level = _LEVELS[settings.infer_response_compression_level]
        #: The server is stopping: new calls are refused (spec G-087).
        self.is_draining = False
        self._held_bytes = 0
        self._connections: set[GrpcConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: set[Callable[[], None]] = set()

    def connection(self) -> GrpcConnection:
        """Make the protocol object of a new connection."""
        return GrpcConnection(self)

    def take_catalog(self, catalog: CatalogView) -> None:
        """Route by a new catalog from now on."""
        self.catalog = catalog
        self.plans.clear()
        self.engine.update_catalog(catalog.catalog)
        for watcher in list(self._watchers):
            watcher()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` after every new catalog, until :meth:`unwatch`."""
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        self._watchers.discard(watcher)

    def reply_encoding(self, head: RequestHead) -> str:
        """Return how replies to an inference call are compressed (spec G-084)."""
        if not self.compression_level:
            return "identity"
        return next((name for name in ("gzip", "deflate") if name in head.accepts), "identity")

    # --- memory that requests take before they are in shared memory ---

    @property
    def free_bytes(self) -> int:
        """How much a message may still take."""
        return max(HELD_BYTES_MAX - self._held_bytes, 0)

    def hold(self, byte_size: int) -> None:
        """Count bytes that are kept.

        Raises:
            RpcError: too much is kept already; these bytes are not counted.
        """
        if self._held_bytes + byte_size > HELD_BYTES_MAX:
            raise RpcError(Status.RESOURCE_EXHAUSTED, "too many large requests are being received, try again later")
        self._held_bytes += byte_size

    def release(self, byte_size: int) -> None:
        """Bytes are no longer kept."""
        self._held_bytes -= byte_size

    # --- control calls ---

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the handler of a call; the caller keeps the task to cancel it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def report(self, error: BaseException) -> None:
        """Log a fault of ours that a client is only told of as INTERNAL."""
        log.error("a gRPC call failed:\n" + "".join(traceback.format_exception(error)))

    # --- connections ---

    def opened(self, connection: GrpcConnection) -> None:
        self._connections.add(connection)

    def closed(self, connection: GrpcConnection) -> None:
        self._connections.discard(connection)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    @property
    def pending_count(self) -> int:
        """Connections on which a message is incomplete, or is answered without the engine."""
        return sum(connection.is_pending for connection in self._connections)

    def drain(self) -> None:
        """Tell clients to go elsewhere; connections close when their calls are answered (spec G-087)."""
        self.is_draining = True
        for connection in list(self._connections):
            connection.wind_up()

    def abort(self) -> None:
        """Close everything now."""
        for connection in list(self._connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
