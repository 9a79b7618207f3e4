"""An ensemble as protocols see it: the same small surface as :class:`forebay.frontend.inference.Inference`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.device_places import NO_TARGETS, Targets
from forebay.frontend.ensemble.chain import ChainRoute, chain_of
from forebay.frontend.ensemble.one_step import OneStep, OneStepRoute
from forebay.frontend.ensemble.rows_route import sequence_changes
from forebay.frontend.ensemble.run import ensemble_of, ensemble_run
from forebay.frontend.ensemble.tensors import Block
from forebay.frontend.inference import Inference, InputTensor, OnResponse, OutputView, RequestMeta, Response
from forebay.ipc.arena import align
from forebay.ipc.ensemble.run import EnsembleRun, sequence_parameters
from forebay.ipc.ensemble.steps import StepReply, StepTimes
from forebay.ipc.ensemble.tensors import ClientsOwn, Tensor
from forebay.ipc.errors import Cancelled
from forebay.ipc.messages import TensorPlace
from forebay.ipc.spans import QUEUE_START, REQUEST_END, Trace


class EnsembleInference:
    """One request to an ensemble. Life as :class:`Inference`: placed -> submitted -> responses; ``cancel`` any time."""

    def __init__(
        self,
        route: RouteClient,
        inputs: Sequence[InputTensor],
        batch_size: int,
        *,
        is_bare: bool = False,
        targets: Targets = NO_TARGETS,
    ) -> None:
        """Take room for the inputs.

        Args:
            inputs: already validated against the ensemble; in device memory those that :func:`device_of` says so of.
            batch_size: as validated; 0 for an ensemble that does not batch.
            is_bare: it carries nothing but tensors.
            targets: outputs that go to device memory, if all who read them take them there.

        Raises:
            ArenaFull: there is no room.
        """
        engine = route.engine
        self.route = route
        self.rows = max(batch_size, 1)
        self._is_bare = is_bare
        self._targets = targets
        self._block = Block(route, sum(align(tensor.byte_size) for tensor in inputs if tensor.device is None))
        self._tensors: dict[str, Tensor] = {}
        self._run: EnsembleRun[RouteClient] | None = None
        self.is_done = False
        #: Where each input's bytes go, writable, in the order of the inputs.
        self.places: list[memoryview] = []
        offset = self._block.offset
        for tensor in inputs:
            place = tensor.device
            if place is not None:
                self._tensors[tensor.name] = Tensor(
                    tensor.datatype, tensor.shape, tensor.byte_size, place.offset, ClientsOwn(), memory=place.memory
                )
                self.places.append(memoryview(b""))
                continue
            self._tensors[tensor.name] = Tensor(tensor.datatype, tensor.shape, tensor.byte_size, offset, self._block)
            self.places.append(engine.view[offset : offset + tensor.byte_size])
            offset += align(tensor.byte_size)

    @property
    def rows_route(self) -> ChainRoute | None:
        chain = chain_of(ensemble_of(self.route))
        if chain is None or self.rows > max(chain.max_batch_size, 1):
            return None
        route = ChainRoute(chain)
        return route if self._is_bare or not route.sees_requests else None

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        """Run the ensemble; ``on_response`` may be called before this returns."""
        engine = self.route.engine

        def on_reply(reply: StepReply) -> None:
            self.is_done = reply.final
            on_response(
                Response(
                    outputs=tuple(
                        OutputView(
                            name,
                            tensor.datatype,
                            tensor.shape,
                            tensor.view(engine),
                            is_placed=tensor.memory is not None,
                        )
                        for name, tensor in reply.outputs.items()
                    ),
                    parameters=reply.parameters,
                    error=reply.error,
                    final=reply.final,
                    is_empty=not reply.has_response,
                )
            )

        # Of several responses one would overwrite the other.
        rooms = NO_TARGETS if self.route.entry.decoupled else self._targets
        devices = {name: (room.memory.device_id,) for name, room in rooms.items()}
        run = self._run = ensemble_run(
            self.route, self._tensors, self.rows, meta, on_reply, output_devices=devices, output_rooms=rooms
        )
        # The run holds the inputs now.
        self._block.release()
        run.start()

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self.is_done:
            return
        self.is_done = True
        if self._run is not None:
            self._run.cancel()
        else:
            self._block.release()


class OneStepInference:
    """One request to an ensemble of one step, placed where the model reads it. Life as :class:`Inference`."""

    def __init__(
        self,
        route: RouteClient,
        one: OneStep,
        inputs: Sequence[InputTensor],
        batch_size: int,
        *,
        is_bare: bool,
    ) -> None:
        """Take room for the inputs, in the model's slab if it has one.

        Raises:
            InvalidArgument: the inputs fit the ensemble, but not its model.
            ArenaFull: there is no room.
        """
        places = [TensorPlace(one.inputs[t.name], t.datatype, t.shape, 0, t.byte_size) for t in inputs]
        one.ensemble.checks.rows(one.route.entry, "", places)
        self.route = route
        self._one = one
        renamed = [InputTensor(one.inputs[t.name], t.datatype, t.shape, t.byte_size) for t in inputs]
        # What the ensemble leaves out is a choice of outputs that the model could see.
        is_bare = is_bare and len(one.outputs) == len(one.route.entry.outputs)
        self._inner = Inference(route.engine, one.route.route, renamed, batch_size, is_bare=is_bare)
        self.rows = self._inner.rows
        self.places = self._inner.places
        self._began_ns = 0
        self._trace: Trace | None = None
        self._is_counted = False

    @property
    def rows_route(self) -> OneStepRoute | None:
        return OneStepRoute(self._one) if self._inner.rows_route is not None else None

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        """Hand the filled request over; ``on_response`` is called from the event loop."""
        self._meta = meta
        self._on_response = on_response
        self._began_ns = time.monotonic_ns()
        wanted = tuple(name for name, tensor in self._one.outputs.items() if tensor in meta.outputs)
        model = self._one.route.entry
        if meta.trace is not None:
            meta.trace.note(QUEUE_START)
            self._trace = meta.trace.step(model.name, model.version)
        self._inner.submit(msgspec.structs.replace(meta, outputs=wanted, trace=self._trace), self._respond)

    def _respond(self, response: Response) -> None:
        self._is_counted = True
        self._count(response)
        if self._trace is not None:
            self._trace.note(REQUEST_END)
        if response.error is not None:
            self._on_response(Response(error=self._one.ensemble.prefixed(response.error)))
            return
        outputs, meta = self._one.outputs, self._meta
        sequence = (meta.sequence_id, meta.sequence_start, meta.sequence_end)
        self._on_response(
            Response(
                outputs=tuple(
                    OutputView(outputs[view.name], view.datatype, view.shape, view.data)
                    for view in response.outputs
                    if view.name in outputs
                ),
                parameters={**sequence_parameters(sequence), **sequence_changes(response.parameters)},
            )
        )

    def _count(self, response: Response) -> None:
        outcomes = self._one.ensemble.outcomes
        if response.error is not None:
            outcomes.failed(self._began_ns, response.error, ran=response.ran)
        else:
            times = StepTimes.since(self._began_ns, self.route.engine.reply_times())
            outcomes.succeeded(self.rows, self._began_ns, times)

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self._began_ns and not self._is_counted:
            self._is_counted = True
            self._one.ensemble.outcomes.failed(self._began_ns, Cancelled("cancelled"), ran=False)
        self._inner.cancel()
