"""Inference through shared memory for programs on the server's own machine, without sockets for tensors or copies.

::

    import forebay.client.shm

    with forebay.client.shm.connect() as engine:
        model = engine.model("alpha_model")
        x = model.input("features", rows=1)      # float32 [1, 50]: a view of shared memory, fill it in place
        x[:] = features
        y = model.infer()                        # float32 [1, 1]: a view, valid until the next call

        x = model.input("features", rows=8)
        x[:] = more
        future = model.submit()                  # many in flight; results come in any order
        print(future.result())

    group = model.group(32)                      # 32 small requests that share a message
    group.input("features")[:] = many            # float32 [32, 50]
    group.submit()
    print(group.result())                        # float32 [32, 1]

``connect()`` finds the running server: in ``$FOREBAY_RUNTIME_DIRECTORY`` if that is set, else where this user's servers
put their sockets, the newest first. For asyncio see :mod:`forebay.client.shm_asyncio`.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Literal, Self

import msgspec

from forebay.client.connection import Connection
from forebay.client.discovery import door_paths
from forebay.client.errors import DeadlineExceeded, EngineGone, ModelChanged, NoServer, WrongProcess
from forebay.client.groups import RequestGroup
from forebay.client.model import Future, Model
from forebay.client.options import Options
from forebay.ipc.errors import (
    ArenaFull,
    Cancelled,
    Internal,
    InvalidArgument,
    NotFound,
    NotReady,
    ServingError,
    Unavailable,
    Unsupported,
)

__all__ = [
    "ArenaFull",
    "Cancelled",
    "DeadlineExceeded",
    "Engine",
    "EngineGone",
    "Future",
    "Internal",
    "InvalidArgument",
    "Model",
    "ModelChanged",
    "NoServer",
    "NotFound",
    "NotReady",
    "Options",
    "RequestGroup",
    "ServingError",
    "Statistics",
    "Unavailable",
    "Unsupported",
    "WrongProcess",
    "connect",
]

#: How often ``reconnect`` looks for the server, s.
_RETRY_S = 0.05


class Statistics(msgspec.Struct, frozen=True):
    """What a connection has done so far."""

    copied_bytes: int
    """Bytes of tensors copied in this process; 0 as long as inputs are filled in place and nothing is BYTES."""
    in_flight: int
    """Requests handed over and not answered."""
    arena_bytes: int
    arena_used_bytes: int


class Engine:
    """A connection to the server, and after ``reconnect`` another one. Any number of threads may use it."""

    def __init__(
        self, path: str | os.PathLike[str] | None, *, wait: Literal["park", "spin"] = "park", arena_bytes: int = 0
    ) -> None:
        """Connect; see :func:`connect`."""
        self._path = path
        self._spins = wait == "spin"
        self._arena_bytes = arena_bytes
        self._lock = threading.Lock()
        self.connection = self._connect()

    def model(self, name: str, version: int | str | None = None) -> Model:
        """Return a handle of a model, for any number of requests.

        Args:
            version: None: the newest, also when a newer one is loaded later.

        Raises:
            NotFound, NotReady: there is no such model or version, or it is not loaded.
        """
        return Model(self, name, int(version or 0))

    def models(self) -> list[tuple[str, int, str]]:
        """Return (name, version, state) of everything that the server knows."""
        return self.connection.list_models()

    def statistics(self) -> Statistics:
        connection = self.connection
        return Statistics(
            copied_bytes=connection.memory.copied_bytes,
            in_flight=connection.in_flight,
            arena_bytes=connection.arena.byte_size,
            arena_used_bytes=connection.used_bytes,
        )

    def reconnect(self, timeout_s: float = 30.0) -> None:
        """Connect anew, waiting for the server to come back. Handles go on working; futures of before have failed.

        Raises:
            NoServer: it is not back in time.
        """
        with self._lock:
            old = self.connection
            old.close()
            give_up_s = time.monotonic() + timeout_s
            while True:
                try:
                    self.connection = self._connect()
                    return
                except (NoServer, EngineGone):
                    if time.monotonic() >= give_up_s:
                        raise
                time.sleep(_RETRY_S)

    def _connect(self) -> Connection:
        failure: NoServer | None = None
        for path in door_paths(self._path):
            try:
                return Connection(path, arena_bytes=self._arena_bytes, spins=self._spins)
            except NoServer as error:
                # The directory of a server that was killed; the next one is older.
                failure = failure or error
        assert failure is not None
        raise failure

    def close(self) -> None:
        """Leave; the server takes everything back at once. Arrays stay readable, handles are of no use any more."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    path: str | os.PathLike[str] | None = None, *, wait: Literal["park", "spin"] = "park", arena_bytes: int = 0
) -> Engine:
    """Connect to the server.

    Args:
        path: its socket, its runtime directory, or the directory of those; None: the newest server of this user.
        wait: ``park`` sleeps until an answer comes (where answers take some 10 us, it looks for 50 us before it does);
            ``spin`` keeps a core busy instead, which is faster where there are cores to spare.
        arena_bytes: shared memory for this client's tensors at most; pages cost nothing until they are used. 0: the
            server's ``--arena-byte-size``.

    Raises:
        NoServer: there is none.
        Unavailable, InvalidArgument: the server does not let us in; the text says why.
    """
    return Engine(path, wait=wait, arena_bytes=arena_bytes)
