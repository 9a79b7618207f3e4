"""A new scheduler asks a worker whose model runs how things stand: it hears at once, and again when all has run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from worker_harness import PRODUCER, WorkerHarness, spec_from_config

from forebay.ipc.wire import FLAG_UNNAMED, HEADER, PARCEL, SLOT, Kind, Run, pack_runs, producers_of

EPOCH = 5
SYNC = HEADER.pack(Kind.SYNC, 0, 0, 0, EPOCH)

#: Answers at once a request for 0, much later (from another thread) one for 1, and one for 2 when the file appears.
MODEL = """
import os
import threading
import time
import triton_python_backend_utils as pb_utils

def is_open():
    return os.path.exists(os.path.join(os.path.dirname(__file__), "open"))

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            asked = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            answer = pb_utils.InferenceResponse([pb_utils.Tensor("OUT", asked.copy())])
            sender = request.get_response_sender()
            if asked.flat[0] == 1:
                threading.Thread(target=self.send_later, args=(sender, answer)).start()
            else:
                while asked.flat[0] == 2 and not is_open():
                    request.is_cancelled()
                    time.sleep(0.005)
                sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def send_later(self, sender, answer):
        while not is_open():
            time.sleep(0.005)
        sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


class Scene:
    def __init__(self, worker: WorkerHarness, folder: Path) -> None:
        self.worker = worker
        self._folder = folder

    def open(self) -> None:
        (self._folder / "open").touch()

    def ask(self, number: int) -> int:
        (token,) = self.worker.submit({"IN": np.full(1, number, np.float32)})
        return token

    def told(self) -> tuple[Kind, list[tuple[int, int, int]]]:
        """Return what the scheduler is told next: of DONE and CLOSED nothing."""
        kind, parts, batch = self.worker.told_scheduler()
        assert batch == EPOCH
        return kind, parts


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.py").write_text(MODEL)
    config = {
        "backend": "python",
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": [1]}],
        "output": [{"name": "OUT", "data_type": "TYPE_FP32", "dims": [1]}],
        "model_transaction_policy": {"decoupled": True},
    }
    with WorkerHarness(spec_from_config(config, model="m", model_path=str(tmp_path))) as worker:
        yield Scene(worker, tmp_path / "1")


def test_worker_names_what_is_open_since_before_and_of_whom_it_runs_something(scene: Scene) -> None:
    late = scene.ask(1)
    scene.worker.wait_done()
    scene.ask(2)
    scene.worker.send_raw(SYNC)
    kind, parts = scene.told()
    assert kind is Kind.UNSYNCED
    assert (PRODUCER, 0, late) in parts
    assert (PRODUCER, FLAG_UNNAMED, 0) in parts
    scene.open()
    assert scene.told()[0] is Kind.SYNCED


def test_batches_that_were_read_ahead_count_too(scene: Scene) -> None:
    scene.ask(2)
    another = Run(PRODUCER + 1, 1, 64, 8, 0, 1, 0, 0)
    scene.worker.send_raw(pack_runs(Kind.RUNS, 0, 0, 99, [another]))
    scene.worker.send_raw(SYNC)
    kind, parts = scene.told()
    assert kind is Kind.UNSYNCED
    assert (PRODUCER + 1, FLAG_UNNAMED, 0) in parts
    scene.open()
    assert scene.told()[0] is Kind.SYNCED


def test_idle_worker_is_synced_at_once(scene: Scene) -> None:
    late = scene.ask(1)
    scene.worker.wait_done()
    scene.worker.send_raw(SYNC)
    assert scene.told() == (Kind.SYNCED, [(PRODUCER, 0, late)])
    scene.open()


def parcels(kind: Kind, *producers: int) -> bytes:
    """Build a batch of parcels of these producers, with heads of different lengths."""
    slots = b"".join(SLOT.pack(0, 0, 0) for _ in producers) if kind == Kind.SEQUENCES else b""
    bodies = [PARCEL.pack(producer, 1, 5, 0, producer) + b"x" * producer for producer in producers]
    return HEADER.pack(kind, 0, len(producers), 0, 9) + slots + b"".join(bodies)


def test_whose_requests_are_in_a_message() -> None:
    assert producers_of(parcels(Kind.PARCELS, 3, 4, 3)) == {3, 4}
    assert producers_of(parcels(Kind.SEQUENCES, 7, 1)) == {7, 1}
    runs = [Run(producer, 1, 64, 8, 0, 1, 0, 0) for producer in (5, 6)]
    assert producers_of(pack_runs(Kind.RUNS, 0, 0, 9, runs)) == {5, 6}
    assert producers_of(HEADER.pack(Kind.RING_OPEN, 0, 0, 8, 1)) == {8}
    assert producers_of(HEADER.pack(Kind.CANCEL, 0, 1, 8, 1)) == set()
