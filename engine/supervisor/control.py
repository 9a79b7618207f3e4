"""The control socket: catalogs go out to frontends, commands come in on behalf of clients."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from forebay.ipc.catalog import Catalog
from forebay.ipc.channel import HIGH_WATER_MARK, TypedCodec, control_address
from forebay.ipc.errors import Code, InvalidArgument, ServingError
from forebay.ipc.frontend_messages import (
    CatalogPush,
    CatalogSeen,
    Command,
    CommandReply,
    FrontendToControl,
    Hello,
    TraceReport,
    TraceRulesPush,
)
from forebay.ipc.log import log
from forebay.ipc.messages import Message
from forebay.ipc.trace import TraceRecord, TraceRules

#: Carries out one verb: arguments as the frontend sent them, unchecked; returns what the reply carries.
CommandHandler = Callable[[dict[str, Any]], Awaitable[Any]]

#: Commands in progress at most; a command may wait long (a load), so their number is bounded.
COMMANDS_MAX = 256


def _ignore_traces(_records: tuple[TraceRecord, ...]) -> None:
    """Nobody writes traces down."""


class ControlServer:
    """The supervisor's end. ``handlers`` may be filled by anybody before :meth:`run`."""

    def __init__(self, runtime_directory: str, catalog_for: Callable[[int], Catalog]) -> None:
        """Bind the socket.

        Args:
            catalog_for: builds the current catalog for a producer (its counters differ from others').
        """
        self.handlers: dict[str, CommandHandler] = {}
        self._catalog_for = catalog_for
        #: What frontends are to trace, and who takes what they have traced.
        self.trace_rules: Callable[[], TraceRules] = TraceRules
        self.on_traces: Callable[[tuple[TraceRecord, ...]], None] = _ignore_traces
        self._codec: TypedCodec[Hello | CatalogSeen | Command | TraceReport] = TypedCodec(FrontendToControl)
        self._context = zmq.asyncio.Context(io_threads=1)
        # Annotated because pyzmq leaves the types of its multipart calls open.
        self._socket: Any = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(control_address(runtime_directory))
        self._peers: dict[int, bytes] = {}
        self._seen: dict[int, int] = {}
        self._progress = asyncio.Condition()
        self._commands: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                message = self._codec.decode(frames[-1])
            except (IndexError, msgspec.MsgspecError) as error:
                log.error(f"a frontend sent a control message that cannot be read: {error}")
                continue
            match message:
                case Hello():
                    self._peers[message.producer] = identity
                    await self._send(identity, TraceRulesPush(rules=self.trace_rules()))
                    await self._push(message.producer)
                case CatalogSeen():
                    await self._note_seen(message)
                case Command():
                    await self._start(identity, message)
                case TraceReport():
                    self.on_traces(message.records)

    async def publish(self) -> None:
        """Push the current catalog to every frontend."""
        for producer in list(self._peers):
            await self._push(producer)

    async def publish_trace_rules(self) -> None:
        """Tell every frontend what to trace."""
        rules = TraceRulesPush(rules=self.trace_rules())
        for identity in list(self._peers.values()):
            await self._send(identity, rules)

    async def wait_seen(self, generation: int, timeout_s: float) -> bool:
        """Wait until no frontend that has said Hello routes by an older catalog; False if that takes too long."""

        def everyone() -> bool:
            return all(self._seen.get(producer, 0) >= generation for producer in self._peers)

        async with self._progress:
            try:
                await asyncio.wait_for(self._progress.wait_for(everyone), timeout_s)
            except TimeoutError:
                return False
        return True

    def has_seen(self, producer: int, generation: int) -> bool:
        return self._seen.get(producer, 0) >= generation

    async def wait_seen_by(self, producer: int, generation: int) -> None:
        """Wait until one frontend, perhaps one that has not said Hello yet, knows a catalog."""
        async with self._progress:
            await self._progress.wait_for(lambda: self.has_seen(producer, generation))

    async def forget(self, producer: int) -> None:
        """A frontend is gone; nobody waits for it any more."""
        self._peers.pop(producer, None)
        self._seen.pop(producer, None)
        async with self._progress:
            self._progress.notify_all()

    async def _note_seen(self, message: CatalogSeen) -> None:
        if message.producer in self._peers:
            self._seen[message.producer] = max(message.generation, self._seen.get(message.producer, 0))
        async with self._progress:
            self._progress.notify_all()

    async def _push(self, producer: int) -> None:
        await self._send(self._peers[producer], CatalogPush(catalog=self._catalog_for(producer)))

    async def _send(self, identity: bytes, message: Message) -> None:
        try:
            await self._socket.send_multipart([identity, self._codec.encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            # Thousands of messages unread: it hangs, and must not hang us as well.
            log.warning("a frontend does not read its control messages")
        except zmq.ZMQError as error:
            # EHOSTUNREACH: the frontend is gone; its next run says Hello again.
            if error.errno != zmq.EHOSTUNREACH:
                raise

    # --- commands ---

    @property
    def command_count(self) -> int:
        """Control calls that are being carried out."""
        return len(self._commands)

    async def _start(self, identity: bytes, command: Command) -> None:
        if len(self._commands) >= COMMANDS_MAX:
            text = f"the server is carrying out {COMMANDS_MAX} control calls already, try again later"
            await self._send(identity, CommandReply(request=command.request, code=Code.UNAVAILABLE, text=text))
            return
        task = asyncio.create_task(self._carry_out(identity, command))
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def _carry_out(self, identity: bytes, command: Command) -> None:
        try:
            handler = self.handlers.get(command.verb)
            if handler is None:
                raise InvalidArgument(f"unknown control command '{command.verb}'")
            reply = CommandReply(request=command.request, result=await handler(command.arguments))
        except ServingError as error:
            reply = CommandReply(request=command.request, code=error.code, text=error.text)
        except Exception:
            log.error(f"control command '{command.verb}' failed:\n{traceback.format_exc()}")
            reply = CommandReply(request=command.request, code=Code.INTERNAL, text=f"'{command.verb}' failed")
        await self._send(identity, reply)

    async def close(self) -> None:
        """Cancel commands in progress and close the socket."""
        for task in list(self._commands):
            task.cancel()
        await asyncio.gather(*self._commands, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()
