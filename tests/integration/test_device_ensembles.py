"""Steps of ensembles on one GPU pass tensors in its memory (issue 8, 4): real processes, the host plays the GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient
from device_models import add_chain, add_doubler
from forebay_server import ForebayServer
from played_memories import count_memories

from forebay.client import shm
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Of a request of one row.
ROW_BYTES = 16


class Chain:
    """A server whose ensemble ``chain`` runs the model ``gpu`` twice, and a client."""

    def __init__(self, root: Path, kind: str, *flags: str, dim: int = 4) -> None:
        add_doubler(root, "gpu", "KIND_GPU", dim=dim, more="dynamic_batching { }")
        add_chain(root, "chain", dim=dim)
        self.kind = kind
        self.models = root
        #: Requests to the model ``gpu`` that :meth:`infer` has made.
        self.sent = 0
        environment = {PLAYED_GPUS_VARIABLE: "1"} if kind == "host" else {}
        self.server = ForebayServer(root, *flags, environment=environment)

    def infer(self, first: int = 0, count: int = 1, *, width: int = 4) -> None:
        """Send requests at the same time and check every answer.

        Args:
            width: elements of a row.
        """
        with httpclient.InferenceServerClient(self.server.http_url, concurrency=count) as client:
            sent: list[tuple[int, Any]] = []
            for number in range(first, first + count):
                tensor = httpclient.InferInput("X", [1, width], "FP32")
                tensor.set_data_from_numpy(np.full((1, width), number, np.float32))
                sent.append((number, client.async_infer("chain", [tensor])))
            self.sent += 2 * count
            for number, request in sent:
                np.testing.assert_array_equal(request.get_result().as_numpy("Y"), np.full((1, width), 4 * number))

    def counter(self, family: str, model: str = "gpu", **labels: str) -> int:
        """Return a counter of a model; 0: there is no such series."""
        return self.server.counter(family, model=model, **labels)

    @property
    def requests(self) -> int:
        """Requests to the model ``gpu`` that have succeeded."""
        return self.counter("nv_inference_request_success")

    @property
    def passed(self) -> int:
        return self.counter("forebay_device_passed_bytes_total")

    @property
    def crossed(self) -> tuple[int, int]:
        """Bytes to and from the GPU."""
        family = "forebay_device_copied_bytes_total"
        return self.counter(family, direction="to_device"), self.counter(family, direction="from_device")

    def wait_passing(self) -> None:
        """Send requests until there is a pool; they are answered before it is there, too."""
        before = self.passed

        def passes() -> bool:
            self.infer(7)
            return self.passed > before

        self.server.wait_for(passes, "steps to pass tensors on the GPU")

    @property
    def courier(self) -> int:
        return self.server.pid_of("worker courier")

    def pool_count(self) -> int:
        """Return how many memories the courier keeps on the host, where they are files."""
        return count_memories(self.courier)

    def wait_pools(self, count: int) -> None:
        if self.kind == "host":
            self.server.wait_for(lambda: self.pool_count() == count, f"{count} pools")


@pytest.fixture(params=KINDS)
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chain]:
    made = Chain(tmp_path, request.param, "--model-control-mode=explicit", "--load-model=chain")
    with made.server:
        made.wait_passing()
        yield made


def test_what_only_steps_read_stays_on_the_gpu(chain: Chain) -> None:
    """Of two steps the first reads from the host, and the second answers there; between them nothing crosses."""
    passed, (into, out) = chain.passed, chain.crossed
    chain.infer(count=20)
    assert chain.passed - passed == 20 * ROW_BYTES
    assert chain.crossed == (into + 20 * ROW_BYTES, out + 20 * ROW_BYTES)
    assert not any(
        chain.counter("forebay_copied_bytes_total", model, place=place)
        for model in ("gpu", "chain")
        for place in ("gather", "scatter")
    )


#: Widths of rows: larger and smaller than those before.
WIDTHS = (4, 400, 40, 4000, 4001, 4)


@pytest.fixture(params=KINDS)
def varying(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chain]:
    """The model's rows may have any width."""
    made = Chain(tmp_path, request.param, dim=-1)
    with made.server:
        made.wait_passing()
        yield made


def test_what_varies_in_size_stays_on_the_gpu_from_the_first_request_of_a_size(varying: Chain) -> None:
    """Only the model knows how large its output is, which waits on the GPU until the frontend has lent room there."""
    passed, (into, out) = varying.passed, varying.crossed
    for width in WIDTHS:
        varying.infer(width, width=width)
    total = sum(4 * width for width in WIDTHS)
    assert (varying.passed, varying.crossed) == (passed + total, (into + total, out + total))


def test_what_varies_in_size_stays_on_the_gpu_for_many_at_a_time(varying: Chain) -> None:
    passed, (into, out) = varying.passed, varying.crossed
    for width in (100, 7000):
        varying.infer(count=24, width=width)
    total = 24 * 4 * 7100
    assert (varying.passed, varying.crossed) == (passed + total, (into + total, out + total))


def test_what_varies_in_size_stays_on_the_gpu_where_a_client_runs_the_steps(varying: Chain) -> None:
    with Client(varying) as client:
        client.wait_passing()
        passed, (into, out) = client.settled_counters()
        for width in WIDTHS:
            client.infer(width)
        total = sum(4 * width for width in WIDTHS)
        assert client.settled_counters() == (passed + total, (into + total, out + total))


def test_a_worker_that_dies_between_steps_loses_no_request(chain: Chain) -> None:
    """What a request has on the GPU is kept until it has ended, so its step is tried again."""
    for round_number in range(3):
        [victim] = (pid for role, pid in chain.server.pids().items() if role.startswith("worker gpu"))
        with httpclient.InferenceServerClient(chain.server.http_url, concurrency=32) as client:
            tensor = httpclient.InferInput("X", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.full((1, 4), 3, np.float32))
            sent = [client.async_infer("chain", [tensor]) for _ in range(64)]
            sent.pop(4 * round_number).get_result()
            os.kill(victim, signal.SIGKILL)
            for request in sent:
                np.testing.assert_array_equal(request.get_result().as_numpy("Y"), np.full((1, 4), 12))
        chain.server.wait_logged("is back", count=round_number + 1)
    chain.wait_passing()


def test_a_courier_that_dies_takes_its_pool_along_and_the_next_one_makes_another(chain: Chain) -> None:
    os.kill(chain.courier, signal.SIGKILL)
    for number in range(20):
        chain.infer(number)
    chain.server.wait_logged("worker courier of GPU 0:1 #0 is back")
    chain.wait_passing()


def test_a_frontend_that_dies_gives_its_pool_back(chain: Chain) -> None:
    victim = chain.server.pid_of("http")
    os.kill(victim, signal.SIGKILL)
    chain.server.wait_for(lambda: chain.server.pid_of("http") not in (0, victim), "the next frontend")
    chain.wait_passing()
    chain.wait_pools(1)


def test_a_pool_goes_with_the_last_ensemble_that_needs_it(chain: Chain) -> None:
    chain.wait_pools(1)
    assert chain.server.post("/v2/repository/models/chain/unload", b"{}")[0] == 200
    chain.wait_pools(0)
    assert chain.server.post("/v2/repository/models/chain/load", b"{}")[0] == 200
    chain.wait_passing()


class Client:
    """A program that runs the ensemble itself, over shared memory."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._engine = shm.connect(chain.server.runtime_base)
        self._model = self._engine.model("chain")
        self._number = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._engine.close()

    def infer(self, width: int = 4) -> None:
        self._number += 1
        self._model.input("X", shape=(1, width))[:] = self._number
        np.testing.assert_array_equal(self._model.infer(), np.full((1, width), 4 * self._number))

    def wait_passing(self) -> None:
        """Run requests until there is a pool; they are answered before it is there, too."""
        before = self._chain.passed

        def passes() -> bool:
            self.infer()
            return self._chain.passed > before

        self._chain.server.wait_for(passes, "steps to pass tensors on the GPU")

    def settled_counters(self) -> tuple[int, tuple[int, int]]:
        """Return what was passed and what crossed once the server has read this client's counts."""
        self._chain.server.wait_for(lambda: self._chain.requests == 2 * self._number + self._chain.sent, "the counts")
        return self._chain.passed, self._chain.crossed


def test_what_only_steps_read_stays_on_the_gpu_where_a_client_runs_them(chain: Chain) -> None:
    with Client(chain) as client:
        client.wait_passing()
        passed, (into, out) = client.settled_counters()
        for _ in range(20):
            client.infer()
        assert client.settled_counters() == (passed + 20 * ROW_BYTES, (into + 20 * ROW_BYTES, out + 20 * ROW_BYTES))
        chain.wait_pools(2)
    chain.wait_pools(1)


def test_a_client_survives_the_courier_that_keeps_its_memory(chain: Chain) -> None:
    with Client(chain) as client:
        client.wait_passing()
        os.kill(chain.courier, signal.SIGKILL)
        for _ in range(20):
            client.infer()
        chain.server.wait_logged("worker courier of GPU 0:1 #0 is back")
        client.wait_passing()


def test_a_client_follows_models_off_the_gpu_and_back(chain: Chain) -> None:
    config = chain.models / "gpu" / "config.pbtxt"
    on_gpu = config.read_text()
    with Client(chain) as client:
        client.wait_passing()
        config.write_text(on_gpu.replace("KIND_GPU", "KIND_CPU"))
        assert chain.server.post("/v2/repository/models/gpu/load", b"{}")[0] == 200
        for _ in range(5):
            client.infer()
        chain.server.wait_for(lambda: chain.requests == 10, "the counts, which begin anew")
        assert chain.passed == 0
        config.write_text(on_gpu)
        assert chain.server.post("/v2/repository/models/gpu/load", b"{}")[0] == 200
        client.wait_passing()


def test_no_request_is_lost_while_models_move_off_the_gpu_and_back(chain: Chain) -> None:
    """What requests have there is read there, to their end: a version that leaves its GPU is not updated in place."""
    config = chain.models / "gpu" / "config.pbtxt"
    on_gpu = config.read_text()
    is_over = threading.Event()

    def infer_until_over() -> int:
        values = np.full((1, 4), 3, np.float32)
        tensor = httpclient.InferInput("X", [1, 4], "FP32")
        tensor.set_data_from_numpy(values)
        count = 0
        with httpclient.InferenceServerClient(chain.server.http_url) as client:
            while not is_over.is_set():
                np.testing.assert_array_equal(client.infer("chain", [tensor]).as_numpy("Y"), 4 * values)
                count += 1
        return count

    with ThreadPoolExecutor(4) as others:
        counts = [others.submit(infer_until_over) for _ in range(4)]
        try:
            for text in (on_gpu.replace("KIND_GPU", "KIND_CPU"), on_gpu) * 2:
                config.write_text(text)
                assert chain.server.post("/v2/repository/models/gpu/load", b"{}")[0] == 200
        finally:
            is_over.set()
        assert all(count.result() > 0 for count in counts)
    chain.wait_passing()


@pytest.mark.parametrize("kind", KINDS)
def test_what_finds_no_room_in_the_pool_goes_through_the_host(tmp_path: Path, kind: str) -> None:
    """F-151: room for one tensor at a time."""
    chain = Chain(tmp_path, kind, "--cuda-memory-pool-byte-size=0:256")
    with chain.server:
        chain.wait_passing()
        passed = chain.passed
        chain.infer(count=32)
        assert 0 < chain.passed - passed <= 32 * ROW_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_traced_come_to_the_host(tmp_path: Path, kind: str) -> None:
    """O-007."""
    traces = tmp_path / "traces.json"
    models = tmp_path / "models"
    models.mkdir()
    flags = [f"--trace-config={each}" for each in (f"triton,file={traces}", "level=TENSORS", "rate=1")]
    chain = Chain(models, kind, *flags)
    with chain.server:
        for number in range(5):
            chain.infer(number)
        chain.server.wait_for(lambda: chain.courier != 0, "the courier")
        chain.wait_pools(1)
        chain.infer(6)
        assert chain.passed == 0
    shown = [json.loads(part) for part in re.findall(r'"data":("[^"]*")', traces.read_text())]
    assert "12,12,12,12" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_no_pool_where_none_is_wanted(tmp_path: Path, kind: str) -> None:
    """F-151; steps then have rows in host memory, as on a CPU."""
    chain = Chain(tmp_path, kind, "--cuda-memory-pool-byte-size=0:0")
    with chain.server:
        for number in range(5):
            chain.infer(number)
        assert (chain.passed, chain.courier) == (0, 0)
