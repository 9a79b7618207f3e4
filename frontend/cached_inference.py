"""An inference that asks the response cache first; the same small surface as every other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.inference import InputTensor, OnResponse, OutputView, RequestMeta, Response
from forebay.frontend.response_cache import KeyInput, ResponseCache, request_key
from forebay.ipc.messages import ParameterValue


class Uncached(Protocol):
    """What runs on a miss."""

    @property
    def route(self) -> RouteClient: ...

    @property
    def rows(self) -> int: ...

    @property
    def places(self) -> list[memoryview]: ...

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None: ...

    def cancel(self) -> None: ...


class CachedInference:
    """One request to a model whose answers are kept.

    Life: placed -> answered from the cache | waits for an equal request | submitted -> responses.
    """

    __slots__ = ("_cache", "_inner", "_inputs", "_is_done", "_is_leader", "_key", "_meta", "_on_response", "_since_ns")

    def __init__(self, cache: ResponseCache, inner: Uncached, inputs: Sequence[InputTensor]) -> None:
        """Wrap a request that has room for these inputs."""
        self._cache = cache
        self._inner = inner
        self._inputs = inputs
        self._key = b""
        self._is_leader = False
        self._is_done = False
        self._since_ns = 0

    @property
    def route(self) -> RouteClient:
        return self._inner.route

    @property
    def rows(self) -> int:
        return self._inner.rows

    @property
    def places(self) -> list[memoryview]:
        return self._inner.places

    @property
    def rows_route(self) -> None:
        """A plan would pass the cache by."""
        return None

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        """Answer from the cache, before this returns; or run."""
        self._meta = meta
        self._on_response = on_response
        self._since_ns = time.monotonic_ns()
        self._key = request_key(
            self.route.route,
            meta,
            (
                KeyInput(tensor.name, tensor.datatype, tensor.shape, place)
                for tensor, place in zip(self._inputs, self._inner.places, strict=True)
            ),
        )
        entry = self._cache.find(self._key, self.route, self._since_ns)
        if entry is not None:
            self._inner.cancel()
            self._is_done = True
            # The callback may make others, and so the cache evict this entry.
            entry.hold()
            try:
                on_response(Response(outputs=entry.views(), parameters=entry.parameters))
            finally:
                entry.release()
        elif not self._cache.join(self._key, self):
            self._is_leader = True
            self._inner.submit(meta, self._respond)

    def _respond(self, response: Response) -> None:
        self._is_done = response.final
        if self._is_leader:
            self._is_leader = False
            if response.error is None and response.final:
                self._cache.insert(self._key, self.route, response.outputs, response.parameters)
                self._on_response(response)
                self._cache.answered(self._key, response.outputs, response.parameters)
                return
            self._cache.failed(self._key)
        self._on_response(response)

    # --- as one that waits ---

    def leader_answered(self, outputs: Sequence[OutputView], parameters: Mapping[str, ParameterValue]) -> None:
        if self._is_done:
            return  # Cancelled by what was done with the answer before this one.
        self._inner.cancel()
        self._is_done = True
        self._cache.count_hit(self.route, time.monotonic_ns() - self._since_ns)
        self._on_response(Response(outputs=tuple(outputs), parameters=parameters))

    def leader_failed(self) -> None:
        if self._is_done:
            return
        self._is_leader = not self._cache.join(self._key, self)
        if self._is_leader:
            self._inner.submit(self._meta, self._respond)

    def cancel(self) -> None:
        """Nobody waits any more; an equal request that waits for this one runs in its place."""
        if self._is_done:
            return
        self._is_done = True
        self._inner.cancel()
        if self._is_leader:
            self._is_leader = False
            self._cache.failed(self._key)
        elif self._key:
            self._cache.leave(self._key, self)
