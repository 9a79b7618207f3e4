"""How a worker reaches the rest of the server: nested inference (BLS), model control, custom metrics.

The worker's loop installs an implementation with :func:`install`; until then every call says that it is not available.
All that ``exec``, ``async_exec`` and decoupled calls need is the one non-blocking :meth:`EngineAccess.infer`, whose
responses are taken by whoever waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from forebay.engine.backends.python_model.outer_requests import OuterRequest
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.errors import ServingError, Unsupported
from forebay.ipc.messages import ParameterValue
from forebay.ipc.spans import Trace

#: Where a request may want its outputs, besides a GPU: in host memory, or wherever the model leaves them.
ON_HOST, ANYWHERE = -1, -2


class NestedRequest(msgspec.Struct, frozen=True):
    """A request that a model makes."""

    model: str
    version: int
    """-1: the newest that is served."""
    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, ParameterValue]
    correlation_id: int | str
    flags: int
    """Sequence start 1, sequence end 2."""
    timeout_us: int
    trace: Trace | None
    """Of the request that it is made for."""
    allows_many_responses: bool
    """False: a decoupled target is refused with the text of spec P-093."""
    output_device: int = ANYWHERE
    """GPU in whose memory outputs are wanted, or one of the above."""
    made_for: Sequence[OuterRequest] = ()
    """The requests of the execution that makes it."""


class NestedResponse(msgspec.Struct, frozen=True):
    """One response to it."""

    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, ParameterValue]
    error: ServingError | None
    has_response: bool
    """False: only says that no further response follows."""
    final: bool


def refusal_text(model: str, error: ServingError) -> str:
    """Return what a model is told of a request that was not taken (spec P-093)."""
    return f"Model {model} - Error when running inference: {error.text}"


class NestedCall(Protocol):
    """A request that a model has made, until its last response. Thread-safe."""

    def take(self) -> list[NestedResponse]:
        """Return the responses that have come since the last time; of all of them the last is ``final``."""
        ...

    def wait(self) -> None:
        """Sleep until there is something to take."""
        ...

    def notify(self, on_news: Callable[[], None]) -> None:
        """Have ``on_news`` called once, on any thread, as soon as there is something to take; now if there is."""
        ...

    def cancel(self) -> None:
        """Nobody waits for further responses."""
        ...

    def abandon(self) -> None:
        """Cancel, and end at once: who waits gets what a cancelled request is answered.

        Raises:
            EngineGone: the server is gone.
        """
        ...

    @property
    def is_over(self) -> bool:
        """True if it cannot be abandoned any more."""
        ...


class EngineAccess(Protocol):
    """The rest of the server, as a worker sees it. Thread-safe."""

    def infer(self, request: NestedRequest) -> NestedCall:
        """Submit a request; returns at once.

        Raises:
            ServingError: the request was refused before it was queued (unknown model, wrong inputs, full arena).
        """
        ...

    def load_model(self, name: str, config: str, files: Mapping[str, bytes]) -> None:
        """Load or reload a model; ``files`` maps ``<version>/<name>`` to content.

        Raises:
            ServingError: why it failed.
        """
        ...

    def unload_model(self, name: str, *, unload_dependents: bool) -> None:
        """Unload a model."""
        ...

    def is_model_ready(self, name: str, version: str) -> bool:
        """Return whether a version (empty: any) takes requests."""
        ...


class NoEngineAccess:
    """Stands in until the loop has installed the real one."""

    def infer(self, request: NestedRequest) -> NestedCall:
        raise Unsupported("this worker is not connected to the scheduler, so its model cannot call other models")

    def load_model(self, name: str, config: str, files: Mapping[str, bytes]) -> None:
        raise Unsupported("this worker is not connected to the supervisor, so its model cannot load models")

    def unload_model(self, name: str, *, unload_dependents: bool) -> None:
        raise Unsupported("this worker is not connected to the supervisor, so its model cannot unload models")

    def is_model_ready(self, name: str, version: str) -> bool:
        raise Unsupported("this worker is not connected to the supervisor, so its model cannot ask for others")


class _Installed:
    access: EngineAccess = NoEngineAccess()


def install(access: EngineAccess) -> None:
    """Connect this process's models to the server."""
    _Installed.access = access


def engine() -> EngineAccess:
    """Return what was installed."""
    return _Installed.access
