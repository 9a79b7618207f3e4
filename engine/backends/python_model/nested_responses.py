"""What a nested call (BLS) returns: its responses, in order, for threads and for event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from forebay.engine.backends.python_model.engine_access import (
    NestedCall,
    NestedRequest,
    NestedResponse,
    engine,
    refusal_text,
)
from forebay.engine.backends.python_model.errors import TritonError
from forebay.engine.backends.python_model.outer_requests import watch
from forebay.engine.backends.python_model.response import InferenceResponse
from forebay.ipc.errors import ServingError


class ResponseIterator:
    """The responses of a nested request, in order; for ``for`` and for ``async for``. Thread-safe.

    Whoever waits reads the engine's answers itself: a call and its answer cost no switch of threads.
    """

    def __init__(self, request: NestedRequest) -> None:
        """Submit the request; what is wrong with it becomes its only response."""
        self._model = request.model
        self._lock = threading.Lock()
        self._arrived: deque[InferenceResponse] = deque()
        #: None: every response has arrived.
        self._call: NestedCall | None = None
        try:
            self._call = _submit(request)
        except ServingError as error:
            self._arrived.append(_refused(request.model, error))

    async def async_only(self) -> InferenceResponse:
        """Wait for the one response without blocking the event loop; cancelling the task cancels the request."""
        try:
            async for response in self:
                return response
        except asyncio.CancelledError:
            self.cancel()
            raise
        return _no_response(self._model)

    def cancel(self) -> None:
        """Tell the other model that nobody waits any more."""
        call = self._call
        if call is not None:
            call.cancel()

    def __iter__(self) -> Iterator[InferenceResponse]:
        return self

    def __next__(self) -> InferenceResponse:
        while (response := self._take()) is None:
            call = self._call
            if call is None:
                raise StopIteration
            call.wait()
        return response

    def __aiter__(self) -> AsyncIterator[InferenceResponse]:
        return self

    async def __anext__(self) -> InferenceResponse:
        while (response := self._take()) is None:
            call = self._call
            if call is None:
                raise StopAsyncIteration
            await _news_of(call)
        return response

    def _take(self) -> InferenceResponse | None:
        """Return the next response, if it is here."""
        with self._lock:
            if not self._arrived and self._call is not None:
                for nested in self._call.take():
                    if nested.has_response:
                        self._arrived.append(_as_response(nested))
                    if nested.final:
                        watch.forget(self._call)
                        self._call = None
                        break
            return self._arrived.popleft() if self._arrived else None


def only_response(request: NestedRequest) -> InferenceResponse:
    """Submit a request and wait for its one response; what is wrong with it becomes the response."""
    try:
        call = _submit(request)
    except ServingError as error:
        return _refused(request.model, error)
    try:
        return _wait_only(request.model, call)
    finally:
        watch.forget(call)


def _submit(request: NestedRequest) -> NestedCall:
    """Submit a request, to be abandoned with those that it is made for.

    Raises:
        ServingError: it was refused.
    """
    call = engine().infer(request)
    watch.add(call, request.made_for)
    return call


def _wait_only(model: str, call: NestedCall) -> InferenceResponse:
    while True:
        call.wait()
        for nested in call.take():
            if nested.has_response:
                return _as_response(nested)
            if nested.final:
                return _no_response(model)


def _as_response(nested: NestedResponse) -> InferenceResponse:
    if nested.error is not None:
        return InferenceResponse(error=TritonError(nested.error.text, int(nested.error.code)))
    response = InferenceResponse(nested.outputs)
    if nested.parameters:
        response.parameters().update(nested.parameters)
    return response


def _refused(model: str, error: ServingError) -> InferenceResponse:
    # Refused before it was queued. Triton flattens these to INTERNAL (spec P-093); what the other model answers keeps
    # its own code.
    return InferenceResponse(error=TritonError(refusal_text(model, error)))


def _no_response(model: str) -> InferenceResponse:
    return InferenceResponse(error=TritonError(f"Model {model} - Error when running inference: there was no response"))


async def _news_of(call: NestedCall) -> None:
    """Sleep until there is something to take."""
    loop = asyncio.get_running_loop()
    news: asyncio.Future[None] = loop.create_future()

    def resolve() -> None:
        if not news.done():
            news.set_result(None)

    def wake() -> None:
        # Nobody waits in a loop that was closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(resolve)

    call.notify(wake)
    await news
