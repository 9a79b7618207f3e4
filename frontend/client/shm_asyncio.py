"""The shared-memory client for programs that live in an event loop.

::

    async with await forebay.client.shm_asyncio.connect() as engine:
        model = await engine.model("alpha_model")
        x = model.input("features", rows=1)
        x[:] = features
        y = await model.infer()                  # float32 [1, 1]: a view, unchanged for as long as anybody has it

Filling and submitting never wait; an ``await`` lies between submission and answer only. Everything belongs to the loop
that ``connect`` was awaited in.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import numpy.typing as npt

from forebay.client.connection import Connection
from forebay.client.errors import DeadlineExceeded, EngineGone
from forebay.client.model import Future, Model, with_deadline
from forebay.client.options import NO_OPTIONS, Options, deadline_after
from forebay.client.pending import Array
from forebay.client.shm import Engine, Statistics


class AsyncEngine:
    """A connection whose answers the event loop reads."""

    def __init__(self, engine: Engine) -> None:
        """Watch the connection of ``engine``, which belongs to this object from now on."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._crowd: list[asyncio.Future[None]] = []
        self._watched: Connection | None = None
        self._watch()

    def _watch(self) -> None:
        self._watched = self._engine.connection
        self._loop.add_reader(self._watched.completions.fileno(), self._read)

    def _stop_watching(self) -> None:
        if self._watched is not None:
            self._loop.remove_reader(self._watched.completions.fileno())
            self._watched = None
        # Nobody else would wake them.
        self._wake_crowd()

    def _read(self) -> None:
        assert self._watched is not None
        try:
            self._watched.completions.read_nowait()
        except EngineGone:
            # Every request in flight has been told; end of file would be told over and over.
            self._stop_watching()
        self._wake_crowd()

    def _wake_crowd(self) -> None:
        crowd, self._crowd = self._crowd, []
        for waiting in crowd:
            if not waiting.done():
                waiting.set_result(None)

    async def model(self, name: str, version: int | str | None = None) -> AsyncModel:
        """Return a handle of a model; raises like :meth:`forebay.client.shm.Engine.model`."""
        return AsyncModel(self, await asyncio.to_thread(self._engine.model, name, version))

    async def models(self) -> list[tuple[str, int, str]]:
        """Return (name, version, state) of everything that the server knows."""
        return await asyncio.to_thread(self._engine.models)

    def statistics(self) -> Statistics:
        return self._engine.statistics()

    async def reconnect(self, timeout_s: float = 30.0) -> None:
        """Connect anew; see :meth:`forebay.client.shm.Engine.reconnect`."""
        self._stop_watching()
        await asyncio.to_thread(self._engine.reconnect, timeout_s)
        self._watch()

    async def make_way(self) -> None:
        """Wait until another request may be submitted without waiting."""
        while self._engine.connection.is_crowded and self._watched is not None:
            waiting = self._loop.create_future()
            self._crowd.append(waiting)
            await waiting

    def waker(self, future: asyncio.Future[None]) -> Callable[[], None]:
        """Return what resolves ``future`` from whichever thread reads."""

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            if threading.get_ident() == self._thread:
                resolve()
            else:
                self._loop.call_soon_threadsafe(resolve)

        return wake

    async def wait(self, future: Future, deadline_ns: int = 0) -> None:
        """Wait until ``future`` is done."""
        waiting = self._loop.create_future()
        if not self._engine.connection.completions.notify(future.pending, self.waker(waiting)):
            return
        if not deadline_ns:
            await waiting
            return
        left_s = (deadline_ns - deadline_after(0.0)) / 1e9
        try:
            await asyncio.wait_for(waiting, max(left_s, 0.0))
        except TimeoutError:
            if not future.pending.has_news:
                raise DeadlineExceeded("the deadline passed before the answer came") from None

    def close(self) -> None:
        """Leave."""
        self._stop_watching()
        self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncModel:
    """A model handle. Between ``input`` and ``infer`` or ``submit`` there must be no ``await``."""

    def __init__(self, engine: AsyncEngine, model: Model) -> None:
        self._engine = engine
        #: Signature, version and so on.
        self.description = model

    def input(self, name: str, rows: int | None = None, *, shape: tuple[int, ...] | None = None) -> Array:
        """Return an input of the next request; see :meth:`forebay.client.model.Model.input`."""
        return self.description.input(name, rows, shape=shape)

    def put(self, name: str, values: npt.ArrayLike) -> None:
        """Copy an input of the next request in; see :meth:`forebay.client.model.Model.put`."""
        self.description.put(name, values)

    def submit(self, *, options: Options = NO_OPTIONS) -> AsyncFuture:
        """Hand the request over; raises like :meth:`forebay.client.model.Model.submit`."""
        return AsyncFuture(self._engine, self.description.submit(options=options))

    async def infer(
        self, *, timeout_s: float | None = None, output: str | None = None, options: Options = NO_OPTIONS
    ) -> Array:
        """Run the request and return an output: the one named, else the model's first.

        A task that is cancelled cancels its request. Raises like :meth:`forebay.client.model.Model.infer`.
        """
        deadline_ns = deadline_after(timeout_s)
        future = self.submit(options=with_deadline(options, deadline_ns) if deadline_ns else options)
        try:
            return await future.result(timeout_s, output=output)
        except BaseException:
            future.cancel()
            raise


class AsyncFuture:
    """A request in flight."""

    def __init__(self, engine: AsyncEngine, future: Future) -> None:
        self._engine = engine
        self._future = future

    def done(self) -> bool:
        """True if ``result`` would return, or raise, at once."""
        return self._future.done()

    def cancel(self) -> bool:
        """Give the request up; False if its answer is here already."""
        return self._future.cancel()

    async def result(self, timeout_s: float | None = None, *, output: str | None = None) -> Array:
        """Wait for the answer; see :meth:`forebay.client.model.Future.result`."""
        if not self._future.pending.has_news:
            await self._engine.wait(self._future, deadline_after(timeout_s))
        return self._future.result(output=output)


async def connect(
    path: str | os.PathLike[str] | None = None, *, wait: Literal["park"] = "park", arena_bytes: int = 0
) -> AsyncEngine:
    """Connect to the server; see :func:`forebay.client.shm.connect`."""
    return AsyncEngine(await asyncio.to_thread(Engine, path, wait=wait, arena_bytes=arena_bytes))
