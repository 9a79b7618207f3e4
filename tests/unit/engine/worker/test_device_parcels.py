"""Requests whose tensors lie in device memory of another process: one suite, for the host as a GPU and for CUDA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from device_models import add_doubler
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.devices.base import Device, Memory, Stream
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE, open_device
from forebay.engine.repository.config import config_json, parse_config_text
from forebay.ipc.errors import Internal, InvalidArgument, ServingError
from forebay.ipc.messages import DeviceMemory, Rooms, TensorPlace
from forebay.ipc.worker_messages import (
    CheckMemory,
    Loaded,
    MakeMemory,
    MemoryChecked,
    MemoryClosed,
    MemoryDown,
    MemoryMade,
)

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]

ROW = np.arange(3, dtype=np.float32)


class Client:
    """A process with memory on the device: this one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.device: Device = open_device(kind)
        self.stream: Stream = self.device.make_stream()
        self.memory: Memory = self.device.allocate(4096)
        self.exported = DeviceMemory(0, 1, 0, 4096, self.device.export_memory(self.memory))

    @property
    def environment(self) -> dict[str, str]:
        """For the worker, which is to take this for a GPU."""
        return {PLAYED_GPUS_VARIABLE: "1"} if self.kind == "host" else {}

    def put(self, offset: int, array: np.ndarray[Any, Any]) -> None:
        self.stream.copy_in(self.memory.address + offset, array.ctypes.data, array.nbytes)
        self.stream.synchronize()

    def get(self, offset: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        array = np.empty(shape, np.float32)
        self.stream.copy_out(array.ctypes.data, self.memory.address + offset, array.nbytes)
        self.stream.synchronize()
        return array

    def close(self) -> None:
        self.memory.close()
        self.stream.close()


@pytest.fixture(params=KINDS, scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    if request.param == "cuda":
        pytest.importorskip("cupy")
    made = Client(request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def worker(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerHarness]:
    """Y = 2 * X on the device; -1 columns."""
    root: Path = tmp_path_factory.mktemp("models")
    add_doubler(root, "double", "KIND_GPU", dim=-1)
    config = json.loads(config_json(parse_config_text((root / "double" / "config.pbtxt").read_text())))
    spec = spec_from_config(config, model="double", model_path=str(root / "double"), kind="GPU")
    with WorkerHarness(spec, env=client.environment, load=False) as running:
        assert isinstance(loaded := running.load(), Loaded)
        assert loaded.device_id == 0
        yield running


def on_device(offset: int, rows: int, *, name: str = "X", columns: int = 3, memory: int = 1) -> TensorPlace:
    return TensorPlace(name, "FP32", (rows, columns), offset, rows * columns * 4, memory=memory)


def room(offset: int, byte_size: int) -> TensorPlace:
    return TensorPlace("Y", "", (), offset, byte_size, memory=1)


def test_input_and_output_stay_on_the_device(client: Client, worker: WorkerHarness) -> None:
    client.put(256, np.tile(ROW, (2, 1)))
    [response] = worker.infer({"X": on_device(256, 2)}, memories=(client.exported,), targets=(room(1024, 24),))
    assert response.error is None
    assert (response.outputs, response.datatypes) == ({}, {"Y": "FP32 on the device"})
    np.testing.assert_array_equal(client.get(1024, (2, 3)), np.tile(2 * ROW, (2, 1)))


def test_one_side_on_the_device_and_one_on_the_host(client: Client, worker: WorkerHarness) -> None:
    client.put(0, ROW[np.newaxis])
    [response] = worker.infer({"X": on_device(0, 1)}, memories=(client.exported,))
    np.testing.assert_array_equal(response.outputs["Y"], [2 * ROW])
    assert response.in_place
    [response] = worker.infer(
        {"X": np.full((1, 3), 7, np.float32)}, memories=(client.exported,), targets=(room(0, 12),)
    )
    assert response.error is None
    np.testing.assert_array_equal(client.get(0, (1, 3)), np.full((1, 3), 14))


def test_an_output_that_does_not_fit_comes_to_the_host_if_it_may(client: Client, worker: WorkerHarness) -> None:
    client.put(0, ROW[np.newaxis])
    for size, places in ((11, {}), (12, {"Y": "FP32 on the device"})):
        [response] = worker.infer(
            {"X": on_device(0, 1)}, memories=(client.exported,), targets=(room(64, size),), may_spill=True
        )
        assert response.error is None
        assert bool(response.outputs) != bool(places)
    np.testing.assert_array_equal(client.get(64, (1, 3)), [2 * ROW])


def ask(client: Client, worker: WorkerHarness, *, reply_bytes: int = 4096) -> int:
    """Submit a request whose output has no room on the device yet; return its token when the worker asks for some."""
    client.put(0, ROW[np.newaxis])
    nowhere = TensorPlace("Y", "", (), 0, 0)
    head = {"memories": (client.exported,), "targets": (nowhere,), "may_wait": True, "reply_bytes": reply_bytes}
    [token] = worker.submit({"X": on_device(0, 1)}, **head)
    asked = worker.next_response(lend=False)
    assert (asked.token, asked.final, asked.needs_rooms) == (token, False, {"Y": 12})
    return token


def block(worker: WorkerHarness, byte_size: int = 64) -> tuple[int, int]:
    return worker.blocks.allocate(byte_size), byte_size


def test_an_output_of_unknown_size_waits_on_the_device_until_it_has_room(client: Client, worker: WorkerHarness) -> None:
    """Issue 8, 4: what only the model knows the size of; the model runs others meanwhile."""
    token = ask(client, worker)
    [other] = worker.infer({"X": np.full((1, 3), 7, np.float32)})
    np.testing.assert_array_equal(other.outputs["Y"], np.full((1, 3), 14))
    # Too small: it asks again. Then the room.
    worker.collect(token, *block(worker, 1), Rooms((client.exported,), (room(512, 11),)))
    assert worker.next_response(lend=False).needs_rooms == {"Y": 12}
    worker.collect(token, *block(worker, 1), Rooms((client.exported,), (room(512, 12),)))
    answer = worker.next_response()
    assert (answer.final, answer.error, answer.datatypes) == (True, None, {"Y": "FP32 on the device"})
    np.testing.assert_array_equal(client.get(512, (1, 3)), [2 * ROW])


@pytest.mark.parametrize("rooms", [None, Rooms()], ids=["no rooms", "empty"])
def test_an_output_that_gets_no_room_comes_to_the_host(
    client: Client, worker: WorkerHarness, rooms: Rooms | None
) -> None:
    token = ask(client, worker, reply_bytes=0)
    worker.collect(token, *block(worker, 1), rooms)
    assert worker.next_response(lend=False).needs_rooms == {"Y": 12}
    worker.collect(token, *block(worker), rooms)
    answer = worker.next_response()
    assert answer.final
    np.testing.assert_array_equal(answer.outputs["Y"], [2 * ROW])


def test_room_that_cannot_be_used_fails_the_request(client: Client, worker: WorkerHarness) -> None:
    for memories, target, text in (
        ((), room(0, 12), "device memory that the request does not name"),
        ((client.exported,), room(4090, 12), "lies outside of its device memory"),
    ):
        token = ask(client, worker)
        worker.collect(token, *block(worker), Rooms(memories, (target,)))
        answer = worker.next_response()
        assert answer.final
        assert answer.error is not None
        assert text in answer.error.text


def test_who_leaves_while_an_output_waits_gets_the_last_word(client: Client, worker: WorkerHarness) -> None:
    token = ask(client, worker)
    worker.cancel(token)
    answer = worker.next_response()
    assert answer.final
    assert answer.error is not None
    worker.collect(token, *block(worker), Rooms((client.exported,), (room(0, 12),)))
    worker.collect(ask(client, worker), 0, 0)
    assert "no room" in str(worker.next_response().error)


def test_what_cannot_be_read_ends_the_request_and_not_the_worker(client: Client, worker: WorkerHarness) -> None:
    token = ask(client, worker)
    worker.collect(token, *block(worker), cast("Rooms", ["nonsense"]))
    worker.collect(token, *block(worker), Rooms((client.exported,), (room(0, 12),)))
    [response] = worker.infer({"X": on_device(0, 1)}, memories=(client.exported,))
    assert response.error is None


def test_an_empty_output_needs_no_room(client: Client, worker: WorkerHarness) -> None:
    [response] = worker.infer(
        {"X": np.zeros((1, 0), np.float32)}, targets=(TensorPlace("Y", "", (), 0, 0),), may_wait=True
    )
    assert response.outputs["Y"].shape == (1, 0)


def test_requests_are_joined_on_the_device(client: Client, worker: WorkerHarness) -> None:
    client.put(0, np.stack([ROW, ROW + 1, ROW + 2]))
    requests = [{"X": on_device(0, 1)}, {"X": ROW[np.newaxis] + 10}, {"X": on_device(12, 2)}]
    worker.submit(*requests, memories=(client.exported,))
    answers = {response.token: response.outputs["Y"] for response in worker.responses(*range_of(worker, 3))}
    worker.wait_done()
    first, second, third = (answers[token] for token in sorted(answers))
    np.testing.assert_array_equal(first, [2 * ROW])
    np.testing.assert_array_equal(second, [2 * (ROW + 10)])
    np.testing.assert_array_equal(third, [2 * (ROW + 1), 2 * (ROW + 2)])


def range_of(worker: WorkerHarness, count: int) -> list[int]:
    return sorted(worker._heads)[-count:]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"place": on_device(4092, 1)}, InvalidArgument, "12 bytes at 4092 lies outside of its device memory"),
        ({"place": on_device(0, 1, memory=2)}, Internal, "device memory that the request does not name"),
        ({"number": 2, "device_id": 1}, InvalidArgument, "a tensor lies on device 1, the model on 0"),
        ({"number": 3, "byte_size": 1 << 40}, ServingError, "."),
        ({"number": 4, "handle": bytes(64)}, ServingError, "."),
        ({"number": 5, "handle": b"short"}, ServingError, "64 bytes, not 5"),
        ({"targets": (room(0, 8),)}, Internal, r"output 'Y' \(8 bytes\) should be at least 12 bytes to hold"),
    ],
)
def test_what_cannot_be_used_fails_its_request_only(
    client: Client, worker: WorkerHarness, change: dict[str, Any], error: type[ServingError], text: str
) -> None:
    place = change.pop("place", on_device(0, 1))
    targets = change.pop("targets", ())
    fields = {name: getattr(client.exported, name) for name in client.exported.__struct_fields__}
    memory = DeviceMemory(**{**fields, **change})
    [response] = worker.infer({"X": place}, memories=(memory,), targets=targets)
    with pytest.raises(error, match=text):
        raise response.error or AssertionError("answered")
    [response] = worker.infer({"X": on_device(0, 1)}, memories=(client.exported,))
    assert response.error is None


def test_a_memory_that_is_taken_away_is_closed_and_not_opened_again(client: Client, worker: WorkerHarness) -> None:
    memory = DeviceMemory(0, 77, 0, 4096, client.exported.handle)
    worker.tell(CheckMemory(memory=memory))
    assert worker._answer() == MemoryChecked()
    worker.tell(MemoryDown(owner=0, number=77))
    assert worker._answer() == MemoryClosed(owner=0, number=77)
    [response] = worker.infer({"X": on_device(0, 1)}, memories=(memory,))
    assert response.error is not None
    assert "taken away" in response.error.text
    worker.tell(CheckMemory(memory=DeviceMemory(0, 78, 0, 4096, bytes(64))))
    answer = worker._answer()
    assert isinstance(answer, MemoryChecked)
    assert answer.text


def test_memory_that_a_worker_makes_is_open_to_others_until_it_is_taken_away(
    client: Client, worker: WorkerHarness
) -> None:
    worker.tell(MakeMemory(owner=9, number=1, byte_size=4096))
    made = worker._answer()
    assert isinstance(made, MemoryMade)
    with client.device.open_memory(made.handle, 4096) as opened:
        assert opened.byte_size == 4096
    worker.tell(MemoryDown(owner=9, number=1))
    assert worker._answer() == MemoryClosed(owner=9, number=1)
    with pytest.raises(ServingError):
        client.device.open_memory(made.handle, 4096)
    worker.tell(MakeMemory(owner=9, number=2, byte_size=1 << 50))
    refused = worker._answer()
    assert isinstance(refused, MemoryMade)
    assert refused.text


def test_requests_without_device_memory_run_as_ever(worker: WorkerHarness) -> None:
    [response] = worker.infer({"X": ROW[np.newaxis]})
    np.testing.assert_array_equal(response.outputs["Y"], [2 * ROW])
