"""The door: the Unix socket where shared-memory clients come in. Runs in the supervisor's event loop.

Who may come in is decided twice: the socket lies in the runtime directory, which is 0700 and ours, and the kernel
tells who is at the other end (SO_PEERCRED): the server's own user and root, nobody else. Models run on memory that a
client may write to at any time, which is a risk to take only with somebody who could trace this process anyway.

A client's life: connected -> introduced (HELLO: it has an arena, a completion doorbell and a submission socket) -> any
number of models opened -> gone, when its end of the connection is closed or its process ended. Nothing outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import msgspec

from forebay.engine.supervisor.client_counts import ClientCounts, words_of
from forebay.engine.supervisor.client_memories import ClientMemories
from forebay.engine.supervisor.switchboard import Producer, Switchboard
from forebay.ipc.arena import create_memory_file
from forebay.ipc.catalog import Catalog, ModelEntry, no_ready_version
from forebay.ipc.client_wire import (
    COUNTS,
    DOOR_FDS_MAX,
    DOOR_HEADER,
    DOOR_NAME,
    DOOR_REPLY_BYTES_MAX,
    DOOR_REQUEST_BYTES_MAX,
    FLAG_BARE_ROWS,
    FLAG_DECOUPLED,
    FLAG_ENSEMBLE,
    FLAG_KEEPS_PAGES,
    FLAG_LAST,
    FLAG_ROWS,
    FLAG_RUNS_ENSEMBLES,
    HELLO,
    INSTANCE,
    MAGIC,
    MEMORY,
    MEMORY_NAME,
    MEMORY_NUMBER,
    MODEL,
    NUMBER,
    OPEN,
    OUTSTANDING_MAX,
    PROTOCOL_VERSION,
    WELCOME,
    DoorKind,
    EnsemblePlan,
    pack_tensor,
)
from forebay.ipc.counters import CountersFile
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.errors import (
    Draining,
    Internal,
    InvalidArgument,
    NotFound,
    NotReady,
    ServingError,
    Unavailable,
    Unsupported,
)
from forebay.ipc.log import log

#: Clients at a time; each costs three descriptors here and two in every worker that it uses.
CLIENTS_MAX = 256

#: Bytes of a client's arena at least.
ARENA_BYTES_MIN = 64 * 1024

#: Lines of a MODELS message take so many bytes at most.
_LIST_BYTES_MAX = 32 * 1024

#: Questions about device memory that one client may have open at a time.
_MEMORY_TASKS_MAX = 64

#: Name, version (0: the newest), namespace (None: any).
_Wanted = tuple[str, int, str | None]

#: How often to look at what clients have counted, s.
_COUNTS_S = 0.1

_UCRED = struct.Struct("3i")


class ClientDoor:
    """The listening socket and everybody who came in."""

    def __init__(
        self,
        runtime_directory: str,
        switchboard: Switchboard,
        *,
        numbers: itertools.count[int],
        catalog: Callable[[], Catalog],
        counters: CountersFile,
        memories: ClientMemories,
        arena_bytes_max: int,
        keeps_pages: Callable[[int], bool] = lambda _byte_size: False,
    ) -> None:
        """Create nothing yet.

        Args:
            numbers: producer numbers, shared with the frontends.
            catalog: returns what is served at the moment, with the offsets of the clients' counters.
            counters: where clients' requests are counted.
            memories: clients' device memory.
            arena_bytes_max: what a client gets that asks for nothing, and at most.
            keeps_pages: whether workers may page-lock an arena of so many bytes.
        """
        self.path = os.path.join(runtime_directory, DOOR_NAME)
        self._runtime_directory = runtime_directory
        self._switchboard = switchboard
        self._numbers = numbers
        self._catalog = catalog
        self._arena_bytes_max = arena_bytes_max
        self._keeps_pages = keeps_pages
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._visitors: set[_Visitor] = set()
        self._memories = memories
        self._memories.on_lost = self._tell_lost
        self._counts = ClientCounts(counters, lambda: catalog().models)
        self._counting: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Let clients in from now on."""
        self._listener = self._listen(self.path)

    @contextlib.contextmanager
    def side_door(self, ensemble: ModelEntry) -> Generator[str, None, None]:
        """Let in who is to warm up an ensemble that no catalog names yet, though nobody else is served so far.

        Yields:
            The path of a socket. Who comes in there gets the ensemble, is not counted (spec C-115), and is seen out in
            the end.
        """
        path = os.path.join(self._runtime_directory, f"warm-{ensemble.route}")
        listener = self._listen(path, ensemble)
        try:
            yield path
        finally:
            self._close_listener(listener, path)
            for visitor in list(self._visitors):
                if visitor.ensemble is ensemble:
                    visitor.leave()

    def _listen(self, path: str, ensemble: ModelEntry | None = None) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(64)
        self._loop.add_reader(listener.fileno(), self._accept, listener, ensemble)
        return listener

    def _close_listener(self, listener: socket.socket, path: str) -> None:
        self._loop.remove_reader(listener.fileno())
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(path)

    def stop_accepting(self) -> None:
        """Let nobody in any more; those who are in stay."""
        if self._listener is not None:
            self._close_listener(self._listener, self.path)
            self._listener = None

    def close(self) -> None:
        """See everybody out."""
        self.stop_accepting()
        if self._counting is not None:
            self._counting.cancel()
        for visitor in list(self._visitors):
            visitor.leave()

    def _accept(self, listener: socket.socket, ensemble: ModelEntry | None) -> None:
        try:
            sock, _address = listener.accept()
        except OSError:
            return  # It has left again, or there are no descriptors left: then the next try finds some.
        sock.setblocking(False)
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        visitor = _Visitor(sock, pid, self._serve, self._left)
        visitor.ensemble = ensemble
        if uid not in (os.geteuid(), 0):
            visitor.refuse(0, Unavailable(f"this server belongs to user {os.geteuid()}, user {uid} may not use it"))
        elif ensemble is None and len(self._visitors) >= CLIENTS_MAX:
            visitor.refuse(0, Unavailable(f"the server has {CLIENTS_MAX} shared-memory clients already"))
        else:
            self._visitors.add(visitor)
            visitor.watch()
            return
        sock.close()

    def _left(self, visitor: _Visitor) -> None:
        self._visitors.discard(visitor)
        if visitor.number:
            log.verbose(1, f"shared-memory client {visitor.number} (process {visitor.pid}) is gone")
            self._counts.remove(visitor.number)
            self._memories.forget(visitor.number)
            self._switchboard.remove_producer(visitor.number)

    # --- requests ---

    def _serve(self, visitor: _Visitor, message: memoryview) -> None:
        kind, flags, request = DOOR_HEADER.unpack_from(message)
        body = message[DOOR_HEADER.size :]
        try:
            if kind == DoorKind.HELLO:
                self._welcome(visitor, request, body)
            elif not visitor.number:
                raise InvalidArgument("the first message must be HELLO")
            elif kind == DoorKind.OPEN:
                self._open_model(visitor, request, body, runs_ensembles=bool(flags & FLAG_RUNS_ENSEMBLES))
            elif kind == DoorKind.COUNTS:
                self._take_counts(visitor, body)
            elif kind == DoorKind.LIST:
                self._list_models(visitor, request)
            elif kind == DoorKind.MAKE_MEMORY:
                number, device_id, _zero = MEMORY_NAME.unpack_from(body)
                self._begin(visitor, request, self._make_memory(visitor, request, number, device_id))
            elif kind == DoorKind.CLOSE_MEMORY:
                number, device_id, _zero = MEMORY_NAME.unpack_from(body)
                self._begin(visitor, request, self._close_memory(visitor, request, number, device_id))
            else:
                raise InvalidArgument(f"unknown message {kind}")
        except ServingError as error:
            visitor.refuse(request, error)
        except (struct.error, UnicodeDecodeError) as error:
            visitor.refuse(request, InvalidArgument(f"the message cannot be read: {error}"))

    def _welcome(self, visitor: _Visitor, request: int, body: memoryview) -> None:
        if visitor.number:
            raise InvalidArgument("HELLO was said before")
        magic, version, _zero, wanted_bytes = HELLO.unpack_from(body)
        if magic != MAGIC or version != PROTOCOL_VERSION:
            raise Unsupported(f"this server speaks version {PROTOCOL_VERSION} of the client protocol, not {version}")
        if wanted_bytes > self._arena_bytes_max:
            raise InvalidArgument(
                f"an arena may have {self._arena_bytes_max} bytes, not {wanted_bytes}; raise --arena-byte-size"
            )
        arena_bytes = max(wanted_bytes or self._arena_bytes_max, ARENA_BYTES_MIN)
        name = bytes(body[HELLO.size :][:64]).decode()
        try:
            self._introduce(visitor, request, name, arena_bytes)
        except OSError as error:
            raise Unavailable(f"no shared memory for the client: {error.strerror}") from None

    def _introduce(self, visitor: _Visitor, request: int, name: str, arena_bytes: int) -> None:
        number = next(self._numbers)
        with contextlib.ExitStack() as undo:
            arena_fd = create_memory_file(f"forebay-arena-{number}", arena_bytes)
            undo.callback(os.close, arena_fd)
            completions_in, completions_out = map(undo.enter_context, create_doorbell())
            submit_in, submit_out = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.pop_all()
        producer = Producer(
            number=number,
            name=f"client {visitor.pid} {name}",
            arena_fd=arena_fd,
            arena_bytes=arena_bytes,
            bell_fd=completions_in.detach(),
            submit_fd=submit_out.detach(),
            is_counted=visitor.ensemble is None,
        )
        visitor.number = number
        visitor.arena = (arena_fd, arena_bytes)
        with completions_out, submit_in:
            self._switchboard.add_client(producer, visitor.send_instance)
            visitor.send(
                DoorKind.WELCOME,
                request,
                WELCOME.pack(PROTOCOL_VERSION, number, arena_bytes, self._switchboard.epoch, OUTSTANDING_MAX),
                (arena_fd, completions_out.fileno(), submit_in.fileno()),
                flags=FLAG_KEEPS_PAGES if self._keeps_pages(arena_bytes) else 0,
            )
        log.verbose(1, f"shared-memory client {number} is process {visitor.pid} {name}")

    def _open_model(self, visitor: _Visitor, request: int, body: memoryview, *, runs_ensembles: bool) -> None:
        (version,) = OPEN.unpack_from(body)
        name, separator, namespace = bytes(body[OPEN.size :]).decode().partition("\0")
        wanted = (name, version, namespace if separator else None)
        entry = visitor.entry_to_warm_up(wanted) or find_entry(self._catalog(), *wanted)
        if entry.is_ensemble:
            if not runs_ensembles:
                raise Unsupported(
                    f"model '{entry.name}' is an ensemble, which this client cannot run; "
                    "open the models that it is made of"
                )
            if entry is not visitor.ensemble:
                visitor.watched[wanted] = entry
            flags = FLAG_ENSEMBLE | entry.decoupled * FLAG_DECOUPLED
            visitor.send(DoorKind.MODEL, request, pack_entry(entry, []), flags=flags)
            return
        if not version or entry.gpu_uuid:
            # Requests for a certain version hear from the scheduler that it is not served any more, but from nobody
            # else that it has left its GPU.
            visitor.watched[wanted] = entry
        # Descriptors beyond what a message can carry: those instances are reached by way of the scheduler only.
        rings = self._switchboard.open_route(visitor.number, entry.route)
        try:
            visitor.send(
                DoorKind.MODEL,
                request,
                pack_entry(entry, [instance for instance, _ring in rings[:DOOR_FDS_MAX]]),
                tuple(ring.fileno() for _instance, ring in rings[:DOOR_FDS_MAX]),
                flags=rows_flag(entry) | entry.decoupled * FLAG_DECOUPLED,
            )
        finally:
            for _instance, ring in rings:
                ring.close()

    # --- device memory ---

    def _begin(self, visitor: _Visitor, request: int, answering: Coroutine[Any, Any, None]) -> None:
        """Answer when it is time to."""
        if len(visitor.tasks) >= _MEMORY_TASKS_MAX:
            answering.close()
            raise Unavailable(f"the client has asked {_MEMORY_TASKS_MAX} questions that are not answered yet")
        task = self._loop.create_task(self._answer(visitor, request, answering))
        visitor.tasks.add(task)
        task.add_done_callback(visitor.tasks.discard)

    @staticmethod
    async def _answer(visitor: _Visitor, request: int, answering: Coroutine[Any, Any, None]) -> None:
        try:
            await answering
        except ServingError as error:
            visitor.refuse(request, error)

    async def _make_memory(self, visitor: _Visitor, request: int, number: int, device_id: int) -> None:
        memory = await self._memories.make(visitor.number, number, device_id)
        if visitor in self._visitors:
            body = MEMORY.pack(number, device_id, 0, memory.byte_size, memory.handle)
            visitor.send(DoorKind.MEMORY, request, body)
        else:
            self._memories.forget(visitor.number)

    async def _close_memory(self, visitor: _Visitor, request: int, number: int, device_id: int) -> None:
        await self._memories.close(visitor.number, number, device_id)
        visitor.send(DoorKind.CLOSED, request, b"")

    def _tell_lost(self, client: int, number: int) -> None:
        for visitor in self._visitors:
            if visitor.number == client:
                visitor.send(DoorKind.LOST, 0, MEMORY_NUMBER.pack(number))

    # --- counts ---

    def _take_counts(self, visitor: _Visitor, body: memoryview) -> None:
        route, _zero, offset = COUNTS.unpack_from(body)
        if visitor.ensemble is not None:
            return
        entry = next((entry for entry in self._catalog().models if entry.route == route), None)
        if entry is None:
            return  # It has just been unloaded.
        arena_fd, arena_bytes = visitor.arena
        if offset % 8 or offset + 8 * words_of(entry) > arena_bytes:
            raise InvalidArgument("the message names counters outside the client's arena")
        self._counts.add(visitor.number, arena_fd, offset, entry)
        if self._counting is None:
            self._counting = self._loop.call_later(_COUNTS_S, self._count)

    def _count(self) -> None:
        self._counts.add_news()
        self._counting = self._loop.call_later(_COUNTS_S, self._count) if self._counts else None

    # --- news ---

    def catalog_changed(self) -> None:
        """Tell everybody for whose models there are newer versions, or whose ensembles are not as they were."""
        found: dict[_Wanted, ModelEntry | None] = {}
        for visitor in self._visitors:
            for wanted, known in list(visitor.watched.items()):
                if wanted not in found:
                    found[wanted] = self._find(wanted)
                if _is_superseded(known, found[wanted]):
                    del visitor.watched[wanted]
                    visitor.send(DoorKind.GONE, 0, NUMBER.pack(known.route))

    def _find(self, wanted: _Wanted) -> ModelEntry | None:
        """Return what a client would get now."""
        try:
            return find_entry(self._catalog(), *wanted)
        except ServingError:
            return None

    def _list_models(self, visitor: _Visitor, request: int) -> None:
        lines = [f"{entry.name}\t{entry.version}\t{entry.state}\n".encode() for entry in self._catalog().models]
        chunk = b""
        for line in lines:
            if len(chunk) + len(line) > _LIST_BYTES_MAX:
                visitor.send(DoorKind.MODELS, request, chunk)
                chunk = b""
            chunk += line
        visitor.send(DoorKind.MODELS, request, chunk, flags=FLAG_LAST)


class _Visitor:
    """One connection. Owns the socket and, while watching, a pidfd of the process that made it."""

    def __init__(
        self,
        sock: socket.socket,
        pid: int,
        on_message: Callable[[_Visitor, memoryview], None],
        on_gone: Callable[[_Visitor], None],
    ) -> None:
        self.pid = pid
        #: Its producer number; 0: not introduced yet.
        self.number = 0
        #: Of one that came in by a side door: what it is to warm up.
        self.ensemble: ModelEntry | None = None
        #: Descriptor, which is the switchboard's, and bytes.
        self.arena: tuple[int, int] = (-1, 0)
        #: What it has opened and is to be told of when it changes, and what it got.
        self.watched: dict[_Wanted, ModelEntry] = {}
        #: Its questions that are not answered yet.
        self.tasks: set[asyncio.Task[None]] = set()
        self._sock = sock
        self._on_message = on_message
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1

    def watch(self) -> None:
        """Read what it says, and notice its end even if a child of it still holds the connection."""
        self._loop.add_reader(self._sock.fileno(), self._read)
        # The process has ended already: reading tells.
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._pidfd, self.leave)

    def entry_to_warm_up(self, wanted: _Wanted) -> ModelEntry | None:
        """Return the ensemble that it is to warm up, if it asks for that one."""
        ensemble = self.ensemble
        return ensemble if ensemble is not None and wanted == (ensemble.name, ensemble.version, None) else None

    def leave(self) -> None:
        """End the connection."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._on_gone(self)

    def send(self, kind: DoorKind, request: int, body: bytes, fds: tuple[int, ...] = (), *, flags: int = 0) -> None:
        """Send one message; one that does not take its answers is seen out. The caller keeps ``fds``."""
        message = DOOR_HEADER.pack(kind, flags, request) + body
        if len(message) > DOOR_REPLY_BYTES_MAX:
            raise Internal(f"the answer has {len(message)} bytes, too many for one message")
        try:
            if fds:
                socket.send_fds(self._sock, [message], list(fds))
            else:
                self._sock.send(message)
        except OSError:
            # Not now: the caller may be in the middle of introducing it.
            self._loop.call_soon(self.leave)

    def refuse(self, request: int, error: ServingError) -> None:
        self.send(DoorKind.REFUSED, request, NUMBER.pack(error.code) + error.text.encode()[:4096])

    def send_instance(self, route: int, instance: int, ring: socket.socket) -> None:
        """Tell of a worker that was started later; takes ownership of ``ring``."""
        with ring:
            self.send(DoorKind.INSTANCE, 0, INSTANCE.pack(route, instance), (ring.fileno(),))

    def _read(self) -> None:
        try:
            message = self._sock.recv(DOOR_REQUEST_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if len(message) < DOOR_HEADER.size:
            self.leave()
            return
        self._on_message(self, memoryview(message))


def _is_superseded(known: ModelEntry, now: ModelEntry | None) -> bool:
    """Whether a client has to ask again for what it knows.

    Not because of an older version: that is the newest one, too, while the only worker of a newer one is replaced.
    """
    if now is None:
        return known.is_ensemble
    if now.route == known.route:
        return now.device_id != known.device_id
    return now.version >= known.version


def find_entry(catalog: Catalog, name: str, version: int, namespace: str | None = None) -> ModelEntry:
    """Return a READY version of a model: the one asked for, or the newest for 0 (spec H-062).

    Args:
        namespace: None: any, if only one has a model of that name.

    Raises:
        Draining, NotFound, NotReady, InvalidArgument: why there is none; texts as for requests over HTTP.
    """
    if not catalog.live:
        raise Draining("the server is stopping")
    entries = [entry for entry in catalog.models if entry.name == name and namespace in (None, entry.namespace)]
    if not entries:
        raise NotFound(f"Request for unknown model: '{name}' is not found")
    if len({entry.namespace for entry in entries}) > 1:
        raise InvalidArgument(f"Request for model '{name}' is ambiguous: several namespaces have a model of that name")
    if version:
        entry = next((entry for entry in entries if entry.version == version), None)
        if entry is None:
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        if not entry.is_ready:
            raise NotReady(f"Request for unknown model: '{name}' version {version} is not at ready state")
        return entry
    newest = max((entry for entry in entries if entry.is_ready), key=lambda entry: entry.version, default=None)
    if newest is None:
        raise no_ready_version(name, entries)
    return newest


def rows_flag(entry: ModelEntry) -> int:
    """Return which requests to a model live in slab rows, as a flag of MODEL."""
    if not entry.is_fixed:
        return 0
    return FLAG_BARE_ROWS if entry.sees_requests else FLAG_ROWS


def pack_entry(entry: ModelEntry, instances: list[int]) -> bytes:
    """Return the body of a MODEL message."""
    counts = (len(entry.inputs), len(entry.outputs), len(instances))
    head = MODEL.pack(entry.route, entry.max_batch_size, entry.version, *counts, entry.device_id + 1)
    numbers = b"".join(NUMBER.pack(instance) for instance in instances)
    tensors = b"".join(pack_tensor(spec) for spec in (*entry.inputs, *entry.outputs))
    plan = EnsemblePlan(entry.max_inflight_requests, entry.steps)
    return head + numbers + tensors + (msgspec.msgpack.encode(plan) if entry.is_ensemble else b"")
