"""Ensembles as a client runs them: the steps are requests of its own, and tensors pass by place in its arena.

Whoever reads the completion doorbell starts the next steps, so an ensemble makes progress as long as somebody waits. A
step's output block is the next step's input block: nothing is copied on the way (spec L-030). What steps on one GPU
tell each other stays in its memory, which the server keeps and this process does not open.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence

import msgspec

from forebay.client.device_pools import DeviceLease, DevicePools
from forebay.client.in_flight import InFlight
from forebay.client.memory import Memory
from forebay.client.models import Models
from forebay.client.opened import Opened
from forebay.client.options import Options
from forebay.client.parcels import describe, reply_bytes
from forebay.client.pending import BlockLease, PendingParcel, PendingResponses
from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.ensemble.device_rooms import NO_OUTPUT_ROOMS, DeviceRoom, device_targets
from forebay.ipc.ensemble.device_tensors import NO_DEVICES, ClientDevices, device_inputs, device_of_input
from forebay.ipc.ensemble.graph import NeededStep
from forebay.ipc.ensemble.run import DEPTH_MAX, EnsembleRequest, EnsembleRun
from forebay.ipc.ensemble.steps import OnStepReply, StepCall, StepReply, StepRequest, StepTimes
from forebay.ipc.ensemble.tensors import Tensor
from forebay.ipc.ensemble.traced import traced_reply, traced_run
from forebay.ipc.errors import Cancelled, Internal, Moved, ServingError, Unavailable, from_wire, moved_text
from forebay.ipc.messages import InlineTensor, ReplyHead, TensorPlace

_NO_TARGETS: tuple[TensorPlace, ...] = ()


class KeptBlock:
    """A block between steps. It is given back when nobody refers to it any more, so users need not be counted."""

    __slots__ = ("lease",)

    def __init__(self, lease: BlockLease) -> None:
        self.lease = lease

    def hold(self) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do."""


def _tensor_in(lease: BlockLease, place: TensorPlace) -> Tensor:
    """Return the tensor of a place, which lies in the block of a lease."""
    memory = lease.memory if isinstance(lease, DeviceLease) else None
    return Tensor(place.datatype, place.shape, place.byte_size, place.offset, KeptBlock(lease), memory=memory)


class PendingEnsemble(PendingResponses):
    """A request to an ensemble. Its run is changed under the connection's lock only."""

    __slots__ = ("_host", "_is_second", "_run", "_tensors")

    def __init__(
        self,
        host: ClientSteps,
        model: Opened,
        inputs: Sequence[tuple[TensorPlace, BlockLease]],
        rows: int,
    ) -> None:
        """Prepare; nothing runs before :meth:`start`.

        Args:
            inputs: in the arena, or in device memory where :meth:`ClientSteps.device_inputs` says so.
        """
        super().__init__(model, rows)
        self._host = host
        self._tensors = {place.name: _tensor_in(lease, place) for place, lease in inputs}
        self._is_second = False
        #: None when it is over: run and request refer to each other, and blocks are to come back at once.
        self._run: EnsembleRun[Opened] | None = None

    def start(self) -> None:
        """Run the steps that can run.

        Raises:
            Moved: a step that takes an input in device memory has left the GPU since; nothing has run.
        """
        on_device = {name: tensor.memory.device_id for name, tensor in self._tensors.items() if tensor.memory}
        if on_device and not on_device.items() <= self._host.device_inputs().items():
            raise Moved(moved_text(self.model.name, next(iter(on_device.values()))))
        self._run = self._host.run(self._tensors, self.rows, self._take)
        self._run.start()

    def cancel(self) -> None:
        """Nobody waits any more: steps that wait are taken out, steps that run are told, no further ones start."""
        if self._run is not None:
            self.is_cancelled = True
            self._run.cancel()
            self._run = None
            self.finish(Cancelled("request was cancelled"))

    def device_lease(self, place: TensorPlace, held: Sequence[BlockLease]) -> DeviceLease | None:
        lease = held[place.memory - 1]
        return lease if isinstance(lease, DeviceLease) else None

    def _run_again(self) -> bool:
        """Begin anew, once, because a step has left the GPU that tensors of the run lie on; False: that was tried."""
        if self._is_second or self.response_count:
            return False
        self._is_second = True
        try:
            self.start()
        except ServingError:
            return False
        self._host.skip_count()
        return True

    def _take(self, reply: StepReply) -> None:
        if isinstance(reply.error, Moved) and self._run_again():
            return
        if reply.error is None and reply.has_response:
            places: list[TensorPlace] = []
            held: list[BlockLease] = []
            for name, tensor in reply.outputs.items():
                if isinstance(tensor.block, KeptBlock):
                    held.append(tensor.block.lease)
                    memory = 0 if tensor.memory is None else len(held)
                    place = TensorPlace(
                        name, tensor.datatype, tensor.shape, tensor.offset, tensor.byte_size, memory=memory
                    )
                    places.append(place)
            inline = tuple(
                InlineTensor(name, tensor.datatype, tensor.shape, tensor.data)
                for name, tensor in reply.outputs.items()
                if tensor.block is None
            )
            head = ReplyHead(outputs=tuple(places), inline=inline, parameters=dict(reply.parameters))
            self.respond(head, tuple(held))
        if reply.final:
            self._run = None
            self.has_run = reply.ran
            self.ends_empty = reply.error is None and not reply.has_response
            self.finish(reply.error)
        else:
            self.wake()


class ClientSteps:
    """Runs the steps of one request: a :class:`forebay.ipc.ensemble.steps.StepHost`."""

    def __init__(
        self,
        model: Opened,
        in_flight: InFlight,
        models: Models,
        memory: Memory,
        device_pools: DevicePools,
        options: Options,
        depth: int = 0,
        output_devices: ClientDevices = NO_DEVICES,
        output_rooms: Mapping[str, DeviceRoom] = NO_OUTPUT_ROOMS,
    ) -> None:
        """
        Args:
            model: the ensemble.
            options: of the request to the ensemble.
            depth: how many ensembles this one runs inside of.
            output_devices: outputs that may be in the memory of GPUs.
            output_rooms: where there, if it is this process's: leases.
        """
        self._model = model
        self._in_flight = in_flight
        self._models = models
        self._memory = memory
        self._device_pools = device_pools
        self._options = options
        self._depth = depth
        self._output_devices = output_devices
        self._output_rooms = output_rooms
        self._runs_uncounted = 0

    def device_inputs(self) -> dict[str, int]:
        """Return the inputs of the ensemble that steps take in the memory of one GPU each, and that GPU."""
        assert self._model.ensemble is not None
        plan = self._model.ensemble.graph.plan(self._options.outputs)
        names = [spec.name for spec in self._model.signature.inputs]
        return device_inputs(plan, names, functools.partial(self._device_of_step, depth=self._depth))

    def run(self, inputs: Mapping[str, Tensor], rows: int, on_reply: OnStepReply) -> EnsembleRun[Opened]:
        """Return the run of the request, not yet started."""
        model, options = self._model, self._options
        assert model.ensemble is not None
        sequence = (options.sequence_id, options.sequence_start, options.sequence_end)
        request = EnsembleRequest(
            options.request_id, options.outputs, sequence, self._output_devices, self._output_rooms
        )
        if options.trace is not None:
            on_reply = traced_reply(options.trace, traced_run(options.trace, inputs, self._memory, on_reply))
        return EnsembleRun(model.ensemble, model.entry, self, inputs, rows, request, on_reply)

    def find(self, step: EnsembleStep) -> Opened | None:
        if self._depth > DEPTH_MAX:
            raise Unavailable(f"ensembles are nested more than {DEPTH_MAX} deep")
        try:
            model = self._models.open((step.model, max(step.version, 0), step.namespace))
            self._models.refresh(model)
        except ServingError:
            return None
        return model

    def let_go(self, model: Opened) -> None:
        """Nothing to do: a step whose model was loaded anew follows it."""

    def device_of(self, model: Opened, name: str) -> int:
        return self._device_of(model, name, self._depth)

    def _device_of(self, model: Opened, name: str, depth: int) -> int:
        if model.ensemble is None:
            return device_of_input(model.entry, name)
        if depth > DEPTH_MAX:
            return -1
        device_of = functools.partial(self._device_of_step, depth=depth + 1)
        return device_inputs(model.ensemble.graph.plan(()), (name,), device_of).get(name, -1)

    def _device_of_step(self, reader: NeededStep, name: str, *, depth: int) -> int:
        model = self.find(reader.step)
        return -1 if model is None else self._device_of(model, name, depth)

    def place(self, tensor: Tensor) -> Tensor:
        lease = self._memory.loan_block(tensor.byte_size)
        self._memory.write(lease, tensor.data)
        return tensor._replace(offset=lease.offset, block=KeptBlock(lease), data=b"")

    def call(self, model: Opened, request: StepRequest, on_reply: OnStepReply) -> StepCall:
        sequence_id, is_start, is_end = request.sequence
        trace = self._options.trace
        options = msgspec.structs.replace(
            self._options,
            trace=None if trace is None else trace.step(model.name, model.version),
            outputs=request.outputs,
            sequence_id=sequence_id,
            sequence_start=is_start,
            sequence_end=is_end,
        )
        if options.trace is not None and options.trace.shows_tensors:
            # What a trace shows must be on the host.
            request = request._replace(device_outputs={}, output_devices={}, output_rooms={})
        if model.ensemble is not None:
            host = ClientSteps(
                model,
                self._in_flight,
                self._models,
                self._memory,
                self._device_pools,
                options,
                self._depth + 1,
                request.output_devices,
                request.output_rooms,
            )
            return host.run(request.inputs, request.rows, on_reply)
        for memory in request.memories:
            if memory.device_id != model.entry.device_id:
                # It was loaded anew since the step before has written there.
                raise Moved(moved_text(model.name, memory.device_id))
        return _ModelCall(self._in_flight, self._memory, self._device_pools, model, request, options, on_reply)

    def skip_count(self) -> None:
        """Count one run less: another has taken its place."""
        self._runs_uncounted += 1

    def ended(self, rows: int, began_ns: int, reply: StepReply) -> None:
        if self._runs_uncounted:
            self._runs_uncounted -= 1
        elif self._model.counts is not None:
            self._model.counts.ensemble_ended(rows, began_ns, reply)


class _ModelCall:
    """A step's request to a model that is no ensemble."""

    def __init__(
        self,
        in_flight: InFlight,
        memory: Memory,
        device_pools: DevicePools,
        model: Opened,
        request: StepRequest,
        options: Options,
        on_reply: OnStepReply,
    ) -> None:
        self._in_flight = in_flight
        self._memory = memory
        self._device_pools = device_pools
        self._request = request
        self._options = options
        self._on_reply = on_reply
        self._pending = _StepParcel(model, request.rows, in_flight.next_token(), self)

    def start(self) -> None:
        pending, tensors = self._pending, self._request.inputs.values()
        reply = self._memory.loan_block(reply_bytes(pending.model, pending.rows))
        memories, targets = self._request.memories, _NO_TARGETS
        if self._request.device_outputs:
            memories, targets = device_targets(memories, self._take_device_blocks())
        describe(
            pending,
            self._request.places,
            reply,
            self._options,
            self._memory.view,
            memories=memories,
            targets=targets,
            may_wait=bool(targets),
        )
        pending.inputs = tuple(tensor.block.lease for tensor in tensors if isinstance(tensor.block, KeptBlock))
        pending.enqueue_ns = time.monotonic_ns()
        self._in_flight.submit_step(pending)

    def _take_device_blocks(self) -> dict[str, DeviceLease | None]:
        """Take room for outputs on the model's GPU, as long as there is any.

        Returns:
            The blocks; None for those outputs that ask for one when their size is known. Others come to the host.
        """
        pending, rooms = self._pending, dict[str, DeviceLease | None]()
        pending.take_room = functools.partial(self._device_pools.take, pending.model.entry.device_id)
        for name, byte_size in self._request.device_outputs.items():
            expected = byte_size or pending.model.output_sizes.expected(name, pending.rows)
            own = self._request.output_rooms.get(name)
            if isinstance(own, DeviceLease):
                lease: DeviceLease | None = own
            else:
                lease = pending.take_room(expected) if expected else None
            if lease is not None:
                pending.targets[name] = lease
            if lease is not None or not byte_size:
                rooms[name] = lease
        return rooms

    def cancel(self) -> None:
        self._in_flight.cancel_step(self._pending)

    def take(self) -> None:
        """Pass on what has come."""
        pending = self._pending
        is_done, error = pending.is_done, pending.error
        while pending.responses:
            reply, held = pending.responses.popleft()
            is_last = is_done and error is None and not pending.responses
            self._pass_on(self._read(reply, held, is_final=is_last))
            if is_last:
                return
        if is_done:
            ran, times = self._in_flight.reply_ran, self._times()
            self._pass_on(StepReply(error=error, ran=ran, has_response=error is not None, times=times))

    def _pass_on(self, reply: StepReply) -> None:
        if not self._pending.is_cancelled:
            self._on_reply(reply)

    def _read(self, reply: ReplyHead, held: tuple[BlockLease, ...], *, is_final: bool) -> StepReply:
        if reply.text or reply.code:
            return StepReply(error=from_wire(reply.code, reply.text), final=is_final)
        outputs: dict[str, Tensor] = {}
        for place in reply.outputs:
            lease = self._lease_of(place, held)
            if lease is None:
                return StepReply(error=Internal("the model's answer could not be read"))
            outputs[place.name] = _tensor_in(lease, place)
        for inline in reply.inline:
            outputs[inline.name] = Tensor(inline.datatype, inline.shape, len(inline.data), data=inline.data)
        times = self._times() if is_final else StepTimes()
        return StepReply(outputs, reply.parameters, final=is_final, times=times)

    def _lease_of(self, place: TensorPlace, held: tuple[BlockLease, ...]) -> BlockLease | None:
        """Return what an output lies in; None: the answer makes no sense."""
        if place.memory:
            return self._pending.device_lease(place, held)
        return next((lease for lease in held if lease.contains(place.offset, place.byte_size)), None)

    def _times(self) -> StepTimes:
        return StepTimes.since(self._pending.enqueue_ns, self._in_flight.reply_times())


class _StepParcel(PendingParcel):
    """A step's request in flight: its news go to the run of the ensemble instead of to somebody who waits."""

    __slots__ = ("_call",)

    def __init__(self, model: Opened, rows: int, token: int, call: _ModelCall) -> None:
        super().__init__(model, rows, token)
        #: None: it is over. They refer to each other.
        self._call: _ModelCall | None = call

    def wake(self) -> None:
        call = self._call
        if self.is_done:
            self._call = None
        if call is not None:
            call.take()
