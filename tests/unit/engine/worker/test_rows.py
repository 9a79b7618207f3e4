"""Slab rows in a real worker with ONNX Runtime: in place, gathered, failures, wrong numbers in messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from worker_harness import PRODUCER, WorkerHarness, spec_from_config

from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Code
from forebay.ipc.wire import HEADER, Kind, Run
from forebay.ipc.worker_messages import InstanceSpec

ALPHA = Path(__file__).parents[4] / "conf" / "models" / "alpha_model"


def alpha_spec(**overrides: Any) -> InstanceSpec:
    return spec_from_config(
        {
            "backend": "onnxruntime",
            "max_batch_size": 16,
            "input": [{"name": "features", "data_type": "TYPE_FP32", "dims": [50]}],
            "output": [{"name": "prediction", "data_type": "TYPE_FP32", "dims": [1]}],
        },
        model="alpha_model",
        model_path=str(ALPHA),
        rows_mode=True,
        **overrides,
    )


def expected(features: Any) -> Any:
    session = onnxruntime.InferenceSession(str(ALPHA / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {"features": features})[0]


def fill(worker: WorkerHarness, base: int, capacity: int) -> Any:
    features = np.random.default_rng(base).standard_normal((capacity, 50)).astype(np.float32)
    worker.area(base, capacity, "features")[:] = features
    return features


def test_consecutive_rows_run_where_they_lie() -> None:
    with WorkerHarness(alpha_spec()) as worker:
        base = worker.slab(32)
        features = fill(worker, base, 32)
        for first, rows in ((0, 1), (1, 16), (31, 1), (1, 16)):
            worker.send_runs(worker.run_of(base, 32, first, rows))
            answer = worker.runs_answer()
            assert answer.kind == Kind.RUNS_DONE
            assert (answer.runs[0].first, answer.runs[0].rows) == (first, rows)
            _batch, times = worker.wait_done()
            assert list(times) == sorted(times)
            got = worker.area(base, 32, "prediction")[first : first + rows]
            assert np.allclose(got, expected(features[first : first + rows]), atol=1e-6)
        # What nobody asked for was not touched.
        assert not worker.area(base, 32, "prediction")[17:31].any()
        assert worker.counter(InstanceCounter.GATHERED_BYTES) == 0
        assert worker.counter(InstanceCounter.INFERENCES) == 34
        assert worker.counter(InstanceCounter.EXECUTIONS) == 4


def test_scattered_rows_are_gathered_and_counted() -> None:
    with WorkerHarness(alpha_spec()) as worker:
        first_slab, second_slab = worker.slab(8), worker.slab(4)
        features = fill(worker, first_slab, 8)
        others = fill(worker, second_slab, 4)
        worker.send_runs(
            worker.run_of(first_slab, 8, 6, 2), worker.run_of(first_slab, 8, 0, 1), worker.run_of(second_slab, 4, 1, 3)
        )
        answer = worker.runs_answer()
        assert answer.error is None
        assert len(answer.runs) == 3
        predictions = worker.area(first_slab, 8, "prediction")
        assert np.allclose(predictions[[6, 7, 0]], expected(features[[6, 7, 0]]), atol=1e-6)
        assert np.allclose(worker.area(second_slab, 4, "prediction")[1:], expected(others[1:]), atol=1e-6)
        assert not predictions[1:6].any()
        worker.wait_done()
        assert worker.counter(InstanceCounter.GATHERED_BYTES) == 6 * 50 * 4
        assert worker.counter(InstanceCounter.SCATTERED_BYTES) == 6 * 4
        assert worker.counter(InstanceCounter.BATCHES_GATHERED) == 1


def test_counters_follow_triton_s_meanings() -> None:
    """H-234: durations are summed over requests; batch sizes by rows."""
    with WorkerHarness(alpha_spec()) as worker:
        base = worker.slab(8)
        fill(worker, base, 8)
        worker.send_runs(worker.run_of(base, 8, 0, 3))
        worker.runs_answer()
        worker.wait_done()
        assert worker.counter(InstanceCounter.SUCCESS) == 3
        assert worker.counter(InstanceCounter.QUEUE_NS) > 0
        assert worker.counters[InstanceCounter.BATCH_SIZES + 4 * 2] == 1
        infer_ns = worker.counters[InstanceCounter.BATCH_SIZES + 4 * 2 + 2]
        assert worker.counter(InstanceCounter.INFER_NS) == 3 * infer_ns


@pytest.mark.parametrize(
    "run",
    [
        Run(PRODUCER, 1, 1 << 40, 8, 0, 1, 0, 0),
        Run(PRODUCER, 1, 0, 8, 8, 1, 0, 0),
        Run(PRODUCER, 1, 0, 8, 7, 2, 0, 0),
        Run(PRODUCER, 1, 0, 8, 0, 0, 0, 0),
        Run(PRODUCER, 17, 0, 32, 0, 17, 0, 0),
        Run(PRODUCER, 1, 0, 0, 0, 1, 0, 0),
        Run(PRODUCER, 1, 0, 0xFFFFFFFF, 0, 1, 0, 0),
        Run(PRODUCER, 1, 0, 8, 0xFFFFFFFF, 1, 0, 0),
    ],
)
def test_wrong_numbers_fail_the_batch_and_nothing_else(run: Run) -> None:
    """I-2: base, capacity, rows and their number are checked against the arena and the model."""
    with WorkerHarness(alpha_spec()) as worker:
        base = worker.slab(8)
        fill(worker, base, 8)
        worker.send_runs(run)
        answer = worker.runs_answer()
        assert answer.kind == Kind.RUNS_FAILED
        assert answer.error is not None
        assert answer.error.code == Code.INTERNAL
        worker.wait_done()
        assert worker.counter(InstanceCounter.FAILED_OTHER) == run.requests
        # The same run among good ones.
        worker.send_runs(worker.run_of(base, 8, 0, 1), run)
        assert worker.runs_answer().kind == Kind.RUNS_FAILED
        worker.wait_done()
        worker.send_runs(worker.run_of(base, 8, 0, 1))
        assert worker.runs_answer().kind == Kind.RUNS_DONE


def test_run_of_an_unknown_producer_is_nobody_s() -> None:
    with WorkerHarness(alpha_spec()) as worker:
        base = worker.slab(8)
        fill(worker, base, 8)
        worker.send_runs(Run(99, 1, base, 8, 0, 1, 0, 0))
        worker.wait_done()
        worker.send_runs(worker.run_of(base, 8, 0, 1))
        assert worker.runs_answer().kind == Kind.RUNS_DONE


def test_short_message_is_survived() -> None:
    with WorkerHarness(alpha_spec()) as worker:
        base = worker.slab(8)
        fill(worker, base, 8)
        worker.send_raw(HEADER.pack(Kind.RUNS, 0, 2, 0, 1))
        worker.wait_done()
        worker.send_runs(worker.run_of(base, 8, 0, 1))
        assert worker.runs_answer().kind == Kind.RUNS_DONE


def fault_rows(worker_value: float) -> tuple[InstanceSpec, Any]:
    spec = spec_from_config(
        {
            "backend": "forebay_fault",
            "max_batch_size": 4,
            "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": [2]}],
            "output": [{"name": "OUT", "data_type": "TYPE_FP32", "dims": [2]}],
        },
        model="m",
        model_path="/nowhere",
        rows_mode=True,
    )
    return spec, np.array([[worker_value, 0]], np.float32)


@pytest.mark.parametrize("value", [-2, -6, -7, -8])
def test_failure_of_the_backend_is_said_to_every_producer(value: float) -> None:
    spec, row = fault_rows(value)
    with WorkerHarness(spec) as worker:
        base = worker.slab(4)
        worker.area(base, 4, "IN")[0] = row
        worker.send_runs(worker.run_of(base, 4, 0, 1))
        answer = worker.runs_answer()
        assert answer.error is not None
        worker.wait_done()
        worker.area(base, 4, "IN")[0] = 3
        worker.send_runs(worker.run_of(base, 4, 0, 1))
        assert worker.runs_answer().error is None
        assert worker.area(base, 4, "OUT")[0].tolist() == [3, 3]


def test_rows_of_a_lost_producer_are_forgotten() -> None:
    with WorkerHarness(alpha_spec()) as worker:
        base = worker.slab(8)
        fill(worker, base, 8)
        worker.send_runs(worker.run_of(base, 8, 0, 1))
        worker.runs_answer()
        worker.wait_done()
        worker.drop_producer()
        worker.send_runs(worker.run_of(base, 8, 0, 1))
        worker.wait_done()
        assert worker.process.poll() is None


def test_large_scattered_rows_run_where_they_lie() -> None:
    """On a CPU copying them together would cost more than further calls."""
    dims = [40_000]
    config = {
        "backend": "forebay_fault",
        "max_batch_size": 8,
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": dims}],
        "output": [{"name": "OUT", "data_type": "TYPE_FP32", "dims": dims}],
    }
    with WorkerHarness(spec_from_config(config, model="m", model_path="/nowhere", rows_mode=True)) as worker:
        base = worker.slab(4)
        worker.area(base, 4, "IN")[:] = np.arange(4, dtype=np.float32)[:, np.newaxis]
        worker.send_runs(worker.run_of(base, 4, 2, 2), worker.run_of(base, 4, 0, 1))
        assert worker.runs_answer().error is None
        assert worker.area(base, 4, "OUT")[:, 0].tolist() == [0, 0, 2, 3]
        worker.wait_done()
        assert worker.counter(InstanceCounter.GATHERED_BYTES) == 0
        assert worker.counter(InstanceCounter.EXECUTIONS) == 1
        assert worker.counter(InstanceCounter.INFERENCES) == 3
