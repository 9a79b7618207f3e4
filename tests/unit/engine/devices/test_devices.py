"""The device interface: one suite, run on every implementation that this machine has."""

from __future__ import annotations

import ast
import ctypes
import mmap
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from device_child import double_and_refuse

from forebay.engine.devices.base import (
    ALIGNMENT_BYTES,
    HANDLE_BYTES,
    Device,
    DeviceBroken,
    DeviceError,
    DeviceMemoryFull,
    Memory,
    Stream,
)
from forebay.engine.devices.opening import open_device
from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Unsupported

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Wait for another process, s; a watchdog.
PATIENCE_S = 30


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Device:
    return open_device(request.param)


@pytest.fixture
def stream(device: Device) -> Iterator[Stream]:
    with device.make_stream() as made:
        yield made


def whole_pages(count: int) -> np.ndarray:
    """Return zeros, float32 [count], on pages of their own: what shares one cannot be page-locked twice."""
    return np.frombuffer(mmap.mmap(-1, max(4 * count, mmap.PAGESIZE)), np.float32, count)


def put(stream: Stream, memory: Memory, array: np.ndarray) -> None:
    stream.copy_in(memory.address, array.ctypes.data, array.nbytes)
    stream.synchronize()


def get(stream: Stream, memory: Memory, count: int) -> np.ndarray:
    array = np.empty(count, np.float32)
    stream.copy_out(array.ctypes.data, memory.address, array.nbytes)
    stream.synchronize()
    return array


def test_copies_there_and_back(device: Device, stream: Stream) -> None:
    numbers = np.arange(1000, dtype=np.float32)
    with device.allocate(numbers.nbytes) as first, device.allocate(numbers.nbytes) as second:
        assert first.address % ALIGNMENT_BYTES == 0
        put(stream, first, numbers)
        stream.copy_within(second.address, first.address, numbers.nbytes)
        stream.clear(first.address, 4 * 10)
        assert (get(stream, second, 1000) == numbers).all()
        assert get(stream, first, 20).tolist() == [0] * 10 + list(range(10, 20))
    assert stream.is_idle
    assert (device.traffic.copies_in, device.traffic.bytes_in) == (1, 4000)
    assert (device.traffic.copies_out, device.traffic.bytes_out) == (2, 4080)


def test_pinned_memory_is_copied_from(device: Device, stream: Stream) -> None:
    numbers = whole_pages(4096)
    numbers[:] = np.arange(4096)
    with device.pin(numbers.ctypes.data, numbers.nbytes), device.allocate(numbers.nbytes) as memory:
        put(stream, memory, numbers)
        assert (get(stream, memory, 4096) == numbers).all()
        with pytest.raises(DeviceError):
            device.pin(numbers.ctypes.data, numbers.nbytes)
    with device.pin(numbers.ctypes.data, numbers.nbytes):
        pass
    with pytest.raises(DeviceError, match="0 bytes"):
        device.pin(numbers.ctypes.data, 0)


def test_streams_wait_for_events(device: Device, stream: Stream) -> None:
    numbers = np.ones(1 << 20, np.float32)
    with device.make_event() as event, device.make_stream(-1) as other, device.allocate(numbers.nbytes) as memory:
        assert event.is_done
        stream.copy_in(memory.address, numbers.ctypes.data, numbers.nbytes)
        stream.record(event)
        other.wait(event)
        assert (get(other, memory, 1 << 20) == 1).all()
        event.synchronize()
        assert event.is_done


def test_graph_repeats_what_was_captured(device: Device, stream: Stream) -> None:
    source, target = whole_pages(256), whole_pages(256)
    with (
        device.pin(source.ctypes.data, source.nbytes),
        device.pin(target.ctypes.data, target.nbytes),
        device.allocate(source.nbytes) as memory,
    ):
        stream.begin_capture()
        stream.copy_in(memory.address, source.ctypes.data, source.nbytes)
        stream.copy_out(target.ctypes.data, memory.address, target.nbytes)
        with stream.end_capture() as graph:
            assert (target == 0).all()
            for value in (3, 4):
                source[:] = value
                stream.launch(graph)
                stream.synchronize()
                assert (target == value).all()
    assert device.traffic.graph_launches == 2


def test_waiting_cannot_be_captured(device: Device, stream: Stream) -> None:
    stream.begin_capture()
    with pytest.raises(DeviceError):
        stream.synchronize()
    with pytest.raises(DeviceError):
        stream.end_capture()
    stream.synchronize()


def test_no_room_is_said_so(device: Device) -> None:
    with pytest.raises(DeviceMemoryFull, match=str(1 << 60)):
        device.allocate(1 << 60)
    free, total = device.memory_info()
    assert 0 < free <= total


def test_closing_twice_does_nothing(device: Device) -> None:
    memory = device.allocate(0)
    memory.close()
    memory.close()


def test_another_process_opens_exported_memory(device: Device, stream: Stream) -> None:
    numbers = np.arange(1024, dtype=np.float32)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with device.allocate(numbers.nbytes) as memory:
        put(stream, memory, numbers)
        handle = device.export_memory(memory)
        assert len(handle) == HANDLE_BYTES
        arguments = (device.kind, handle, numbers.nbytes, 1 << 40, answers)
        process = context.Process(target=double_and_refuse, args=arguments)
        process.start()
        refusals = [answers.get(timeout=PATIENCE_S) for _ in range(3)]
        process.join(PATIENCE_S)
        assert process.exitcode == 0
        assert (get(stream, memory, 1024) == 2 * numbers).all()
    assert "opened" not in refusals
    assert "64 bytes, not 5" in refusals[2]
    answers.close()
    answers.join_thread()


def test_own_memory_cannot_be_opened(device: Device) -> None:
    """FACTS 1: CUDA refuses it, so nobody may count on it."""
    with device.allocate(64) as memory, pytest.raises(DeviceError):
        device.open_memory(device.export_memory(memory), 64)


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(Unsupported, match="no kind of device called 'tpu'"):
        open_device("tpu")


def test_a_machine_without_cuda_says_so() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(Unsupported, match="CUDA"):
            open_device("cuda")
    else:
        with pytest.raises(Unsupported, match="no CUDA device 999"):
            open_device("cuda", 999)


def test_what_cuda_is_asked_for_by_name_is_there() -> None:
    """CuPy imports without a GPU, so that at least every name in our code can be looked up."""
    pytest.importorskip("cupy")
    from forebay.engine.devices import cuda_device

    source = Path(cuda_device.__file__).read_text()
    names = set(re.findall(r"\bruntime\.(\w+)", source))
    assert len(names) > 30
    assert {name for name in names if not hasattr(cuda_device.runtime, name)} == set()


def test_cuda_is_asked_with_as_many_arguments_as_cupy_wants() -> None:
    """Its functions are compiled: what they take stands in their documentation, ``free(intptr_t ptr)``."""
    pytest.importorskip("cupy")
    from forebay.engine.devices import cuda_device

    tree = ast.parse(Path(cuda_device.__file__).read_text())
    calls = [
        (node.func.attr, len(node.args) + len(node.keywords))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "runtime"
        and node.func.attr != "CUDARuntimeError"
    ]
    assert len(calls) > 30
    for name, given in calls:
        signature = getattr(cuda_device.runtime, name).__doc__.split("\n")[0]
        parameters = [text for text in signature.partition("(")[2].partition(")")[0].split(",") if text.strip()]
        needed = [text for text in parameters if "=" not in text]
        assert len(needed) <= given <= len(parameters), f"{name} with {given} arguments: {signature}"


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (1, DeviceError, "trying: cudaErrorInvalidValue: invalid argument"),
        (2, DeviceMemoryFull, "cudaErrorMemoryAllocation"),
        (46, DeviceError, "--mps on, or nvidia-smi -c DEFAULT"),
        *((status, DeviceBroken, "trying: cudaError") for status in (214, 220, 226, 700, 709, 710, 719, 810, 999)),
    ],
)
def test_errors_of_cuda_are_told_apart(status: int, kind: type[DeviceError], text: str) -> None:
    """What cannot be used on ends its worker; what can does not."""
    pytest.importorskip("cupy")
    from forebay.engine.devices.cuda_device import runtime, translated

    with pytest.raises(DeviceError, match=text) as caught, translated("trying"):
        raise runtime.CUDARuntimeError(status)
    assert type(caught.value) is kind


def test_a_query_tells_done_from_not_ready_and_from_broken() -> None:
    pytest.importorskip("cupy")
    from forebay.engine.devices.cuda_device import is_done, runtime

    def raising(status: int) -> int:
        raise runtime.CUDARuntimeError(status)

    assert is_done(lambda _handle: 0, 1)
    assert is_done(lambda _handle: None, 1)
    # As a number or as an exception, by CuPy's version.
    for query in (int, raising):
        assert not is_done(query, 600)
        with pytest.raises(DeviceBroken):
            is_done(query, 700)


def test_timed_work_is_counted(device: Device, stream: Stream) -> None:
    numbers = np.ones(1 << 20, np.float32)
    counters = memoryview(bytearray(InstanceCounter.BATCH_SIZES * 8)).cast("Q")
    device.traffic.show_in(counters)
    with device.allocate(numbers.nbytes) as memory:
        for _ in range(2):
            stream.begin_timing()
            stream.copy_in(memory.address, numbers.ctypes.data, numbers.nbytes)
            stream.end_timing()
            assert stream.is_idle
    device.traffic.publish()
    assert counters[InstanceCounter.DEVICE_NS] > 0
    assert counters[InstanceCounter.DEVICE_COPIES_IN] == 2
    assert counters[InstanceCounter.DEVICE_BYTES_IN] == 2 * numbers.nbytes


def test_what_crossed_before_somebody_counts_is_not_counted(device: Device, stream: Stream) -> None:
    """Of a model's load, for example, which tries it."""
    numbers = np.ones(16, np.float32)
    counters = memoryview(bytearray(InstanceCounter.BATCH_SIZES * 8)).cast("Q")
    with device.allocate(numbers.nbytes) as memory:
        stream.copy_in(memory.address, numbers.ctypes.data, numbers.nbytes)
        device.traffic.publish()
        device.traffic.show_in(counters)
        stream.copy_in(memory.address, numbers.ctypes.data, numbers.nbytes)
        stream.synchronize()
    device.traffic.publish()
    assert counters[InstanceCounter.DEVICE_COPIES_IN] == 1
