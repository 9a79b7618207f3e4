"""One request running through an ensemble's graph. Pure: who runs the steps is a :class:`StepHost`.

A step runs as soon as all its inputs are there (spec S-100). Tensors belong to an *iteration*: the root iteration has
the request's inputs and what ordinary steps make of them; every response of a decoupled step opens an iteration of its
own, below the one that the step ran in, and the rest of the graph runs once in each (spec S-109).

Life: started -> responses -> done (answered | failed | cancelled). Behaviour: spec S-100..S-119 and Triton core's
ensemble_scheduler.cc.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, NamedTuple

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.ensemble.device_rooms import NO_OUTPUT_ROOMS, DeviceRoom
from forebay.ipc.ensemble.device_tensors import (
    NO_DEVICES,
    ClientDevices,
    device_outputs,
    device_places,
    devices_of_output,
)
from forebay.ipc.ensemble.graph import EnsembleGraph, GraphPlan, NeededStep
from forebay.ipc.ensemble.steps import (
    Model,
    OnStepReply,
    StepCall,
    StepHost,
    StepReply,
    StepRequest,
    StepTimes,
)
from forebay.ipc.ensemble.tensors import StepChecks, Tensor, fit_shape, hold_all, release_all, shaped_for
from forebay.ipc.errors import Cancelled, InvalidArgument, NotReady, ServingError, Unavailable
from forebay.ipc.messages import ParameterValue, TensorPlace
from forebay.ipc.validation import id_prefix

#: Responses of decoupled steps that may wait for their turn (``max_inflight_requests``).
_WAITING_MAX = 4096

#: Ensembles within ensembles; the supervisor refuses circles, so this is never reached by a checked repository.
DEPTH_MAX = 32


class Ensemble:
    """One loaded ensemble version: what all its requests share."""

    def __init__(self, entry: ModelEntry) -> None:
        self.name = entry.name
        self.graph = EnsembleGraph(entry)
        self.checks = StepChecks()

    def prefixed(self, error: ServingError) -> ServingError:
        """Return a step's error as the ensemble's (spec S-107)."""
        return type(error)(f"in ensemble '{self.name}', {error.text}")


class EnsembleRequest(NamedTuple):
    """What a request to an ensemble carries besides its tensors."""

    id: str
    outputs: tuple[str, ...]
    """Those wanted; empty: all."""
    sequence: tuple[int | str, bool, bool]
    """Correlation id, start, end."""
    output_devices: ClientDevices = NO_DEVICES
    """Outputs that the client takes in the memory of GPUs."""
    output_rooms: Mapping[str, DeviceRoom] = NO_OUTPUT_ROOMS
    """Where there, if it is memory of its own."""


class _Iteration:
    """Tensors of one pass through the graph, or through a part of it. Holds their blocks."""

    __slots__ = ("calls", "children", "is_answered", "parent", "sequence", "started", "tensors", "waiting")

    def __init__(self, parent: _Iteration | None, sequence: tuple[int | str, bool, bool]) -> None:
        self.parent = parent
        self.children: list[_Iteration] = []
        #: None: known to be missing (an optional input that was not given).
        self.tensors: dict[str, Tensor | None] = {}
        self.started: set[int] = set()
        self.is_answered = False
        #: Steps of this iteration that run.
        self.calls = 0
        #: Responses of its steps that wait for their turn.
        self.waiting = 0
        #: Correlation id, start, end: of the request, or as a step's response parameters changed them (spec S-111).
        self.sequence = sequence

    def owner_of(self, name: str) -> _Iteration | None:
        """Return the iteration that has the tensor: this one or one above; None: nobody yet."""
        iteration: _Iteration | None = self
        while iteration is not None and name not in iteration.tensors:
            iteration = iteration.parent
        return iteration

    def subtree(self) -> Iterator[_Iteration]:
        yield self
        for child in tuple(self.children):
            yield from child.subtree()

    def add(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Become a user of the tensors."""
        hold_all(tensors.values())
        self.tensors.update(tensors)

    def release(self) -> None:
        """Give the tensors back, and those of the iterations below."""
        for iteration in self.subtree():
            release_all(iteration.tensors.values())
            iteration.tensors = {}
        self.children = []


class EnsembleRun(Generic[Model]):
    """One request to an ensemble."""

    def __init__(
        self,
        model: Ensemble,
        entry: ModelEntry,
        host: StepHost[Model],
        inputs: Mapping[str, Tensor],
        rows: int,
        request: EnsembleRequest,
        on_reply: OnStepReply,
    ) -> None:
        """Prepare; nothing runs before :meth:`start`.

        Args:
            inputs: the ensemble's inputs that were given; held until the end of the run.
            rows: batch items, at least 1.
        """
        self.is_done = False
        self._model = model
        self._entry = entry
        self._host = host
        self._plan: GraphPlan = model.graph.plan(request.outputs)
        self._rows = rows
        self._id = request.id
        self._on_reply = on_reply
        self._began_ns = time.monotonic_ns()
        self._times = StepTimes()
        self._calls: dict[int, StepCall] = {}
        self._next_call = 0
        self._is_mixed: bool | None = None
        self._output_devices = request.output_devices
        self._output_rooms = request.output_rooms
        #: Some tensor is on a GPU, or may stay there.
        self._may_use_devices = any(tensor.memory is not None for tensor in inputs.values())
        self._models: dict[int, Model] = {}
        #: Responses of decoupled steps that wait for others to be worked on: parent, ensemble tensors, parameters.
        self._waiting: deque[tuple[_Iteration, dict[str, Tensor | None], Mapping[str, ParameterValue]]] = deque()
        #: Those that are being worked on, in the order in which they were opened: parents before their children.
        self._in_flight_responses: dict[_Iteration, None] = {}
        #: Nested calls of :meth:`_advance`: a step may reply while it is being started.
        self._advancing = 0
        self._root = _Iteration(None, request.sequence)
        given: dict[str, Tensor | None] = {spec.name: None for spec in entry.inputs}
        given.update(inputs)
        self._root.add(given)

    def start(self) -> None:
        """Run what can run; the reply may come before this returns."""
        try:
            self._resolve()
        except ServingError as error:
            self._fail(error)
            return
        self._advance(self._root, tuple(self._root.tensors))
        self._settle()

    def cancel(self) -> None:
        """Nobody waits any more: steps that wait are taken out, steps that run are told, no further ones start."""
        if not self.is_done:
            self._end(StepReply(error=Cancelled("cancelled")), is_cancelled=True)

    def _resolve(self) -> None:
        """Settle which versions the steps mean, and keep those loaded until the end of the run."""
        for needed in self._plan.steps:
            step = needed.step
            model = self._host.find(step)
            if model is None:
                version = f" version {step.version}" if step.version > 0 else ""
                raise NotReady(f"Request for unknown model: '{step.model}'{version} is not at ready state")
            self._models[needed.number] = model

    # --- the graph ---

    def _advance(self, iteration: _Iteration, names: tuple[str, ...]) -> None:
        """Tensors have arrived: start what waited for them, answer what is complete."""
        readers = self._plan.readers
        candidates = {step.number: step for name in names for step in readers.get(name, ())}
        self._advancing += 1
        for below in iteration.subtree():
            for needed in candidates.values():
                if self.is_done:
                    return
                if needed.number not in below.started and self._is_ready(below, needed.step.inputs.values()):
                    self._start_step(below, needed)
        complete = [
            below
            for below in iteration.subtree()
            if not below.is_answered and self._is_ready(below, self._plan.outputs)
        ]
        while complete and not self.is_done:
            below = complete.pop(0)
            self._answer(below, is_last=not complete and self._advancing == 1)
        self._advancing -= 1

    def _is_ready(self, iteration: _Iteration, names: Iterable[str]) -> bool:
        """Whether all tensors are known, and at least one belongs to this iteration and not to one above."""
        is_own = False
        for name in names:
            owner = iteration.owner_of(name)
            if owner is None:
                return False
            is_own = is_own or owner is iteration
        return is_own

    def _start_step(self, iteration: _Iteration, needed: NeededStep) -> None:
        model = self._models[needed.number]
        inputs: dict[str, Tensor] = {}
        for name, ensemble_name in needed.step.inputs.items():
            owner = iteration.owner_of(ensemble_name)
            assert owner is not None
            tensor = owner.tensors[ensemble_name]
            if tensor is None:
                spec = model.entry.input_named(name)
                if spec is None or not spec.optional:
                    return  # Can never run (spec S-116).
                continue
            try:
                if tensor.block is None:
                    tensor = owner.tensors[ensemble_name] = self._host.place(tensor)
            except ServingError as error:
                self._fail(error)
                return
            inputs[name] = tensor
        iteration.started.add(needed.number)
        iteration.calls += 1
        number = self._next_call
        self._next_call += 1

        def on_reply(reply: StepReply) -> None:
            self._step_replied(iteration, needed, number, reply)

        try:
            call = self._calls[number] = self._call(model, needed, inputs, iteration, on_reply)
            call.start()
        except ServingError as error:
            self._fail(error)

    def _call(
        self,
        model: Model,
        needed: NeededStep,
        inputs: Mapping[str, Tensor],
        iteration: _Iteration,
        on_reply: OnStepReply,
    ) -> StepCall:
        entry = model.entry
        shaped = shaped_for(entry, inputs)
        places = [
            TensorPlace(name, tensor.datatype, tensor.shape, tensor.offset, tensor.byte_size)
            for name, tensor in shaped.items()
        ]
        request = StepRequest(
            inputs=shaped,
            places=places,
            rows=self._model.checks.rows(entry, self._id, places),
            outputs=() if len(needed.outputs) == len(entry.outputs) else needed.outputs,
            sequence=iteration.sequence,
        )
        if entry.device_id >= 0 or entry.is_ensemble or self._may_use_devices:
            request = self._with_devices(request, needed, entry)
        return self._host.call(model, request, on_reply)

    def _with_devices(self, request: StepRequest, needed: NeededStep, entry: ModelEntry) -> StepRequest:
        """Add to a step's request what concerns device memory."""
        if entry.is_ensemble and not entry.response_cache:
            outputs = needed.step.outputs
            devices = {name: found for name in needed.outputs if (found := self._devices_of(outputs[name]))}
            request = request._replace(output_devices=devices)
        elif entry.device_id >= 0:
            request = request._replace(device_outputs=device_outputs(needed, entry, request.rows, self._devices_of))
        if self._output_rooms:
            outputs = needed.step.outputs
            rooms = {name: self._output_rooms[outputs[name]] for name in outputs if outputs[name] in self._output_rooms}
            request = request._replace(output_rooms=rooms)
        if request.output_devices or request.device_outputs:
            self._may_use_devices = True
        if not self._may_use_devices:
            return request
        places, memories = device_places(request.inputs)
        return request._replace(places=places, memories=memories)

    def _devices_of(self, tensor: str) -> frozenset[int]:
        return devices_of_output(self._plan, tensor, self._device_of, self._output_devices)

    def _device_of(self, reader: NeededStep, name: str) -> int:
        return self._host.device_of(self._models[reader.number], name)

    # --- replies ---

    def _step_replied(self, iteration: _Iteration, needed: NeededStep, number: int, reply: StepReply) -> None:
        if self.is_done:
            return  # Others' results are worth nothing after a failure (spec S-107).
        if reply.final:
            del self._calls[number]
            iteration.calls -= 1
            self._times = self._times.plus(reply.times)
        if reply.error is not None:
            self._fail(reply.error, ran=reply.ran)
            return
        if reply.has_response:
            outputs = needed.step.outputs
            tensors: dict[str, Tensor | None] = {outputs[name]: None for name in needed.outputs}
            tensors.update((outputs[name], reply.outputs[name]) for name in needed.outputs if name in reply.outputs)
            if not self._models[needed.number].entry.decoupled:
                self._take(iteration, tensors, reply.parameters)
            elif not self._must_wait():
                self._open(iteration, tensors, reply.parameters)
            elif len(self._waiting) >= _WAITING_MAX:
                self._fail(Unavailable(f"more than {_WAITING_MAX} responses wait for the steps behind them"))
                return
            else:
                hold_all(tensors.values())
                iteration.waiting += 1
                self._waiting.append((iteration, tensors, reply.parameters))
        self._settle()

    def _must_wait(self) -> bool:
        limit = self._entry.max_inflight_requests
        return 0 < limit <= len(self._in_flight_responses)

    def _open(
        self, parent: _Iteration, tensors: dict[str, Tensor | None], parameters: Mapping[str, ParameterValue]
    ) -> None:
        """Run the rest of the graph for one response of a decoupled step."""
        child = _Iteration(parent, parent.sequence)
        parent.children.append(child)
        self._in_flight_responses[child] = None
        self._take(child, tensors, parameters)

    def _take(
        self, iteration: _Iteration, tensors: dict[str, Tensor | None], parameters: Mapping[str, ParameterValue]
    ) -> None:
        if parameters:
            sequence_id, is_start, is_end = iteration.sequence
            iteration.sequence = (
                _id_parameter(parameters.get("sequence_id"), sequence_id),
                bool(parameters.get("sequence_start", is_start)),
                bool(parameters.get("sequence_end", is_end)),
            )
        iteration.add(tensors)
        self._advance(iteration, tuple(tensors))

    def _answer(self, iteration: _Iteration, *, is_last: bool) -> None:
        """Answer with what is complete; ``is_last``: of all that the tensor at hand has made complete."""
        outputs: dict[str, Tensor] = {}
        entry = self._entry
        for name in self._plan.outputs:
            owner = iteration.owner_of(name)
            assert owner is not None
            tensor = owner.tensors[name]
            if tensor is None:
                return  # A step left it out; nothing will write it any more (spec S-116).
            spec = entry.output_named(name)
            assert spec is not None
            shape = fit_shape(tensor.shape, spec.dims, is_batching=entry.max_batch_size > 0)
            outputs[name] = tensor._replace(shape=shape)
        iteration.is_answered = True
        final = not self._entry.decoupled or (is_last and not (self._calls or self._waiting))
        reply = StepReply(
            outputs, sequence_parameters(iteration.sequence), final=final, times=self._times if final else StepTimes()
        )
        if final:
            self._end(reply)
        else:
            self._on_reply(reply)

    def _settle(self) -> None:
        """Something has ended: let waiting responses go on, and see whether this was all."""
        if self._advancing:
            return  # Who starts steps may have others to start, and settles then.
        while not self.is_done:
            self._release_what_is_over()
            # What is in flight may itself wait for one of those that wait.
            if not self._waiting or (self._calls and self._must_wait()):
                break
            parent, tensors, parameters = self._waiting.popleft()
            parent.waiting -= 1
            self._open(parent, tensors, parameters)
            release_all(tensors.values())
        if self.is_done or self._calls or self._waiting:
            return
        if self._entry.decoupled:
            self._end(StepReply(has_response=False, times=self._times))
            return
        self._fail(
            InvalidArgument(
                f"{id_prefix(self._id)}unexpected deadlock, at least one output is not set while no more ensemble "
                "steps can be made"
            )
        )

    def _release_what_is_over(self) -> None:
        # Children first: they leave their parents' lists before those are emptied.
        for child in [child for child in reversed(self._in_flight_responses) if self._is_over(child)]:
            del self._in_flight_responses[child]
            assert child.parent is not None
            child.parent.children.remove(child)
            child.release()

    def _is_over(self, child: _Iteration) -> bool:
        """Whether nothing of one response of a decoupled step is left to do."""
        if any(iteration.calls or iteration.waiting for iteration in child.subtree()):
            return False
        if child.is_answered or not self._mixes_outputs():
            return True
        # An output that every response repeats may still be on its way in an iteration above.
        above = child.parent
        while above is not None and not above.calls:
            above = above.parent
        return above is None

    def _mixes_outputs(self) -> bool:
        """Whether the outputs come from different decoupled steps, or some from none."""
        if self._is_mixed is None:
            decoupled = frozenset(index for index, model in self._models.items() if model.entry.decoupled)
            origins = {self._model.graph.origins(name, decoupled) for name in self._plan.outputs}
            self._is_mixed = len(origins) > 1
        return self._is_mixed

    # --- the end ---

    def _fail(self, error: ServingError, *, ran: bool = False) -> None:
        """The first failing step ends the request (spec S-107)."""
        self._end(StepReply(error=self._model.prefixed(error), ran=ran, times=self._times))

    def _end(self, reply: StepReply, *, is_cancelled: bool = False) -> None:
        self.is_done = True
        for call in tuple(self._calls.values()):
            call.cancel()
        self._calls.clear()
        try:
            if not is_cancelled:
                self._on_reply(reply)
        finally:
            self._root.release()
            while self._waiting:
                release_all(self._waiting.popleft()[1].values())
            self._in_flight_responses.clear()
            for model in self._models.values():
                self._host.let_go(model)
            self._models.clear()
            self._host.ended(self._rows, self._began_ns, reply)


def sequence_parameters(sequence: tuple[int | str, bool, bool]) -> dict[str, ParameterValue]:
    """Return what every ensemble says of sequences, those without one too (spec S-111)."""
    sequence_id, is_start, is_end = sequence
    return {"sequence_id": sequence_id, "sequence_start": is_start, "sequence_end": is_end}


def _id_parameter(value: ParameterValue | None, default: int | str) -> int | str:
    return value if isinstance(value, int | str) and not isinstance(value, bool) else default
