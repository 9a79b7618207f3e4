"""The ways to have a model run on a GPU that ``bench.gpu`` compares, each with how it is measured."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import tritonclient.utils.shared_memory as system_shm

from bench.kserve import infer_request
from bench.load.client import LoadFailed, LoadResult, run_load
from forebay.client import shm
from forebay.engine.devices.base import Device, Stream

Array = npt.NDArray[np.float32]

#: Calls before those that count: cuDNN tries its algorithms at the first of each shape, graphs are captured.
_WARM_COUNT = 3

_WARM_S = 0.5


class Model(NamedTuple):
    """One model that is measured."""

    name: str
    file: Path
    input: str
    output: str
    dims: tuple[int, ...]
    classes: int

    def rows(self, batch: int) -> Array:
        return np.random.default_rng(batch).standard_normal((batch, *self.dims), np.float32)


class Figures(NamedTuple):
    """What a way did in the measured time."""

    p50_us: float
    p99_us: float
    calls_per_s: float
    count: int


class Way(NamedTuple):
    """One way to have a model run."""

    alone: Callable[[float], Figures]
    """Runs one call after the other for so many seconds."""
    load: Callable[[float], Figures] | None = None
    """Runs many calls at a time; None: no more than one can be under way."""


def timed(call: Callable[[], object], duration_s: float) -> Figures:
    """Call in this thread for so long."""
    for _ in range(_WARM_COUNT):
        call()
    took: list[int] = []
    began_ns = time.perf_counter_ns()
    end_ns = began_ns + int(duration_s * 1e9)
    while (call_ns := time.perf_counter_ns()) < end_ns or not took:
        call()
        took.append(time.perf_counter_ns() - call_ns)
    elapsed_s = (time.perf_counter_ns() - began_ns) / 1e9
    p50_ns, p99_ns = np.percentile(took, (50, 99))
    return Figures(p50_ns / 1e3, p99_ns / 1e3, len(took) / elapsed_s, len(took))


@contextlib.contextmanager
def in_process(session: ort.InferenceSession, model: Model, batch: int, *, on_device: bool) -> Iterator[Way]:
    """Run a session here, with tensors in host memory or bound once in GPU memory."""
    rows = model.rows(batch)
    if not on_device:
        yield Way(lambda duration_s: timed(lambda: session.run([model.output], {model.input: rows}), duration_s))
        return
    binding = session.io_binding()
    binding.bind_ortvalue_input(model.input, ort.OrtValue.ortvalue_from_numpy(rows, "cuda", 0))
    binding.bind_output(model.output, "cuda", 0)
    yield Way(lambda duration_s: timed(lambda: session.run_with_iobinding(binding), duration_s))


@contextlib.contextmanager
def by_native_client(engine: shm.Engine, model: Model, batch: int) -> Iterator[Way]:
    """Call through ``forebay.client.shm``."""
    handle = engine.model(model.name)
    handle.input(model.input, rows=batch)[:] = model.rows(batch)
    yield Way(lambda duration_s: timed(handle.infer, duration_s))


@contextlib.contextmanager
def by_http(port: int, model: Model, batch: int, connections: int) -> Iterator[Way]:
    """Send the tensors in the body."""
    request = infer_request(model.name, {model.input: model.rows(batch)}, [model.output], port)
    yield of_requests(port, request, connections)


@contextlib.contextmanager
def by_plain_server(port: int, model: Model, batch: int, connections: int) -> Iterator[Way]:
    """Send the input as it is to ``bench/peer_onnx_server.py``."""
    body = model.rows(batch).tobytes()
    head = f"POST /{model.name} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    yield of_requests(port, head.encode() + body, connections)


@contextlib.contextmanager
def by_system_shm(port: int, model: Model, batch: int, connections: int) -> Iterator[Way]:
    """Send the place of the tensors in ``/dev/shm``, as tritonclient makes it."""
    rows = model.rows(batch)
    out_bytes = 4 * batch * model.classes
    key = f"/forebay-bench-{os.getpid()}"
    region = system_shm.create_shared_memory_region("bench", key, rows.nbytes + out_bytes)
    try:
        system_shm.set_shared_memory_region(region, [rows])
        body = {"key": key, "offset": 0, "byte_size": rows.nbytes + out_bytes}
        with registered(port, "system", body):
            yield of_requests(port, region_request(port, model, batch, rows.nbytes, out_bytes), connections)
    finally:
        system_shm.destroy_shared_memory_region(region)


@contextlib.contextmanager
def by_cuda_shm(port: int, model: Model, batch: int, connections: int, device: Device, stream: Stream) -> Iterator[Way]:
    """Send the place of the tensors in GPU memory of this process."""
    rows = model.rows(batch)
    out_bytes = 4 * batch * model.classes
    with device.allocate(rows.nbytes + out_bytes) as memory:
        stream.copy_in(memory.address, rows.ctypes.data, rows.nbytes)
        stream.synchronize()
        handle = base64.b64encode(device.export_memory(memory)).decode()
        body = {"raw_handle": {"b64": handle}, "device_id": 0, "byte_size": rows.nbytes + out_bytes}
        # Before the memory goes: nobody has it open any more when the end of this is answered.
        with registered(port, "cuda", body):
            yield of_requests(port, region_request(port, model, batch, rows.nbytes, out_bytes), connections)


@contextlib.contextmanager
def registered(port: int, kind: str, body: dict[str, object]) -> Iterator[None]:
    """Have the server know a region called ``bench``."""
    path = f"/v2/{kind}sharedmemory/region/bench"
    post(port, f"{path}/register", body)
    try:
        yield
    finally:
        post(port, f"{path}/unregister", {})


def of_requests(port: int, request: bytes, connections: int) -> Way:
    """Repeat one HTTP request, over one connection or over several."""

    def measure(duration_s: float, connections: int) -> Figures:
        found = run_load(port, request, connections=connections, duration_s=duration_s, warmup_s=_WARM_S)
        check(found)
        return Figures(found.p50_us, found.p99_us, found.rate_per_s, found.completed_count)

    return Way(lambda duration_s: measure(duration_s, 1), lambda duration_s: measure(duration_s, connections))


def check(found: LoadResult) -> None:
    """Refuse figures of requests that went wrong.

    Raises:
        LoadFailed: some did, or none was answered.
    """
    if found.error_count or not found.completed_count:
        raise LoadFailed(f"{found.error_count} of {found.completed_count} requests went wrong: {found.first_error}")


def region_request(port: int, model: Model, batch: int, in_bytes: int, out_bytes: int) -> bytes:
    """Return a request whose tensors lie in the region ``bench``, one behind the other."""

    def place(offset: int, size: int) -> dict[str, object]:
        return {"shared_memory_region": "bench", "shared_memory_offset": offset, "shared_memory_byte_size": size}

    shape = [batch, *model.dims]
    document = {
        "inputs": [{"name": model.input, "shape": shape, "datatype": "FP32", "parameters": place(0, in_bytes)}],
        "outputs": [{"name": model.output, "parameters": place(in_bytes, out_bytes)}],
    }
    body = json.dumps(document).encode()
    head = (
        f"POST /v2/models/{model.name}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def post(port: int, path: str, document: dict[str, object]) -> None:
    """Send a command to the server.

    Raises:
        urllib.error.HTTPError: it refused.
    """
    data = json.dumps(document).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, method="POST")
    with urllib.request.urlopen(request, timeout=60):
        pass
