"""A step whose model has the response cache: answered from there, by place, or run and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.inference import OutputView, RequestMeta
from forebay.frontend.response_cache import CacheEntry, KeyInput, ResponseCache, request_key
from forebay.ipc.ensemble.steps import OnStepReply, StepCall, StepReply
from forebay.ipc.ensemble.tensors import Tensor


class CachedCall:
    """Asks the cache first (spec S-114: composing models' caches work too)."""

    def __init__(
        self,
        cache: ResponseCache,
        route: RouteClient,
        inputs: Mapping[str, Tensor],
        meta: RequestMeta,
        run: Callable[[OnStepReply], StepCall],
        on_reply: OnStepReply,
    ) -> None:
        """Prepare.

        Args:
            inputs: by the model's names.
            run: makes the request that runs on a miss.
        """
        self._cache = cache
        self._route = route
        self._inputs = inputs
        self._meta = meta
        self._run = run
        self._on_reply = on_reply
        self._key = b""
        self._inner: StepCall | None = None

    def start(self) -> None:
        """Answer, or run the step.

        Raises:
            ServingError: the step cannot be run.
        """
        began_ns = time.monotonic_ns()
        engine = self._route.engine
        self._key = request_key(
            self._route.route,
            self._meta,
            (
                KeyInput(name, tensor.datatype, tensor.shape, tensor.view(engine))
                for name, tensor in self._inputs.items()
            ),
        )
        entry = self._cache.find(self._key, self._route, began_ns)
        if entry is None:
            self._inner = self._run(self._respond)
            self._inner.start()
            return
        entry.hold()
        try:
            self._on_reply(StepReply(_tensors(entry), entry.parameters))
        finally:
            entry.release()

    def _respond(self, reply: StepReply) -> None:
        if reply.error is None and reply.final:
            engine = self._route.engine
            views = [OutputView(name, t.datatype, t.shape, t.view(engine)) for name, t in reply.outputs.items()]
            self._cache.insert(self._key, self._route, views, reply.parameters)
        self._on_reply(reply)

    def cancel(self) -> None:
        if self._inner is not None:
            self._inner.cancel()


def _tensors(entry: CacheEntry) -> dict[str, Tensor]:
    return {
        place.name: Tensor(place.datatype, place.shape, place.byte_size, place.offset, entry) for place in entry.outputs
    }
