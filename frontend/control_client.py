"""A frontend's end of the control socket: catalogs come in, commands go out. HTTP, gRPC and metrics frontends.

One ZeroMQ DEALER per process. `Hello` is said on every connection, so that a supervisor whose socket was made anew
pushes its catalog again; calls that were in flight then fail, because nobody is left to answer them.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from forebay.frontend.catalog_view import CatalogView
from forebay.ipc.catalog import Catalog
from forebay.ipc.channel import HIGH_WATER_MARK, TypedCodec, control_address
from forebay.ipc.errors import Unavailable, from_wire
from forebay.ipc.frontend_messages import (
    CatalogPush,
    CatalogSeen,
    Command,
    CommandReply,
    ControlToFrontend,
    Hello,
    TraceReport,
    TraceRulesPush,
)
from forebay.ipc.log import log
from forebay.ipc.messages import Message
from forebay.ipc.trace import TraceRecord, TraceRules

#: Seconds that an ordinary command may take; loads and unloads take as long as they take.
COMMAND_TIMEOUT_SECS = 30.0

#: Commands of one frontend in flight at most: clients start them, so their number is bounded here.
PENDING_COMMANDS_MAX = 1024

#: Verbs without a time limit: a large model may load for minutes (spec H-214).
_PATIENT_VERBS = frozenset({"load", "unload"})

CatalogListener = Callable[[CatalogView], None]


class CommandSender(Protocol):
    """What request handlers need of a :class:`ControlClient`."""

    @property
    def catalog(self) -> CatalogView: ...

    async def command(self, verb: str, arguments: Mapping[str, Any] | None = None) -> Any: ...


class ControlClient:
    """The connection to the supervisor. Create it in the process and event loop that use it; not thread-safe."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        runtime_directory: str,
        producer: int,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Connect; returns at once.

        Args:
            loop: the running loop; asyncio's or uvloop's.
            producer: this frontend's id, from `FrontendStart`.
            context: shared with the caller, who keeps it; None makes one that `close` ends.
        """
        self._loop = loop
        self._producer = producer
        self._own_context = None if context is not None else zmq.Context[zmq.Socket[bytes]](io_threads=1)
        self._codec: TypedCodec[ControlToFrontend] = TypedCodec(ControlToFrontend)
        self._listeners: list[CatalogListener] = []
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._last_request = 0
        self._is_closed = False
        self._first_catalog = asyncio.Event()
        #: Told what to trace; None: this frontend traces nothing.
        self.on_trace_rules: Callable[[TraceRules], None] | None = None
        #: The newest catalog; empty and not ready until the first one arrives.
        self.catalog = CatalogView(Catalog(generation=0))

        used = context or self._own_context
        assert used is not None
        self._socket: zmq.Socket[bytes] = used.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        events = int(zmq.Event.HANDSHAKE_SUCCEEDED) | int(zmq.Event.DISCONNECTED)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(events)
        self._watched = (int(self._socket.getsockopt(zmq.FD)), int(self._monitor.getsockopt(zmq.FD)))
        for fd in self._watched:
            loop.add_reader(fd, self._on_readable)
        self._socket.connect(control_address(runtime_directory))
        # Both descriptors are edge-triggered: what happened before add_reader would never signal.
        loop.call_soon(self._on_readable)

    # --- catalogs

    def add_listener(self, listener: CatalogListener) -> None:
        """Call ``listener`` with each new catalog, before the supervisor hears that it is in force."""
        self._listeners.append(listener)

    async def wait_catalog(self) -> CatalogView:
        """Return the catalog, once the first one has arrived."""
        await self._first_catalog.wait()
        return self.catalog

    def _take_catalog(self, catalog: Catalog) -> None:
        self.catalog = CatalogView(catalog)
        for listener in self._listeners:
            try:
                listener(self.catalog)
            except Exception:
                # The view has changed all the same; without CatalogSeen an unload would wait for ever.
                log.error(f"a catalog listener failed:\n{traceback.format_exc()}")
        self._first_catalog.set()
        self._send(CatalogSeen(producer=self._producer, generation=catalog.generation))

    # --- commands

    async def command(self, verb: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one control command in the supervisor and return its result.

        Raises:
            ServingError: what the supervisor answered, rebuilt from code and text.
            Unavailable: too many commands in flight, no answer in time, or the connection broke; for the last two the
                command may have been carried out.
        """
        if self._is_closed:
            raise Unavailable("Server exiting")
        if len(self._pending) >= PENDING_COMMANDS_MAX:
            raise Unavailable(f"more than {PENDING_COMMANDS_MAX} control calls are being handled, try again later")
        self._last_request += 1
        request = self._last_request
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._pending[request] = reply
        try:
            if not self._send(Command(request=request, verb=verb, arguments=dict(arguments or {}))):
                raise Unavailable("the server cannot take control calls at the moment, try again later")
            async with asyncio.timeout(None if verb in _PATIENT_VERBS else COMMAND_TIMEOUT_SECS):
                return await reply
        except TimeoutError:
            raise Unavailable(f"the server did not carry out '{verb}' within {COMMAND_TIMEOUT_SECS:g} s") from None
        finally:
            del self._pending[request]

    def _take_reply(self, reply: CommandReply) -> None:
        waiting = self._pending.get(reply.request)
        if waiting is None or waiting.done():
            return  # gave up waiting
        if reply.code < 0:
            waiting.set_result(reply.result)
        else:
            waiting.set_exception(from_wire(reply.code, reply.text))

    def _fail_pending(self, text: str) -> None:
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(Unavailable(text))

    # --- traces

    def report_traces(self, records: tuple[TraceRecord, ...]) -> None:
        """Hand traces in, ahead of every later command; dropped if the supervisor does not keep up."""
        if not self._is_closed:
            self._send(TraceReport(records=records))

    # --- sockets

    def _send(self, message: Message) -> bool:
        try:
            self._socket.send(self._codec.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        # A send may swallow the edge of a message that arrived meanwhile.
        self._loop.call_soon(self._on_readable)
        return True

    def _on_readable(self) -> None:
        """Take everything that has arrived on both sockets; the edge comes only once."""
        while not self._is_closed and self._watch_connection():
            pass
        while not self._is_closed and self._receive():
            pass

    def _watch_connection(self) -> bool:
        try:
            frames = self._monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        event = parse_monitor_message(frames)["event"]
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._send(Hello(producer=self._producer))
        elif event == zmq.Event.DISCONNECTED:
            self._fail_pending(
                "the server was interrupted while it handled this call; whether it took effect is unknown"
            )
        return True

    def _receive(self) -> bool:
        try:
            data = self._socket.recv_multipart(zmq.NOBLOCK)[-1]
        except zmq.Again:
            return False
        try:
            message = self._codec.decode(data)
        except msgspec.MsgspecError as error:
            log.error(f"the supervisor sent a message that cannot be read: {error}")
            return True
        if isinstance(message, CatalogPush):
            self._take_catalog(message.catalog)
        elif isinstance(message, TraceRulesPush):
            if self.on_trace_rules is not None:
                self.on_trace_rules(message.rules)
        else:
            self._take_reply(message)
        return True

    def close(self) -> None:
        """Leave; commands in flight fail with ``Server exiting``."""
        if self._is_closed:
            return
        self._is_closed = True
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self._fail_pending("Server exiting")
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        if self._own_context is not None:
            self._own_context.term()
