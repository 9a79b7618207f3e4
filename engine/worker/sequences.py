"""Batches of sequence models: control tensors, implicit state, slots that have nothing to do (spec 6.3, 6.4).

The scheduler says which slot each request belongs to; everything that a sequence leaves behind lies here, by slot, and
goes with the process. A model that maps arrays to arrays gets rows for the controls and states beside its inputs. A
model that handles requests (Python) gets the controls as further inputs of each, and keeps its own state.

The direct strategy promises a model that a sequence always has the same row: slots without a request, up to the
highest with one, get a copy of another's data with READY false (S-064).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from forebay.engine.backends.base import Array, Arrays, RequestInstance, TensorInstance
from forebay.engine.repository.model_spec import ControlSpec, DirectStrategy, SequenceBatchingSpec, StateSpec
from forebay.engine.worker.model_data import TENSOR_BYTES_MAX, read_model_data
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.parcels import ParcelsRunner
from forebay.engine.worker.pending_response import RawTensor
from forebay.engine.worker.shape_tensors import ShapeTensors
from forebay.ipc.errors import BackendFailed, InvalidArgument, ServingError
from forebay.ipc.messages import ParameterValue
from forebay.ipc.tensor import DATATYPES, TensorSpec, byte_size, decode_bytes, element_count
from forebay.ipc.validation import id_prefix
from forebay.ipc.wire import HEADER, SLOT, SLOT_END, SLOT_START, Slot
from forebay.ipc.worker_messages import InstanceSpec

#: Backends that find controls and states by themselves, if they want them.
_REQUEST_BACKENDS = frozenset({"python", "identity"})


def sequence_policy(spec: InstanceSpec) -> SequenceBatchingSpec | None:
    """Return the model's sequence batching; None: it has none."""
    extra = spec.extra.get("sequence")
    return None if extra is None else msgspec.convert(extra, SequenceBatchingSpec)


def with_sequence_tensors(spec: InstanceSpec) -> InstanceSpec:
    """Return the specification with controls and states among the tensors, as array backends have to know them."""
    policy = sequence_policy(spec)
    if policy is None or spec.backend in _REQUEST_BACKENDS:
        return spec
    listed = {tensor.name for tensor in spec.outputs}
    controls = [TensorSpec(control.name, control.datatype, (1,)) for control in policy.controls]
    inputs = [TensorSpec(state.input_name, state.datatype, state.dims) for state in policy.states]
    outputs = [
        TensorSpec(state.output_name, state.datatype, state.dims)
        for state in policy.states
        if state.output_name not in listed
    ]
    return msgspec.structs.replace(spec, inputs=(*spec.inputs, *controls, *inputs), outputs=(*spec.outputs, *outputs))


class SequenceControls(NamedTuple):
    """What the control tensors say of one row."""

    is_start: bool
    is_end: bool
    is_ready: bool
    correlation_id: int | str
    request_id: str = ""


_NOT_READY = SequenceControls(is_start=False, is_end=False, is_ready=False, correlation_id=0)


class NullRequest(ParcelRequest):
    """Stands in a slot that has no request; whatever is answered goes nowhere."""

    def reply_raw(
        self,
        tensors: Sequence[RawTensor],
        parameters: Mapping[str, ParameterValue] | None = None,
        *,
        final: bool = True,
    ) -> None:
        self.is_final = self.is_final or final

    def finish(self) -> None:
        self.is_final = True

    def fail(self, error: ServingError, *, final: bool = True, by_model: bool = False) -> None:
        self.is_final = self.is_final or final

    def lend_array(self, datatype: str, shape: tuple[int, ...]) -> Array:
        return np.empty(shape, DATATYPES[datatype].numpy_dtype)


class SequencesRunner:
    """Runs SEQUENCES messages on either kind of instance."""

    def __init__(
        self,
        spec: InstanceSpec,
        policy: SequenceBatchingSpec,
        instance: TensorInstance | RequestInstance,
        parcels: ParcelsRunner,
    ) -> None:
        """Read initial states.

        Raises:
            ServingError: a file with an initial state cannot be used.
        """
        self._spec = spec
        self._policy = policy
        self._instance = instance
        self._parcels = parcels
        self._is_batching = spec.max_batch_size > 0
        self._shape_tensors = ShapeTensors(spec)
        self._fills_gaps = isinstance(policy.strategy, DirectStrategy) and self._is_batching
        self._initial = {state.input_name: initial_state(state, spec.model_path) for state in policy.states}
        #: By slot: state input name to value, ``dims``.
        self._states: dict[int, Arrays] = {}

    def execute(self, message: memoryview, start_ns: int) -> bytes:
        """Run one SEQUENCES message.

        Returns:
            The TIMES of the batch, packed, for the scheduler.
        """
        _kind, _flags, count, _sender, _batch = HEADER.unpack_from(message)
        end = HEADER.size + count * SLOT.size
        if len(message) < end:
            raise struct.error("message is shorter than its slots")
        slots = [Slot._make(SLOT.unpack_from(message, HEADER.size + index * SLOT.size)) for index in range(count)]
        requests, places = self._parcels.unpack(message, start_ns, end)
        batch = [(slots[place], request) for place, request in zip(places, requests, strict=True)]
        return self._parcels.run_batch(requests, start_ns, lambda stamps: self._run(batch, stamps))

    def _run(self, batch: list[tuple[Slot, ParcelRequest]], stamps: list[int]) -> None:
        for slot, request in batch:
            if slot.assigned_id or slot.flags & SLOT_START:
                # An iterative sequence has its id and flags from the scheduler.
                request.head = msgspec.structs.replace(
                    request.head,
                    correlation_id=slot.assigned_id or request.head.correlation_id,
                    sequence_start=bool(slot.flags & SLOT_START),
                )
            if slot.flags & SLOT_START or slot.slot not in self._states:
                self._states[slot.slot] = dict(self._initial)
        batch.sort(key=lambda entry: entry[0].slot)
        if isinstance(self._instance, RequestInstance):
            self._run_requests(self._instance, batch, stamps)
        else:
            self._run_tensors(self._instance, batch, stamps)

    # --- models that handle requests ---

    def _run_requests(
        self, instance: RequestInstance, batch: list[tuple[Slot, ParcelRequest]], stamps: list[int]
    ) -> None:
        usable: list[tuple[Slot, ParcelRequest]] = []
        for slot, request in batch:
            try:
                request.control_inputs = self._control_inputs(_controls_of(slot, request))
            except ServingError as error:
                request.fail(error)
            else:
                usable.append((slot, request))
        if usable:
            self._parcels.run_requests(instance, self._with_null_requests(usable), stamps)

    def _with_null_requests(self, batch: list[tuple[Slot, ParcelRequest]]) -> list[ParcelRequest]:
        if not self._fills_gaps:
            return [request for _slot, request in batch]
        by_slot = {slot.slot: request for slot, request in batch}
        first = batch[0][1]
        requests: list[ParcelRequest] = []
        for slot in range(max(by_slot) + 1):
            request = by_slot.get(slot)
            if request is None:
                request = first.copy_as(NullRequest)
                request.control_inputs = self._control_inputs(_NOT_READY)
            requests.append(request)
        return requests

    def _control_inputs(self, controls: SequenceControls) -> dict[str, tuple[str, Array]]:
        return {
            control.name: (control.datatype, self._as_row(control_value(control, controls)))
            for control in self._policy.controls
        }

    def _as_row(self, value: Array) -> Array:
        return value[np.newaxis] if self._is_batching else value

    # --- models that map arrays ---

    def _run_tensors(
        self, instance: TensorInstance, batch: list[tuple[Slot, ParcelRequest]], stamps: list[int]
    ) -> None:
        rows: list[tuple[Slot, ParcelRequest, Arrays]] = []
        for slot, request in batch:
            try:
                rows.append((slot, request, self._row(slot, request)))
            except ServingError as error:
                request.fail(error)
        for group in self._groups(rows):
            try:
                self._run_group(instance, group, stamps)
            except ServingError as error:
                for _slot, request, _arrays in group:
                    request.fail(error)

    def _row(self, slot: Slot, request: ParcelRequest) -> Arrays:
        """Return the arrays of one request with its controls and states, ``[1, *dims]`` if the model batches."""
        arrays = request.input_arrays()
        controls = _controls_of(slot, request)
        arrays.update(
            (control.name, self._as_row(control_value(control, controls))) for control in self._policy.controls
        )
        arrays.update((name, self._as_row(value)) for name, value in self._states[slot.slot].items())
        return arrays

    def _groups(self, rows: list[tuple[Slot, ParcelRequest, Arrays]]) -> list[list[tuple[Slot, ParcelRequest, Arrays]]]:
        """Divide the batch where states, optional inputs or shape tensors differ; usually one group."""
        groups: dict[object, list[tuple[Slot, ParcelRequest, Arrays]]] = {}
        for entry in rows:
            shapes = tuple(sorted((name, array.shape) for name, array in entry[2].items()))
            key = (shapes, self._shape_tensors.values(entry[2])) if self._is_batching else entry[0].slot
            groups.setdefault(key, []).append(entry)
        return list(groups.values())

    def _run_group(
        self, instance: TensorInstance, group: list[tuple[Slot, ParcelRequest, Arrays]], stamps: list[int]
    ) -> None:
        arrays, row_of = self._join(group)
        requests = [request for _slot, request, _arrays in group]
        wanted = self._parcels.promised.wanted(requests)
        state_outputs = [state.output_name for state in self._policy.states]
        stamps[1] = time.monotonic_ns()
        results = instance.run(arrays, tuple(dict.fromkeys((*wanted, *state_outputs))))
        stamps[2] = time.monotonic_ns()
        total = max(row_of.values()) + 1
        checked = {name: self._parcels.promised.checked(name, results, total) for name in wanted}
        self._keep_states(group, row_of, results)
        for slot, request, _arrays in group:
            request.times = (stamps[0], stamps[1], stamps[2], stamps[2])
            row = row_of[slot.slot]
            own = slice(row, row + 1)
            request.reply(
                {
                    name: (checked[name][0], checked[name][1][own] if self._is_batching else checked[name][1])
                    for name in request.requested_outputs
                }
            )

    def _join(self, group: list[tuple[Slot, ParcelRequest, Arrays]]) -> tuple[Arrays, dict[int, int]]:
        """Return the arrays of the batch, and slot to row."""
        if not self._is_batching:
            ((slot, _request, arrays),) = group
            return arrays, {slot.slot: 0}
        if not self._fills_gaps:
            row_of = {slot.slot: row for row, (slot, _request, _arrays) in enumerate(group)}
            rows = [arrays for _slot, _request, arrays in group]
        else:
            by_slot = {slot.slot: arrays for slot, _request, arrays in group}
            row_of = {slot: slot for slot in by_slot}
            filler = {**group[0][2], **{name: array for name, (_, array) in self._control_inputs(_NOT_READY).items()}}
            rows = [by_slot.get(slot, filler) for slot in range(max(by_slot) + 1)]
        return self._shape_tensors.joined(rows, len(rows)), row_of

    def _keep_states(
        self, group: list[tuple[Slot, ParcelRequest, Arrays]], row_of: Mapping[int, int], results: Mapping[str, Array]
    ) -> None:
        for state in self._policy.states:
            values = results.get(state.output_name)
            if values is None:
                raise BackendFailed(f"model '{self._spec.model}' did not produce state output '{state.output_name}'")
            for slot, _request, _arrays in group:
                value = values[row_of[slot.slot]] if self._is_batching else values
                self._check_state(state, value)
                self._states[slot.slot][state.input_name] = value.copy()
        for slot, _request, _arrays in group:
            if slot.flags & SLOT_END:
                del self._states[slot.slot]

    def _check_state(self, state: StateSpec, value: Array) -> None:
        matches = len(value.shape) == len(state.dims) and all(
            want in (-1, have) for want, have in zip(state.dims, value.shape, strict=True)
        )
        if not matches or (state.datatype != "BYTES" and value.dtype != DATATYPES[state.datatype].numpy_dtype):
            raise BackendFailed(
                f"model '{self._spec.model}' produced state output '{state.output_name}' as {value.dtype} "
                f"{list(value.shape)}, but its configuration promises {state.datatype} {list(state.dims)}"
            )


def _controls_of(slot: Slot, request: ParcelRequest) -> SequenceControls:
    return SequenceControls(
        bool(slot.flags & SLOT_START), bool(slot.flags & SLOT_END), True, request.head.correlation_id, request.head.id
    )


def control_value(control: ControlSpec, controls: SequenceControls) -> Array:
    """Return one control tensor's value, shape ``[1]`` (spec S-061, S-062).

    Raises:
        InvalidArgument: the model wants a number and the sequence has a string (spec S-059).
    """
    dtype = DATATYPES[control.datatype].numpy_dtype
    if control.kind == "CORRID":
        return _correlation_value(control, controls, dtype)
    is_true = {"START": controls.is_start, "END": controls.is_end, "READY": controls.is_ready}[control.kind]
    return np.array([control.true_value if is_true else control.false_value]).astype(dtype)


def _correlation_value(control: ControlSpec, controls: SequenceControls, dtype: np.dtype[np.generic]) -> Array:
    correlation_id = controls.correlation_id
    if control.datatype == "BYTES":
        return np.array([str(correlation_id or "").encode()], dtype=np.object_)
    if isinstance(correlation_id, str):
        raise InvalidArgument(f"{id_prefix(controls.request_id)}correlation ID in request is not an unsigned int")
    return np.array([correlation_id & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64).astype(dtype)


def initial_state(state: StateSpec, model_path: str) -> Array:
    """Return the value that a sequence starts with, ``dims`` with 1 for sizes that vary (spec S-081).

    Raises:
        Internal: its file is not there.
        InvalidArgument: that has not the bytes of the state's shape, or lies elsewhere, or the state is too large.
    """
    dims = state.initial_dims if state.initial_dims is not None else tuple(max(dim, 1) for dim in state.dims)
    expected = byte_size(state.datatype, dims)
    if max(expected, element_count(dims)) > TENSOR_BYTES_MAX:
        raise InvalidArgument(f"state '{state.input_name}' of shape {list(dims)} is too large")
    if not state.initial_file:
        if state.datatype == "BYTES":
            empty = np.empty(dims, dtype=np.object_)
            empty.fill(b"")
            return empty
        return np.zeros(dims, DATATYPES[state.datatype].numpy_dtype)
    data = read_model_data(model_path, "initial_state", state.initial_file)
    if state.datatype == "BYTES":
        return decode_bytes(memoryview(data), dims)
    if len(data) != expected:
        raise InvalidArgument(
            f"initial state '{state.initial_file}' of '{state.input_name}' has {len(data)} bytes, expected {expected}"
        )
    return np.frombuffer(data, DATATYPES[state.datatype].numpy_dtype).reshape(dims)
