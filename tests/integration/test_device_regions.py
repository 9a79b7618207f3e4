"""Clients' CUDA shared memory by an unmodified tritonclient, over HTTP and gRPC (spec H-195, H-196, G-015).

On any machine with the host as the GPU: real processes, whose device memory is memory files. With a GPU, the same on
CUDA, by ``tritonclient.utils.cuda_shared_memory``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from device_models import add_chain, add_doubler
from forebay_server import ForebayServer
from tritonclient.utils import InferenceServerException

from forebay.engine.devices.base import Memory
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE, open_device

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]
PROTOCOLS = ["http", "grpc"]
BYTES = 4096
#: Models that live on the GPU, on the CPU, on both, and an ensemble.
MODELS = ["gpu", "gpu_varying", "cpu", "both", "chain", "nested", "half"]
#: By what an ensemble multiplies; other models double.
FACTORS = {"chain": 4, "nested": 16, "half": 4}


class Setup:
    """A server, and this process as its client with memory on the device."""

    def __init__(self, kind: str, server: ForebayServer) -> None:
        self.kind = kind
        self.server = server
        self.device = open_device(kind)
        self.stream = self.device.make_stream()

    def allocate(self) -> tuple[Memory, bytes]:
        """Return memory and its handle, as ``cuda_shared_memory.get_raw_handle`` gives it: in base64."""
        memory = self.device.allocate(BYTES)
        return memory, base64.b64encode(self.device.export_memory(memory))

    def put(self, memory: Memory, offset: int, array: np.ndarray[Any, Any]) -> None:
        self.stream.copy_in(memory.address + offset, array.ctypes.data, array.nbytes)
        self.stream.synchronize()

    def get(self, memory: Memory, offset: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        array = np.empty(shape, np.float32)
        self.stream.copy_out(array.ctypes.data, memory.address + offset, array.nbytes)
        self.stream.synchronize()
        return array

    def pending(self, model: str) -> int:
        """Return how many requests wait in a model's queue."""
        found = re.search(
            rf'^nv_inference_pending_request_count\{{[^}}]*model="{model}".*\}} (\d+)$', self.server.metrics(), re.M
        )
        return 0 if found is None else int(found[1])

    def client(self, protocol: str) -> Any:
        if protocol == "http":
            return httpclient.InferenceServerClient(self.server.http_url)
        return grpcclient.InferenceServerClient(f"127.0.0.1:{self.server.ports()['GRPCInferenceService']}")


@pytest.fixture(params=KINDS, scope="module")
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    kind: str = request.param
    root: Path = tmp_path_factory.mktemp("models")
    add_doubler(root, "gpu", "KIND_GPU", more="dynamic_batching { }")
    add_doubler(root, "gpu_varying", "KIND_GPU", dim=-1)
    add_doubler(root, "gpu_patient", "KIND_GPU", more="dynamic_batching { max_queue_delay_microseconds: 700000 }")
    add_doubler(root, "cpu", "KIND_CPU")
    add_doubler(root, "both", "KIND_CPU", more="instance_group { kind: KIND_GPU count: 1 gpus: [ 0 ] }")
    add_chain(root, "chain")
    add_chain(root, "nested", model="chain")
    add_chain(root, "half", last="cpu")
    environment = {PLAYED_GPUS_VARIABLE: "1"} if kind == "host" else {}
    with ForebayServer(
        root, "--allow-client-shm=true", protocols=("http", "grpc", "metrics"), environment=environment
    ) as server:
        yield Setup(kind, server)


def library(protocol: str) -> ModuleType:
    return httpclient if protocol == "http" else grpcclient


@contextlib.contextmanager
def registered(setup: Setup, client: Any, *names: str) -> Iterator[list[Memory]]:
    memories: list[Memory] = []
    for name in names:
        memory, handle = setup.allocate()
        client.register_cuda_shared_memory(name, handle, 0, BYTES)
        memories.append(memory)
    try:
        yield memories
    finally:
        for name in names:
            client.unregister_cuda_shared_memory(name)
        for memory in memories:
            memory.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_inputs_and_outputs_in_device_memory(setup: Setup, protocol: str, model: str) -> None:
    api, client = library(protocol), setup.client(protocol)
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    factor = FACTORS.get(model, 2)
    with registered(setup, client, "in", "out") as (source, target):
        setup.put(source, 64, values)
        tensor = api.InferInput("X", [2, 4], "FP32")
        tensor.set_shared_memory("in", values.nbytes, offset=64)
        wanted = api.InferRequestedOutput("Y")
        wanted.set_shared_memory("out", values.nbytes, offset=128)
        for _ in range(3):
            client.infer(model, [tensor], outputs=[wanted])
            np.testing.assert_array_equal(setup.get(target, 128, (2, 4)), factor * values)
        # One side only.
        np.testing.assert_array_equal(client.infer(model, [tensor]).as_numpy("Y"), factor * values)
        direct = api.InferInput("X", [2, 4], "FP32")
        direct.set_data_from_numpy(values + 1)
        client.infer(model, [direct], outputs=[wanted])
        np.testing.assert_array_equal(setup.get(target, 128, (2, 4)), factor * (values + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("setup", ["cuda"], indirect=True)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_regions_as_tritonclient_makes_them(setup: Setup, protocol: str) -> None:
    cuda_shm = pytest.importorskip("tritonclient.utils.cuda_shared_memory")
    api, client = library(protocol), setup.client(protocol)
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    regions = {name: cuda_shm.create_shared_memory_region(name, values.nbytes, 0) for name in ("in", "out")}
    cuda_shm.set_shared_memory_region(regions["in"], [values])
    for name, region in regions.items():
        client.register_cuda_shared_memory(name, cuda_shm.get_raw_handle(region), 0, values.nbytes)
    tensor = api.InferInput("X", [2, 4], "FP32")
    tensor.set_shared_memory("in", values.nbytes)
    wanted = api.InferRequestedOutput("Y")
    wanted.set_shared_memory("out", values.nbytes)
    client.infer("gpu", [tensor], outputs=[wanted])
    found = cuda_shm.get_contents_as_numpy(regions["out"], np.float32, [2, 4])
    np.testing.assert_array_equal(found, 2 * values)
    client.unregister_cuda_shared_memory()
    for region in regions.values():
        cuda_shm.destroy_shared_memory_region(region)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_status_shows_what_is_registered(setup: Setup, protocol: str) -> None:
    """H-195, G-015."""
    client = setup.client(protocol)

    def status() -> dict[str, tuple[int, int]]:
        found = client.get_cuda_shared_memory_status()
        if protocol == "http":
            return {each["name"]: (each["device_id"], each["byte_size"]) for each in found}
        return {name: (region.device_id, region.byte_size) for name, region in found.regions.items()}

    assert status() == {}
    with registered(setup, client, "a", "b"):
        assert status() == {"a": (0, BYTES), "b": (0, BYTES)}
        client.unregister_cuda_shared_memory()
        assert status() == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_cannot_be_registered(setup: Setup, protocol: str) -> None:
    """H-196: Triton's texts."""
    client = setup.client(protocol)
    memory, handle = setup.allocate()
    failed = "failed to register CUDA shared memory region 'bad': "
    no_device = "failed to open CUDA IPC handle: invalid device ordinal"
    for device, size, text in ((7, BYTES, no_device), (0, 0, "invalid args")):
        with pytest.raises(InferenceServerException, match=failed + text):
            client.register_cuda_shared_memory("bad", handle, device, size)
    for raw, size in ((base64.b64encode(bytes(64)), BYTES), (handle, 1 << 40)):
        with pytest.raises(InferenceServerException, match=failed + "failed to open CUDA IPC handle: "):
            client.register_cuda_shared_memory("bad", raw, 0, size)
    with pytest.raises(
        InferenceServerException, match="'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"
    ):
        client.register_cuda_shared_memory("bad", base64.b64encode(b"short"), 0, BYTES)
    with registered(setup, client, "twice"), pytest.raises(InferenceServerException, match="already in manager"):
        client.register_cuda_shared_memory("twice", handle, 0, BYTES)
    memory.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["gpu", "cpu", "chain"])
def test_places_outside_and_too_little_room(setup: Setup, protocol: str, model: str) -> None:
    """H-198, H-200."""
    api, client = library(protocol), setup.client(protocol)
    with registered(setup, client, "r"):
        tensor = api.InferInput("X", [1, 4], "FP32")
        tensor.set_shared_memory("r", 16, offset=BYTES - 8)
        with pytest.raises(
            InferenceServerException, match=r"Invalid offset \+ byte size for shared memory region: 'r'"
        ):
            client.infer(model, [tensor])
        tensor = api.InferInput("X", [1, 4], "FP32")
        tensor.set_shared_memory("r", 16)
        wanted = api.InferRequestedOutput("Y")
        wanted.set_shared_memory("r", 8, offset=64)
        with pytest.raises(InferenceServerException, match=r"output 'Y' \(8 bytes\) should be at least 16 bytes"):
            client.infer(model, [tensor], outputs=[wanted])
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'r'"):
        client.infer(model, [tensor])


def test_a_region_stays_open_until_the_requests_that_wait_have_run(setup: Setup) -> None:
    """H-194: unregistering is answered then, so that the client may free its memory."""
    client = setup.client("http")
    memory, handle = setup.allocate()
    client.register_cuda_shared_memory("in", handle, 0, BYTES)
    setup.put(memory, 0, np.ones((1, 4), np.float32))
    tensor = httpclient.InferInput("X", [1, 4], "FP32")
    tensor.set_shared_memory("in", 16)
    with ThreadPoolExecutor(2) as others:
        waiting = [others.submit(setup.client("http").infer, "gpu_patient", [tensor]) for _ in range(2)]
        setup.server.wait_for(lambda: setup.pending("gpu_patient") == 2, "requests to wait in the queue")
        client.unregister_cuda_shared_memory("in")
        assert setup.pending("gpu_patient") == 0
        memory.close()
        for request in waiting:
            np.testing.assert_array_equal(request.result().as_numpy("Y"), np.full((1, 4), 2, np.float32))


def test_a_courier_that_dies_is_replaced(setup: Setup) -> None:
    client = setup.client("http")
    values = np.ones((1, 4), np.float32)
    tensor = httpclient.InferInput("X", [1, 4], "FP32")
    tensor.set_shared_memory("in", 16)
    with registered(setup, client, "in") as [memory]:
        setup.put(memory, 0, values)
        killed = setup.server.pid_of("worker courier of GPU 0")
        os.kill(killed, signal.SIGKILL)
        setup.server.wait_for(
            lambda: setup.server.pid_of("worker courier of GPU 0") not in (0, killed), "another courier"
        )
        setup.server.wait_logged("courier of GPU 0:1 #0 is back")
        np.testing.assert_array_equal(client.infer("cpu", [tensor]).as_numpy("Y"), 2 * values)


def test_copies_are_counted_by_where_they_go(setup: Setup) -> None:
    """Issue 8, 5: what stays on the device is not copied to or from the host."""
    client = setup.client("http")
    values = np.ones((1, 4), np.float32)
    tensor = httpclient.InferInput("X", [1, 4], "FP32")
    tensor.set_shared_memory("in", 16)
    wanted = httpclient.InferRequestedOutput("Y")
    wanted.set_shared_memory("in", 16, offset=64)

    def metric(name: str, labels: str = "") -> int:
        url = f"http://127.0.0.1:{setup.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            page = reply.read().decode()
        found = re.search(rf'^{name}\{{[^}}]*{labels}[^}}]*model="gpu",version="1"\}} (\d+)$', page, re.M)
        assert found is not None, page
        return int(found[1])

    def copied() -> tuple[int, int]:
        name = "forebay_device_copied_bytes_total"
        return metric(name, 'direction="to_device",'), metric(name, 'direction="from_device",')

    with registered(setup, client, "in") as [memory]:
        setup.put(memory, 0, values)
        before, busy = copied(), metric("forebay_device_busy_us_total")
        for _ in range(20):
            client.infer("gpu", [tensor], outputs=[wanted])
        assert copied() == before
        assert metric("forebay_device_busy_us_total") > busy
        client.infer("gpu", [tensor])
        assert copied() == (before[0], before[1] + 16)
    status, page = setup.server.get("/v2/models/cpu/ready")
    assert (status, page) == (200, b"")


@pytest.mark.parametrize("model", ["chain", "nested"])
def test_ensembles_read_and_write_regions_where_they_are(setup: Setup, model: str) -> None:
    """Issue 8, 4: their steps live on that GPU; nothing comes to the host, nor does a courier carry anything."""
    client = setup.client("http")
    values, factor = np.ones((1, 4), np.float32), FACTORS[model]
    tensor = httpclient.InferInput("X", [1, 4], "FP32")
    tensor.set_shared_memory("in", 16)
    wanted = httpclient.InferRequestedOutput("Y")
    wanted.set_shared_memory("in", 16, offset=64)

    def counted(family: str, **labels: str) -> int:
        return setup.server.counter(family, model="gpu", **labels)

    def crossed() -> list[int]:
        return [counted("forebay_device_copied_bytes_total", direction=f"{to}_device") for to in ("to", "from")]

    with registered(setup, client, "in") as [memory]:
        setup.put(memory, 0, values)

        def passes() -> bool:
            before = counted("forebay_device_passed_bytes_total")
            client.infer(model, [tensor], outputs=[wanted])
            return counted("forebay_device_passed_bytes_total") > before

        setup.server.wait_for(passes, "steps to pass tensors on the GPU")
        before = crossed()
        for number in range(1, 5):
            setup.put(memory, 0, number * values)
            client.infer(model, [tensor], outputs=[wanted])
            np.testing.assert_array_equal(setup.get(memory, 64, (1, 4)), number * factor * values)
        assert crossed() == before
        client.infer(model, [tensor])
        assert crossed() == [before[0], before[1] + 16]


def test_nothing_is_left_when_all_are_unregistered(setup: Setup) -> None:
    """Requests have given everything back, and the model's statistics count them as any others."""
    client = setup.client("http")
    status, body = setup.server.get("/v2/models/gpu/stats")
    assert status == 200
    assert json.loads(body)["model_stats"][0]["inference_stats"]["fail"]["count"] >= 1
    assert client.get_cuda_shared_memory_status() == []
