"""The client's end of the door: come in, open models, hear of workers that were started later."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from forebay.client.errors import EngineGone, NoServer
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.client_wire import (
    COUNTS,
    DOOR_FDS_MAX,
    DOOR_HEADER,
    DOOR_REPLY_BYTES_MAX,
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
    PROTOCOL_VERSION,
    WELCOME,
    DoorKind,
    EnsemblePlan,
    unpack_tensor,
)
from forebay.ipc.errors import Internal, from_wire
from forebay.ipc.messages import DeviceMemory
from forebay.ipc.tensor import TensorSpec

#: How long the server may take to answer at its door, s.
_ANSWER_S = 30.0

#: ucred: pid, uid, gid
_CREDENTIALS = struct.Struct("3i")

_ANCILLARY_BYTES = socket.CMSG_SPACE(DOOR_FDS_MAX * array.array("i").itemsize)


class Welcome(msgspec.Struct, frozen=True):
    """What a client gets when it comes in. The receiver owns the descriptors."""

    producer: int
    arena_bytes: int
    epoch: int
    outstanding_max: int
    arena_fd: int
    completions: socket.socket
    submissions: socket.socket
    keeps_pages: bool = False
    """Workers may page-lock the arena."""


class Signature(msgspec.Struct, frozen=True):
    """What requests of a model look like; equal signatures have equal slabs."""

    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    uses_rows: bool
    is_decoupled: bool
    is_ensemble: bool = False
    allows_rows: bool = False
    """Requests that carry nothing but tensors may live in rows; with ``uses_rows`` all do."""


class OpenedModel(msgspec.Struct, frozen=True):
    """One loaded version of a model. The receiver owns the rings."""

    route: int
    version: int
    signature: Signature
    rings: dict[int, socket.socket]
    """Instance to the sending end of its ring."""
    plan: EnsemblePlan = EnsemblePlan()
    """Of an ensemble."""
    device_id: int = -1
    """GPU in whose memory tensors of requests may lie; -1: in host memory only."""

    def entry(self, name: str) -> ModelEntry:
        """Return it as a catalog describes it."""
        return ModelEntry(
            name=name,
            version=self.version,
            state="READY",
            route=self.route,
            max_batch_size=self.signature.max_batch_size,
            inputs=self.signature.inputs,
            outputs=self.signature.outputs,
            decoupled=self.signature.is_decoupled,
            is_ensemble=self.signature.is_ensemble,
            steps=self.plan.steps,
            max_inflight_requests=self.plan.max_inflight_requests,
            device_id=self.device_id,
        )


class Door:
    """The connection to the server that everything else hangs on: while it is open, so is the rest."""

    def __init__(self, path: str) -> None:
        """Connect; nothing is said yet.

        Raises:
            NoServer: nobody listens there.
        """
        self.path = path
        #: Workers that were started later: route, instance and ring, which is whoever's takes it out.
        self.news: deque[tuple[int, int, socket.socket]] = deque()
        #: Routes of opened models that others have taken the place of.
        self.gone: set[int] = set()
        #: Device memory that the server keeps for this client, from now on.
        self.memories: deque[DeviceMemory] = deque()
        #: Numbers of such memories that are no more.
        self.lost_memories: deque[int] = deque()
        self._requests = itertools.count(1)
        self._lock = threading.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The kernel's own timeout: with Python's, MSG_DONTWAIT would wait all the same.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(_ANSWER_S), 0))
        try:
            self._sock.connect(path)
            credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError as error:
            self._sock.close()
            raise NoServer(f"no forebay server listens at '{path}': {error.strerror or error}") from None
        #: The server's process, as this one sees it; 0: it does not.
        self._server_pid = int(_CREDENTIALS.unpack(credentials)[0])

    def enter(self, arena_bytes: int) -> Welcome:
        """Say who we are and get our sockets; 0 bytes: as the server likes.

        Raises:
            ServingError: the server's reason not to let us in.
        """
        name = os.path.basename(sys.argv[0] if sys.argv else "python").encode()[:64]
        hello = HELLO.pack(MAGIC, PROTOCOL_VERSION, 0, arena_bytes) + name.decode(errors="ignore").encode()
        flags, body, fds = self._ask(DoorKind.HELLO, hello, DoorKind.WELCOME)
        version, producer, granted_bytes, epoch, outstanding_max = WELCOME.unpack_from(body)
        if len(fds) != 3 or version != PROTOCOL_VERSION:
            _close_all(fds)
            raise Internal("the server's answer at its door makes no sense")
        arena_fd, completions, submissions = fds
        return Welcome(
            producer=producer,
            arena_bytes=granted_bytes,
            epoch=epoch,
            outstanding_max=outstanding_max,
            arena_fd=arena_fd,
            completions=socket.socket(fileno=completions),
            submissions=socket.socket(fileno=submissions),
            keeps_pages=bool(flags & FLAG_KEEPS_PAGES),
        )

    def open_model(self, name: str, version: int, namespace: str = "") -> OpenedModel:
        """Return the version asked for, or the newest for 0; in a namespace, or wherever there is one for "".

        Raises:
            ServingError: there is none; texts as over HTTP.
        """
        wanted = f"{name}\0{namespace}" if namespace else name
        request = OPEN.pack(version) + wanted.encode()
        flags, body, fds = self._ask(DoorKind.OPEN, request, DoorKind.MODEL, FLAG_RUNS_ENSEMBLES)
        rings = [socket.socket(fileno=fd) for fd in fds]
        route, max_batch_size, found, input_count, output_count, instance_count, device = MODEL.unpack_from(body)
        offset = MODEL.size
        instances = [NUMBER.unpack_from(body, offset + NUMBER.size * index)[0] for index in range(instance_count)]
        offset += NUMBER.size * instance_count
        tensors: list[TensorSpec] = []
        for _ in range(input_count + output_count):
            tensor, offset = unpack_tensor(body, offset)
            tensors.append(tensor)
        signature = Signature(
            max_batch_size=max_batch_size,
            inputs=tuple(tensors[:input_count]),
            outputs=tuple(tensors[input_count:]),
            uses_rows=bool(flags & FLAG_ROWS),
            allows_rows=bool(flags & (FLAG_ROWS | FLAG_BARE_ROWS)),
            is_decoupled=bool(flags & FLAG_DECOUPLED),
            is_ensemble=bool(flags & FLAG_ENSEMBLE),
        )
        plan = msgspec.msgpack.decode(body[offset:], type=EnsemblePlan) if signature.is_ensemble else EnsemblePlan()
        return OpenedModel(
            route=route,
            version=found,
            signature=signature,
            rings=dict(zip(instances, rings, strict=False)),
            plan=plan,
            device_id=device - 1,
        )

    def tell_counts(self, route: int, offset: int) -> None:
        """Say where in the arena the requests to a version are counted; there is no answer."""
        with self._lock:
            self._send(DoorKind.COUNTS, next(self._requests), COUNTS.pack(route, 0, offset))

    def ask_memory(self, number: int, device_id: int) -> None:
        """Ask for device memory, to be known by ``number``; if there is any it comes to :attr:`memories`."""
        with self._lock:
            self._send(DoorKind.MAKE_MEMORY, next(self._requests), MEMORY_NAME.pack(number, device_id, 0))

    def give_memory_back(self, number: int, device_id: int) -> None:
        """Say that a memory of the server's is not used any more."""
        with self._lock:
            self._send(DoorKind.CLOSE_MEMORY, next(self._requests), MEMORY_NAME.pack(number, device_id, 0))

    def close_memory(self, number: int, device_id: int) -> None:
        """Have all workers close a memory of ours, so that it may be freed.

        Raises:
            Unavailable: one has not yet; ask again.
        """
        self._ask(DoorKind.CLOSE_MEMORY, MEMORY_NAME.pack(number, device_id, 0), DoorKind.CLOSED)

    def list_models(self) -> list[tuple[str, int, str]]:
        """Return (name, version, state) of every version that the server knows."""
        request = next(self._requests)
        lines = b""
        with self._lock:
            self._send(DoorKind.LIST, request, b"")
            flags = 0
            while not flags & FLAG_LAST:
                flags, body, _fds = self._receive(request, DoorKind.MODELS)
                lines += body
        models: list[tuple[str, int, str]] = []
        for line in lines.decode().splitlines():
            name, version, state = line.split("\t")
            models.append((name, int(version), state))
        return models

    def look(self) -> None:
        """Take news that have arrived without waiting for any."""
        with self._lock:
            while True:
                try:
                    message = self._take(socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return
                _close_all(message[-1])

    def is_open(self) -> bool:
        """False once the server has closed its end."""
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    @property
    def has_server_ended(self) -> bool:
        """True if the server's process is no more; False if it is there, or out of sight."""
        if self._server_pid <= 0:
            return False
        try:
            with open(f"/proc/{self._server_pid}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
        except OSError:
            return True
        return state in (b"Z", b"X")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def _ask(
        self, kind: DoorKind, body: bytes, expected: DoorKind, flags: int = 0
    ) -> tuple[int, memoryview, list[int]]:
        request = next(self._requests)
        with self._lock:
            self._send(kind, request, body, flags)
            return self._receive(request, expected)

    def _send(self, kind: DoorKind, request: int, body: bytes, flags: int = 0) -> None:
        try:
            self._sock.send(DOOR_HEADER.pack(kind, flags, request) + body)
        except OSError as error:
            raise EngineGone(f"the server at '{self.path}' is gone: {error.strerror or error}") from None

    def _receive(self, request: int, expected: DoorKind) -> tuple[int, memoryview, list[int]]:
        while True:
            kind, flags, answered, body, fds = self._take(0)
            is_refused = kind == DoorKind.REFUSED
            if answered != request and not (is_refused and not answered):
                _close_all(fds)  # The answer to a question that was given up.
                continue
            if is_refused:
                (code,) = NUMBER.unpack_from(body)
                raise from_wire(code, bytes(body[NUMBER.size :]).decode(errors="replace"))
            if kind != expected:
                _close_all(fds)
                raise Internal("the server's answer at its door makes no sense")
            return flags, body, fds

    def _take(self, flags: int) -> tuple[int, int, int, memoryview, list[int]]:
        """Read one message; news are put aside here and returned as an answer to nothing."""
        try:
            data, ancillary, _flags, _address = self._sock.recvmsg(
                DOOR_REPLY_BYTES_MAX, _ANCILLARY_BYTES, flags | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            if flags & socket.MSG_DONTWAIT:
                raise
            raise EngineGone(f"the server at '{self.path}' does not answer") from None
        except OSError as error:
            raise EngineGone(f"the server at '{self.path}' is gone: {error.strerror or error}") from None
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if len(data) < DOOR_HEADER.size:
            raise EngineGone(f"the server at '{self.path}' has closed the connection")
        message, flag_bits, request = DOOR_HEADER.unpack_from(data)
        body = memoryview(data)[DOOR_HEADER.size :]
        if self._put_aside(message, body, fds):
            return message, flag_bits, 0, body, []
        return message, flag_bits, request, body, list(fds)

    def _put_aside(self, message: int, body: memoryview, fds: Sequence[int]) -> bool:
        """Keep news; False if the message is none."""
        if message == DoorKind.INSTANCE and len(fds) == 1:
            route, instance = INSTANCE.unpack_from(body)
            self.news.append((route, instance, socket.socket(fileno=fds[0])))
        elif message == DoorKind.GONE:
            self.gone.add(NUMBER.unpack_from(body)[0])
        elif message == DoorKind.MEMORY:
            number, device_id, _zero, byte_size, handle = MEMORY.unpack_from(body)
            self.memories.append(DeviceMemory(0, number, device_id, byte_size, handle))
        elif message == DoorKind.LOST:
            self.lost_memories.append(MEMORY_NUMBER.unpack_from(body)[0])
        else:
            return False
        return True


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
