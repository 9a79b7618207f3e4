"""Where every protocol begins an inference: chooses how a request runs, by what kind of model it asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec

from forebay.frontend.cached_inference import CachedInference
from forebay.frontend.codec.infer_request import ParsedInfer
from forebay.frontend.data_plane.owners import NO_PARAMETERS
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.device_places import NO_TARGETS, Targets
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.ensemble.chain import ChainRoute
from forebay.frontend.ensemble.inference import EnsembleInference, OneStepInference
from forebay.frontend.ensemble.one_step import OneStepRoute, one_step_of
from forebay.frontend.ensemble.run import device_of
from forebay.frontend.inference import Inference, InputTensor, OnResponse, RequestMeta
from forebay.ipc.errors import NotReady
from forebay.ipc.messages import ParameterValue
from forebay.ipc.spans import Trace

#: Whose slab rows a plan takes.
RowsRoute: TypeAlias = RouteClient | OneStepRoute | ChainRoute


class PlacedInference(Protocol):
    """A request whose inputs have room: fill ``places``, then ``submit``, or ``cancel``.

    ``submit`` may call back before it returns: an ensemble may fail, and a cache may answer, at once.
    """

    @property
    def route(self) -> RouteClient:
        """Of the model that was asked."""
        ...

    @property
    def rows(self) -> int:
        """Batch items, at least 1."""
        ...

    @property
    def rows_route(self) -> RowsRoute | None:
        """What a plan for equal requests takes slab rows of; None: they never lie in rows."""
        ...

    @property
    def places(self) -> list[memoryview]:
        """Where each input's bytes go, writable, in the order of the inputs."""
        ...

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        """Hand the filled request over; ``on_response`` is called from the event loop until a final response."""
        ...

    def cancel(self) -> None:
        """Nobody waits any more; at any time."""
        ...


def request_meta(
    request: ParsedInfer, trace: Trace | None = None, forwarded: Mapping[str, ParameterValue] = NO_PARAMETERS
) -> RequestMeta:
    """Return what the engine must know of a request besides its tensors.

    Args:
        forwarded: headers that become parameters.
    """
    return RequestMeta(
        id=request.id,
        outputs=tuple(output.name for output in request.outputs),
        parameters={**request.parameters, **forwarded} if forwarded else request.parameters,
        sequence_id=request.sequence_id,
        sequence_start=request.sequence_start,
        sequence_end=request.sequence_end,
        priority=request.priority,
        timeout_us=request.timeout_us,
        trace=trace,
    )


def start_inference(
    engine: EngineClient,
    route_number: int,
    inputs: Sequence[InputTensor],
    batch_size: int,
    *,
    is_bare: bool = False,
    targets: Targets = NO_TARGETS,
) -> PlacedInference:
    """Take room for a request's inputs.

    Args:
        route_number: of the model version, from the catalog.
        inputs: already validated against the model.
        batch_size: as validated; 0 for a model that does not batch.
        is_bare: it carries nothing but tensors.
        targets: outputs that go to device memory.

    Raises:
        NotReady: the model version has just gone.
        ArenaFull: there is no room.
        InvalidArgument: the inputs fit an ensemble, but not its only model.
    """
    route = engine.routes.get(route_number)
    if route is None:
        raise NotReady("the model version was unloaded before the request could run")
    devices = {place.memory.device_id for place in targets.values()}
    devices |= {tensor.device.memory.device_id for tensor in inputs if tensor.device is not None}
    if devices == {route.entry.device_id}:
        return Inference(engine, route_number, inputs, batch_size, targets=targets)
    if devices:
        return _carried(engine, route, inputs, batch_size, targets)
    inference = _uncached(engine, route, inputs, batch_size, is_bare=is_bare)
    if route.entry.response_cache and engine.response_cache is not None:
        return CachedInference(engine.response_cache, inference, inputs)
    return inference


def _carried(
    engine: EngineClient, route: RouteClient, inputs: Sequence[InputTensor], batch_size: int, targets: Targets
) -> PlacedInference:
    """Return a request some of whose tensors couriers carry, because not all who read and make them are on one GPU."""
    from forebay.frontend.courier_inference import CourierInference

    if route.entry.is_ensemble and not route.entry.response_cache:
        stays = {tensor.name for tensor in inputs if _is_read_there(route, tensor)}
        carried = [msgspec.structs.replace(t, device=None) if t.name in stays else t for t in inputs]
        placed = [t if t.name in stays else msgspec.structs.replace(t, device=None) for t in inputs]
        inner: PlacedInference = EnsembleInference(route, placed, batch_size, targets=targets)
        return CourierInference(engine, inner, carried, targets)
    in_host_memory = [msgspec.structs.replace(tensor, device=None) for tensor in inputs]
    inner = start_inference(engine, route.route, in_host_memory, batch_size)
    return CourierInference(engine, inner, inputs, targets)


def _is_read_there(route: RouteClient, tensor: InputTensor) -> bool:
    """Whether an input of an ensemble lies where all steps that read it take it."""
    return tensor.device is not None and tensor.device.memory.device_id == device_of(route, tensor.name)


def _uncached(
    engine: EngineClient,
    route: RouteClient,
    inputs: Sequence[InputTensor],
    batch_size: int,
    *,
    is_bare: bool,
) -> PlacedInference:
    if not route.entry.is_ensemble:
        return Inference(engine, route.route, inputs, batch_size, is_bare=is_bare)
    one = one_step_of(route)
    if one is not None and all(tensor.name in one.inputs for tensor in inputs):
        return OneStepInference(route, one, inputs, batch_size, is_bare=is_bare)
    return EnsembleInference(route, inputs, batch_size, is_bare=is_bare)
