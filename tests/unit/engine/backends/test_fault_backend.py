"""The fault-injection backend itself; what it does to workers is in tests/unit/engine/worker."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.fault_backend import chosen_fault
from forebay.ipc.errors import ServingError
from forebay.ipc.lifeline import PeerClosed
from forebay.ipc.worker_messages import InstanceSpec


def spec_of(**parameters: str) -> InstanceSpec:
    tensors: list[dict[str, Any]] = [{"data_type": "TYPE_FP32", "dims": [-1]}]
    config = {
        "backend": "forebay_fault",
        "input": [{"name": "IN", **tensors[0]}],
        "output": [{"name": "OUT", **tensors[0]}],
    }
    return spec_from_config(config, model="m", model_path="/nowhere", parameters=parameters)


def test_first_element_chooses() -> None:
    assert chosen_fault(np.array([-2.0])) == "error"
    assert chosen_fault(np.array([-2.5])) == ""
    assert chosen_fault(np.array([np.nan])) == ""
    assert chosen_fault(np.array([np.inf])) == ""
    assert chosen_fault(np.array([b"hang"], object)) == "hang"
    assert chosen_fault(np.zeros(0)) == ""


def test_it_needs_to_be_allowed() -> None:
    with (
        pytest.raises(ServingError, match=r"set FOREBAY_TEST_BACKENDS=1 to allow it$"),
        WorkerHarness(spec_of(), env={"FOREBAY_TEST_BACKENDS": ""}),
    ):
        pass


def test_faults_of_loading() -> None:
    with pytest.raises(ServingError, match=r"^injected load failure$"), WorkerHarness(spec_of(load_fault="error")):
        pass
    with pytest.raises(PeerClosed), WorkerHarness(spec_of(load_fault="exit")):
        pass


def test_delay_of_every_request() -> None:
    with WorkerHarness(spec_of(fault="delay", delay_ms="120")) as worker:
        start = time.monotonic()
        [response] = worker.infer({"IN": np.ones(1, np.float32)})
        assert response.outputs["OUT"].tolist() == [1]
        assert time.monotonic() - start >= 0.12


def test_hang_is_ended_from_outside() -> None:
    with WorkerHarness(spec_of()) as worker:
        worker.submit({"IN": np.array([-5], np.float32)})
        time.sleep(0.2)
        assert worker.process.poll() is None
        worker.process.kill()
        assert worker.process.wait(10) == -9
