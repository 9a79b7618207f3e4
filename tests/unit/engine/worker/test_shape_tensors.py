"""Shape tensors of models that batch, from the request to the model (spec D-018, S-011)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from forebay.engine.backends.base import Array, Arrays, TensorInstance
from forebay.engine.backends.device_instance import DeviceInstance, PlacedTensor
from forebay.engine.devices.device_array import DeviceArray
from forebay.engine.devices.host_device import HostDevice
from forebay.engine.repository.model_spec import SequenceBatchingSpec, WarmupInputSpec, WarmupSpec
from forebay.engine.worker.device_parcels import DeviceParcels
from forebay.engine.worker.head_check import check_head
from forebay.engine.worker.places import backend_shape
from forebay.engine.worker.promised_outputs import PromisedOutputs
from forebay.engine.worker.ragged import RaggedPolicy, RaggedRequest
from forebay.engine.worker.sequences import SequencesRunner
from forebay.engine.worker.shape_tensors import ShapeTensors
from forebay.engine.worker.warmup import warm_up
from forebay.ipc.arena import Arena, create_memory_file
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.messages import ParcelHead, TensorPlace
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.wire import HEADER, SLOT, SLOT_END, SLOT_START, Kind
from forebay.ipc.worker_messages import InstanceSpec

X = TensorSpec("x", "FP32", (-1,))
SIZE = TensorSpec("size", "INT32", (2,), is_shape_tensor=True)
SPEC = InstanceSpec(
    model="m", version=1, route=1, instance=1, instance_name="m_0", backend="tensorrt", model_path="", version_path="",
    model_file="", max_batch_size=8, inputs=(X, SIZE), outputs=(TensorSpec("y", "FP32", (-1,)),),
)  # fmt: skip


def tensors(rows: int, *size: int) -> Arrays:
    return {"x": np.full((rows, 3), rows, np.float32), "size": np.array(size, np.int32)}


def test_values_are_taken_once_with_the_batch_size_in_front() -> None:
    joined = ShapeTensors(SPEC).joined([tensors(1, 4, 6), tensors(2, 4, 6)], 3)
    assert joined["size"].tolist() == [3, 4, 6]
    assert joined["size"].dtype == np.int32
    assert joined["x"].tolist() == [[1] * 3, [2] * 3, [2] * 3]


def test_single_request_gets_its_own_batch_size() -> None:
    assert ShapeTensors(SPEC).joined([tensors(2, 4, 6)], 2)["size"].tolist() == [2, 4, 6]


def test_model_that_does_not_batch_gets_the_values_alone() -> None:
    shapes = ShapeTensors(msgspec.structs.replace(SPEC, max_batch_size=0))
    assert shapes.joined([tensors(1, 4, 6)], 1)["size"].tolist() == [4, 6]


def test_only_requests_of_equal_values_agree() -> None:
    shapes = ShapeTensors(SPEC)
    assert shapes.agree([tensors(1, 4, 6), tensors(2, 4, 6)])
    assert not shapes.agree([tensors(1, 4, 6), tensors(1, 6, 4)])
    assert not shapes.agree([tensors(1, 4, 6), {"x": np.zeros((1, 3), np.float32)}])


def test_ragged_neighbours_do_not_make_shape_tensors_ragged() -> None:
    """Spec S-011, S-140."""
    spec = msgspec.structs.replace(SPEC, inputs=(msgspec.structs.replace(X, allow_ragged_batch=True), SIZE))
    policy = RaggedPolicy(spec)
    requests = [RaggedRequest(rows, tensors(rows, 4, 6), {}) for rows in (1, 2)]
    assert policy.can_join(requests)
    joined = policy.join(requests)
    assert joined["size"].tolist() == [3, 4, 6]
    assert joined["x"].shape == (9,)
    assert not policy.can_join([*requests, RaggedRequest(1, tensors(1, 9, 6), {})])


def test_client_gives_a_shape_tensor_without_a_batch_dimension() -> None:
    arena = Arena(create_memory_file("test", 4096), 4096)
    x = TensorPlace("x", "FP32", (2, 3), 64, 24)
    inputs = {spec.name: spec for spec in SPEC.inputs}

    def check(*shape: int) -> None:
        size = TensorPlace("size", "INT32", shape, 128, 4 * int(np.prod(shape)))
        head = ParcelHead(inputs=(x, size), reply_offset=0, reply_bytes=0)
        check_head(head, 2, inputs, arena, model="m", max_batch_size=8)

    check(2)
    for wrong in ((2, 2), (1, 2), (3,)):
        with pytest.raises(InvalidArgument, match=r"unexpected shape for input 'size' for model 'm'. Expected \[-1, 2"):
            check(*wrong)
    arena.close()


def test_shape_tensor_is_not_reshaped() -> None:
    assert backend_shape(msgspec.structs.replace(SIZE, reshape=(1, 2)), (2,), 8) == (2,)


class Recorder(TensorInstance):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.calls: list[dict[str, list[Any]]] = []

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        self.calls.append({name: array.tolist() for name, array in inputs.items()})
        return {"y": np.asarray(inputs["x"])}


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 0, 0]), (3, [3, 0, 0])])
def test_warm_up_samples_are_joined_like_requests(count: int, expected: list[int]) -> None:
    """Spec C-110."""
    inputs = (
        WarmupInputSpec(name="x", datatype="FP32", dims=(2,), source="zero"),
        WarmupInputSpec(name="size", datatype="INT32", dims=(2,), source="zero"),
    )
    sample = WarmupSpec(name="s", batch_size=count, count=1, inputs=inputs)
    instance = Recorder()
    warm_up(msgspec.structs.replace(SPEC, warmup=(msgspec.to_builtins(sample),)), instance)
    assert instance.calls == [{"x": [[0, 0]] * count, "size": expected}]


def test_requests_of_different_values_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec S-011; the scheduler keeps them apart, but believes what a client says."""
    sample = WarmupSpec(
        name="s", batch_size=2, count=1,
        inputs=(
            WarmupInputSpec(name="x", datatype="FP32", dims=(2,), source="zero"),
            WarmupInputSpec(name="size", datatype="INT32", dims=(2,), source="zero"),
        ),
    )  # fmt: skip
    monkeypatch.setattr(ShapeTensors, "agree", lambda _self, _separate: False)
    instance = Recorder()
    warm_up(msgspec.structs.replace(SPEC, warmup=(msgspec.to_builtins(sample),)), instance)
    assert [call["size"] for call in instance.calls] == [[1, 0, 0]] * 2


@pytest.mark.parametrize(("second", "expected"), [((4, 6), [[2, 4, 6]]), ((6, 4), [[1, 4, 6], [2, 6, 4]])])
def test_sequences_share_an_execution_only_if_their_values_are_equal(
    second: tuple[int, int], expected: list[list[int]]
) -> None:
    """Spec S-011; the slot below the second is filled up."""

    def request(size: tuple[int, int]) -> Any:
        head = ParcelHead(inputs=(), reply_offset=0, reply_bytes=0)
        return SimpleNamespace(
            head=head, input_arrays=lambda: tensors(1, *size), requested_outputs=("y",), reply=lambda _outputs: None
        )

    requests = [request((4, 6)), request(second)]
    parcels: Any = SimpleNamespace(
        unpack=lambda _message, _start_ns, _offset: (requests, [0, 1]),
        run_batch=lambda _requests, _start_ns, run: run([0, 0, 0, 0]),
        promised=PromisedOutputs(SPEC),
    )
    instance = Recorder()
    slots = b"".join(SLOT.pack(slot, SLOT_START | SLOT_END, 0) for slot in range(2))
    message = HEADER.pack(Kind.SEQUENCES, 0, 2, 0, 0) + slots
    SequencesRunner(SPEC, SequenceBatchingSpec(), instance, parcels).execute(memoryview(message), 0)
    assert [call["size"] for call in instance.calls] == expected


class DeviceRecorder(DeviceInstance):
    """As :class:`Recorder`, on a device."""

    def __init__(self, device: HostDevice) -> None:
        super().__init__(SPEC, device, device.make_stream())
        self.calls: list[list[PlacedTensor]] = []

    def compute(self, batch: Sequence[Mapping[str, PlacedTensor]], outputs: Sequence[str]) -> dict[str, DeviceArray]:
        self.calls.append([tensors["size"] for tensors in batch])
        rows = sum(tensors["x"].shape[0] for tensors in batch)
        return {"y": DeviceArray(0, (rows, 0), np.dtype(np.float32))}


def request_on_device(rows: int, size: Array) -> Any:
    """A request whose shape tensor lies on the device."""
    x = np.zeros((rows, 3), np.float32)
    answers: list[Any] = []
    return SimpleNamespace(
        rows=rows,
        head=SimpleNamespace(inputs=(TensorPlace("x", "FP32", x.shape, 0, x.nbytes),
                                     TensorPlace("size", "INT32", size.shape, 0, size.nbytes, memory=1))),
        requested_outputs=("y",),
        input_array=lambda _place: x,
        input_on_device=lambda _place: DeviceArray(size.ctypes.data, size.shape, size.dtype, size),
        target=lambda _name, _size: None,
        awaits_room=lambda _name, _size: False,
        lend_array=lambda _datatype, shape: np.zeros(shape, np.float32),
        reply=answers.append,
        answers=answers,
    )  # fmt: skip


@pytest.mark.parametrize(("second", "expected"), [((4, 6), [[[3, 4, 6]] * 2]), ((6, 4), [[[1, 4, 6]], [[2, 6, 4]]])])
def test_shape_tensors_on_the_device_are_read_on_the_host(second: tuple[int, int], expected: list[Any]) -> None:
    instance = DeviceRecorder(HostDevice())
    sizes = [np.array(size, np.int32) for size in ((4, 6), second)]
    requests = [request_on_device(rows, size) for rows, size in zip((1, 2), sizes, strict=True)]
    DeviceParcels(SPEC, instance, PromisedOutputs(SPEC)).run(requests, [0, 0, 0, 0])
    assert [[np.asarray(size).tolist() for size in call] for call in instance.calls] == expected
    assert [request.answers[0]["y"][1].shape for request in requests] == [(1, 0), (2, 0)]
    instance.stream.close()
