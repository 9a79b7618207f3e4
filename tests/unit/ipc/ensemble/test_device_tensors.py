"""Which tensors of an ensemble may be in the memory of a GPU, by who reads them (issue 8, 4)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from forebay.ipc.catalog import EnsembleStep, ModelEntry
from forebay.ipc.ensemble.device_rooms import bytes_without_room, device_targets, lent_rooms
from forebay.ipc.ensemble.device_tensors import device_inputs, device_of_input, device_outputs, devices_of_output
from forebay.ipc.ensemble.graph import EnsembleGraph, NeededStep
from forebay.ipc.messages import DeviceMemory, TensorPlace
from forebay.ipc.tensor import TensorSpec

MEMORY = DeviceMemory(owner=1, number=5, device_id=0, byte_size=1024, handle=b"h")


class Room:
    """Bytes of that memory."""

    memory = MEMORY

    def __init__(self, offset: int, byte_size: int) -> None:
        self.offset = offset
        self.byte_size = byte_size


#: Two models read ``x``, and each has an output; another reads what the first made, and so does the client.
STEPS = (
    EnsembleStep("a", -1, {"X": "x"}, {"Y": "t"}),
    EnsembleStep("b", -1, {"X": "x", "Z": "only_b"}, {"Y": "u"}),
    EnsembleStep("c", -1, {"X": "t"}, {"Y": "v"}),
)
OUTPUTS = ("t", "u", "v")


def graph() -> EnsembleGraph:
    outputs = tuple(TensorSpec(name, "FP32", (4,)) for name in OUTPUTS)
    return EnsembleGraph(ModelEntry("ens", 1, "READY", outputs=outputs, steps=STEPS, is_ensemble=True))


def places(**models: int) -> Mapping[str, int]:
    """GPU by model, those that are not named are on the first."""
    return {"a": 0, "b": 0, "c": 0, **models}


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (places(), {"x": 0, "only_b": 0}),
        (places(b=1), {"only_b": 1}),
        (places(b=-1), {}),
        (places(c=-1), {"x": 0, "only_b": 0}),
    ],
    ids=["one GPU", "two GPUs", "host", "who reads others"],
)
def test_inputs_may_be_where_all_read_them(models: Mapping[str, int], found: Mapping[str, int]) -> None:
    def device_of(reader: NeededStep, _name: str) -> int:
        return models[reader.step.model]

    assert device_inputs(graph().plan(()), ("x", "only_b", "nobody's"), device_of) == found


@pytest.mark.parametrize(
    ("requested", "models", "clients", "found"),
    [
        (("v",), places(), {}, {"t": {0}, "v": set()}),
        (("v",), places(c=-1), {}, {"t": set(), "v": set()}),
        (("t", "v"), places(), {}, {"t": set(), "v": set()}),
        (("t", "v"), places(), {"t": (0, 1), "v": (1,)}, {"t": {0}, "v": {1}}),
        (("t", "v"), places(c=1), {"t": (0,), "v": ()}, {"t": set(), "v": set()}),
    ],
    ids=["steps only", "host", "client", "client and steps on a GPU", "client and steps on different GPUs"],
)
def test_outputs_may_be_where_everybody_takes_them(
    requested: tuple[str, ...],
    models: Mapping[str, int],
    clients: Mapping[str, tuple[int, ...]],
    found: Mapping[str, set[int]],
) -> None:
    plan = graph().plan(requested)

    def device_of(reader: NeededStep, _name: str) -> int:
        return models[reader.step.model]

    assert {name: set(devices_of_output(plan, name, device_of, clients)) for name in found} == found


def test_what_is_read_on_the_host_is_not_taken_on_a_gpu() -> None:
    inputs = (TensorSpec("X", "FP32", (4,)), TensorSpec("S", "INT32", (4,), is_shape_tensor=True))
    entry = ModelEntry("a", 1, "READY", inputs=inputs, device_id=1)
    assert [device_of_input(entry, name) for name in ("X", "S", "other")] == [1, -1, -1]
    cached = ModelEntry("a", 1, "READY", inputs=inputs, device_id=1, response_cache=True)
    assert device_of_input(cached, "X") == -1


def test_outputs_stay_with_their_bytes_or_none_if_these_vary() -> None:
    outputs = tuple(
        TensorSpec(name, datatype, dims)
        for name, datatype, dims in (
            ("A", "FP32", (4,)),
            ("B", "FP32", (-1,)),
            ("C", "BYTES", (1,)),
            ("D", "FP32", (4,)),
        )
    )
    step = EnsembleStep("a", -1, {}, {name: name.lower() for name in "ABCD"})
    needed = NeededStep(0, step, tuple("ABCD"))

    def devices_of(tensor: str) -> tuple[int, ...]:
        return (1,) if tensor == "d" else (0, 1)

    entry = ModelEntry("a", 1, "READY", outputs=outputs, device_id=0, max_batch_size=8)
    assert device_outputs(needed, entry, 3, devices_of) == {"A": 48, "B": 0}


def test_rooms_are_named_by_memory_and_what_has_none_counts_for_the_block() -> None:
    memories, targets = device_targets((), {"A": Room(256, 12), "B": None})
    assert (memories, targets) == (
        (MEMORY,),
        (TensorPlace("A", "", (), 256, 12, memory=1), TensorPlace("B", "", (), 0, 0)),
    )
    rooms = lent_rooms({"A": Room(0, 8)})
    assert (rooms.memories, rooms.targets) == ((MEMORY,), (TensorPlace("A", "", (), 0, 8, memory=1),))
    assert bytes_without_room({"A": 8, "B": 65}, {"A": Room(0, 8)}) == 128
