"""Where tensors lie: the arenas that this worker has mapped, and arrays that look into them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np

from forebay.engine.backends.base import Array
from forebay.ipc.arena import Arena
from forebay.ipc.doorbell import Bell, ClientBell
from forebay.ipc.errors import Internal
from forebay.ipc.tensor import DATATYPES, TensorSpec, byte_size


class GuardedBell:
    """A producer's doorbell for who does not hold the lock: takes it for what a full doorbell makes wait.

    A message alone needs no lock, being sent as a whole.
    """

    __slots__ = ("_bell", "_lock", "backlog", "fileno")

    def __init__(self, bell: Bell, lock: threading.Lock) -> None:
        self._bell = bell
        self._lock = lock
        self.backlog = bell.backlog
        self.fileno = bell.fileno

    def ring(self, message: bytes) -> bool:
        with self._lock:
            return self._bell.ring(message)


class Producer:
    """One producer as a worker sees it: its arena and its completion doorbell. Owns both."""

    def __init__(
        self,
        producer: int,
        arena_fd: int,
        arena_bytes: int,
        bell_fd: int,
        *,
        is_trusted: bool = True,
        is_counted: bool = True,
    ) -> None:
        """Take ownership of both descriptors.

        Args:
            is_trusted: False for a shared-memory client, whose messages nobody has compared with the model yet.
            is_counted: False for one that warms up: statistics are not to know of its requests (spec C-115).
        """
        self.id = producer
        self.is_trusted = is_trusted
        self.is_counted = is_counted
        try:
            self.arena = Arena(arena_fd, arena_bytes)
        finally:
            os.close(arena_fd)
        self.bell = (Bell if is_trusted else ClientBell)(socket.socket(fileno=bell_fd))
        self.is_gone = False

    def array(self, datatype: str, shape: tuple[int, ...], offset: int) -> Array:
        """Return a writable view of fixed-size elements, after checking that it lies inside the arena."""
        size = byte_size(datatype, shape)
        self.arena.check(offset, size)
        dtype = DATATYPES[datatype].numpy_dtype
        return np.frombuffer(self.arena.view, dtype=dtype, count=size // dtype.itemsize, offset=offset).reshape(shape)

    def close(self) -> None:
        self.is_gone = True
        self.bell.close()
        with contextlib.suppress(OSError):
            self.arena.close()


class Producers:
    """Every producer that may send requests; changes only between batches. ``lock`` guards the doorbells."""

    def __init__(self) -> None:
        self._by_id: dict[int, Producer] = {}
        #: There are some whose requests are not counted.
        self.has_uncounted = False
        #: Held while a doorbell is rung: replies may come from a model's own threads.
        self.lock = threading.Lock()

    def attach(self, producer: Producer) -> None:
        self._by_id[producer.id] = producer
        self.has_uncounted |= not producer.is_counted

    def detach(self, producer: int) -> None:
        gone = self._by_id.pop(producer, None)
        if gone is not None:
            self.has_uncounted = not all(other.is_counted for other in self)
            with self.lock:
                gone.close()

    def __iter__(self) -> Iterator[Producer]:
        return iter(list(self._by_id.values()))

    def __contains__(self, producer: int) -> bool:
        return producer in self._by_id

    def get(self, producer: int) -> Producer:
        """Return the producer.

        Raises:
            Internal: it is not attached (it died in the meantime).
        """
        try:
            return self._by_id[producer]
        except KeyError:
            raise Internal("the producer of the request is gone") from None

    def guarded_bell(self, producer: int) -> GuardedBell:
        """Return the doorbell of a producer that is attached."""
        return GuardedBell(self.get(producer).bell, self.lock)

    def has_backlog(self) -> bool:
        return any(producer.bell.backlog for producer in self._by_id.values())

    def lagging(self) -> set[int]:
        """Return to whom something could not be sent yet."""
        return {producer.id for producer in self if producer.bell.backlog_count}

    def flush(self) -> None:
        """Try again to send what a full doorbell did not take."""
        with self.lock:
            for producer in self._by_id.values():
                producer.bell.flush()


def row_shape(spec: TensorSpec, rows: int, max_batch_size: int) -> tuple[int, ...]:
    """Return the shape that the backend sees for ``rows`` rows of a fixed tensor."""
    return (rows, *spec.backend_dims) if max_batch_size > 0 else spec.backend_dims


def backend_shape(spec: TensorSpec, shape: tuple[int, ...], max_batch_size: int) -> tuple[int, ...]:
    """Translate a request's full shape into what the backend sees (``reshape``, spec D-014, D-015)."""
    if spec.reshape is None or spec.is_shape_tensor:
        return shape
    batch = shape[:1] if max_batch_size > 0 else ()
    dims = shape[1:] if max_batch_size > 0 else shape
    return (*batch, *_map_variable(spec.dims, spec.reshape, dims))


def client_shape(spec: TensorSpec, shape: tuple[int, ...], max_batch_size: int) -> tuple[int, ...]:
    """Translate a shape that the backend produced into what the client sees."""
    if spec.reshape is None:
        return shape
    batch = shape[:1] if max_batch_size > 0 else ()
    dims = shape[1:] if max_batch_size > 0 else shape
    return (*batch, *_map_variable(spec.reshape, spec.dims, dims))


def _map_variable(source: tuple[int, ...], target: tuple[int, ...], actual: tuple[int, ...]) -> tuple[int, ...]:
    variable = iter([size for dim, size in zip(source, actual, strict=False) if dim == -1])
    return tuple(next(variable, 1) if dim == -1 else dim for dim in target)
