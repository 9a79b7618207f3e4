"""Ensembles as this frontend runs them: their steps are requests of its own, tensors pass by place in its arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.ensemble.cached_call import CachedCall
from forebay.frontend.ensemble.outcome import Outcomes
from forebay.frontend.ensemble.step_call import ModelCall
from forebay.frontend.ensemble.tensors import placed
from forebay.frontend.inference import RequestMeta
from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.ensemble.device_rooms import NO_OUTPUT_ROOMS, DeviceRoom
from forebay.ipc.ensemble.device_tensors import NO_DEVICES, ClientDevices, device_inputs, device_of_input
from forebay.ipc.ensemble.graph import NeededStep
from forebay.ipc.ensemble.run import DEPTH_MAX, Ensemble, EnsembleRequest, EnsembleRun
from forebay.ipc.ensemble.steps import OnStepReply, StepCall, StepReply, StepRequest
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.ensemble.traced import traced_reply, traced_run
from forebay.ipc.errors import Unavailable

if TYPE_CHECKING:
    from forebay.frontend.ensemble.chain import Chain


class EnsembleModel(Ensemble):
    """One loaded ensemble version as this frontend runs it."""

    def __init__(self, route: RouteClient) -> None:
        super().__init__(route.entry)
        self.route = route
        self.outcomes = Outcomes(route)
        #: The latest versions of the steps' models and their GPUs, and how requests lie in rows; kept by ``chain.py``.
        self.chain_targets: tuple[tuple[RouteClient | None, ...], tuple[int, ...]] = ((), ())
        self.chain: Chain | None = None


def ensemble_of(route: RouteClient) -> EnsembleModel:
    """Return what the requests of an ensemble share; made at its first request."""
    model = route.ensemble
    if model is None:
        model = route.ensemble = EnsembleModel(route)
    assert isinstance(model, EnsembleModel)
    return model


def ensemble_run(
    route: RouteClient,
    inputs: Mapping[str, Tensor],
    rows: int,
    meta: RequestMeta,
    on_reply: OnStepReply,
    depth: int = 0,
    output_devices: ClientDevices = NO_DEVICES,
    output_rooms: Mapping[str, DeviceRoom] = NO_OUTPUT_ROOMS,
) -> EnsembleRun[RouteClient]:
    """Return a request to an ensemble, not yet started; it holds the inputs.

    Args:
        rows: batch items, at least 1.
        depth: how many ensembles this one runs inside of.
        output_devices: outputs that may be in the memory of GPUs.
        output_rooms: where there, if it is the client's.
    """
    model = ensemble_of(route)
    sequence = (meta.sequence_id, meta.sequence_start, meta.sequence_end)
    request = EnsembleRequest(meta.id, meta.outputs, sequence, output_devices, output_rooms)
    if meta.trace is not None:
        on_reply = traced_run(meta.trace, inputs, route.engine, on_reply)
    return EnsembleRun(model, route.entry, FrontendSteps(model, meta, depth), inputs, rows, request, on_reply)


def device_of(model: RouteClient, name: str, depth: int = 0) -> int:
    """Return the GPU in whose memory a model takes an input, or all steps of an ensemble do; -1: there is none.

    Args:
        depth: how many ensembles it runs inside of.
    """
    entry = model.entry
    if not entry.is_ensemble:
        return device_of_input(entry, name)

    def of_step(reader: NeededStep, inner_name: str) -> int:
        step = reader.step
        route = model.engine.find_route(step.namespace, step.model, step.version)
        return -1 if route is None else device_of(route, inner_name, depth + 1)

    plan = ensemble_of(model).graph.plan(())
    is_read_on_host = entry.response_cache or depth > DEPTH_MAX
    return -1 if is_read_on_host else device_inputs(plan, (name,), of_step).get(name, -1)


class FrontendSteps:
    """Runs the steps of one request: a :class:`StepHost`."""

    def __init__(self, ensemble: EnsembleModel, meta: RequestMeta, depth: int) -> None:
        self._ensemble = ensemble
        self._engine = ensemble.route.engine
        self._meta = meta
        self._depth = depth

    def find(self, step: EnsembleStep) -> RouteClient | None:
        if self._depth > DEPTH_MAX:
            raise Unavailable(f"ensembles are nested more than {DEPTH_MAX} deep")
        route = self._engine.find_route(step.namespace, step.model, step.version)
        if route is not None:
            route.count_ensemble_use(1)
        return route

    def let_go(self, model: RouteClient) -> None:
        model.count_ensemble_use(-1)

    def device_of(self, model: RouteClient, name: str) -> int:
        return device_of(model, name, self._depth)

    def place(self, tensor: Tensor) -> Tensor:
        return placed(tensor, self._ensemble.route)

    def call(self, model: RouteClient, request: StepRequest, on_reply: OnStepReply) -> StepCall:
        entry = model.entry
        trace = self._meta.trace
        if trace is not None:
            trace = trace.step(entry.name, entry.version)
            if trace is not None:
                on_reply = traced_reply(trace, on_reply)
                if trace.shows_tensors:
                    # What a trace shows must be on the host.
                    request = request._replace(device_outputs={}, output_devices={}, output_rooms={})
        sequence_id, is_start, is_end = request.sequence
        meta = msgspec.structs.replace(
            self._meta,
            trace=trace,
            outputs=request.outputs,
            sequence_id=sequence_id,
            sequence_start=is_start,
            sequence_end=is_end,
        )

        def run(reply_to: OnStepReply) -> StepCall:
            if entry.is_ensemble:
                depth, devices, rooms = self._depth + 1, request.output_devices, request.output_rooms
                return ensemble_run(model, request.inputs, request.rows, meta, reply_to, depth, devices, rooms)
            return ModelCall(model, request, meta, reply_to)

        cache = self._engine.response_cache
        if cache is not None and entry.response_cache:
            return CachedCall(cache, model, request.inputs, meta, run, on_reply)
        return run(on_reply)

    def ended(self, rows: int, began_ns: int, reply: StepReply) -> None:
        outcomes = self._ensemble.outcomes
        if reply.error is not None:
            outcomes.failed(began_ns, reply.error, ran=reply.ran)
        else:
            outcomes.succeeded(rows, began_ns, reply.times)
