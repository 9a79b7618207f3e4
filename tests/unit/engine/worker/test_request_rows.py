"""Slab rows of a Python model in a real worker: each request for itself, as if it had come alone (spec section 7).

All of it twice: by Python alone, and by way of the lane, which takes rows that have run before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_harness import PRODUCER, RunsAnswer, WorkerHarness, spec_from_config

from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Code
from forebay.ipc.wire import Kind, Run

MODELS = Path(__file__).parents[3] / "data" / "python_models"
CONFIG = {
    "backend": "python",
    "max_batch_size": 8,
    "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": [4]}],
    "output": [
        {"name": "OUT", "data_type": "TYPE_FP32", "dims": [4]},
        {"name": "ABOUT", "data_type": "TYPE_INT32", "dims": [3]},
    ],
}
CAPACITY = 16


class Slab:
    """The worker and one slab of it."""

    def __init__(self, worker: WorkerHarness) -> None:
        self.worker = worker
        self.base = worker.slab(CAPACITY)
        self.given = worker.area(self.base, CAPACITY, "IN")
        self.out = worker.area(self.base, CAPACITY, "OUT")
        self.about = worker.area(self.base, CAPACITY, "ABOUT")
        self.given[:] = np.arange(CAPACITY * 4, dtype=np.float32).reshape(CAPACITY, 4) + 1
        self.out[:] = 0

    def run_of(self, first: int, rows: int, *, each: int = 1) -> Run:
        return self.worker.run_of(self.base, CAPACITY, first, rows, each=each)

    def run(self, *runs: Run) -> RunsAnswer:
        self.worker.send_runs(*runs)
        answer = self.worker.runs_answer()
        self.worker.wait_done()
        return answer

    def run_everything_once(self) -> None:
        for first, each, requests in itertools.product(range(CAPACITY - 4), (1, 2, 3), (1, 2, 3)):
            if each * requests <= min(4, CAPACITY - first):
                self.run(self.run_of(first, each * requests, each=each))


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerHarness]:
    with WorkerHarness(spec_from_config(CONFIG, model="rows", model_path=str(MODELS / "rows"))) as running:
        yield running


@pytest.fixture(params=["new", "known"])
def slab(request: pytest.FixtureRequest, worker: WorkerHarness) -> Slab:
    """Rows that the worker has never seen, or has run already."""
    slab = Slab(worker)
    if request.param == "known":
        slab.run_everything_once()
        slab.out[:] = 0
    return slab


def test_every_request_of_a_run_is_a_request_of_its_own(slab: Slab) -> None:
    """P-006, P-030..P-037, P-053: nothing but tensors, and what is absent looks as it does in a parcel."""
    answer = slab.run(slab.run_of(2, 3))
    assert answer.kind is Kind.RUNS_DONE
    assert not answer.remarks
    np.testing.assert_array_equal(slab.out[2:5], slab.given[2:5] * 2)
    assert slab.about[2:5].tolist() == [[3, 1, 1]] * 3
    assert not slab.out[5:].any()


def test_requests_of_several_rows_stay_whole(slab: Slab) -> None:
    slab.run(slab.run_of(0, 4, each=2), slab.run_of(8, 3, each=3))
    assert slab.about[0:4].tolist() == [[3, 2, 1]] * 4
    assert slab.about[8:11].tolist() == [[3, 3, 1]] * 3
    np.testing.assert_array_equal(slab.out[8:11], slab.given[8:11] * 2)


def test_rows_that_are_no_whole_requests_are_refused(slab: Slab) -> None:
    answer = slab.run(slab.run_of(0, 4)._replace(requests=3))
    assert answer.kind is Kind.RUNS_FAILED


@pytest.mark.parametrize(
    ("ask", "code", "text"),
    [
        (-1, Code.NOT_FOUND, "not this one"),
        (-3, Code.INTERNAL, "model 'rows' produced output 'OUT' as FP32 [1, 2], but its configuration promises FP32 "),
        (-4, Code.INTERNAL, "model 'rows' produced output 'OUT' as FP64 [1, 4], but its configuration promises FP32 "),
        (-5, Code.INTERNAL, "model 'rows' did not produce output 'OUT', but 'ABOUT'"),
    ],
)
def test_a_request_that_fails_fails_alone(slab: Slab, ask: int, code: Code, text: str) -> None:
    """P-009; outputs are compared with the configuration (unlike P-019)."""
    failed_before = slab.worker.counter(InstanceCounter.FAILED_BACKEND)
    done_before = slab.worker.counter(InstanceCounter.SUCCESS)
    slab.given[1, 0] = ask
    answer = slab.run(slab.run_of(0, 3))
    assert answer.kind is Kind.RUNS_DONE
    [remark] = answer.remarks
    assert (remark.run, remark.first, remark.code) == (0, 1, code)
    assert remark.text.startswith(text)
    np.testing.assert_array_equal(slab.out[0], slab.given[0] * 2)
    np.testing.assert_array_equal(slab.out[2], slab.given[2] * 2)
    assert slab.worker.counter(InstanceCounter.FAILED_BACKEND) == failed_before + 1
    assert slab.worker.counter(InstanceCounter.SUCCESS) == done_before + 2


@pytest.mark.parametrize(("ask", "what"), [(-2, "ValueError: bad thing"), (-11, "SystemExit: 4")])
def test_an_exception_fails_the_whole_batch(slab: Slab, ask: int, what: str) -> None:
    """P-008: also one that would end the process."""
    slab.given[1, 0] = ask
    answer = slab.run(slab.run_of(0, 3))
    assert answer.kind is Kind.RUNS_FAILED
    assert answer.error is not None
    assert answer.error.text.startswith(
        f"Failed to process the request(s) for model 'rows_0_0', message: {what}\n\nAt:\n  rows/1/model.py("
    )


def test_response_parameters_come_as_a_remark(slab: Slab) -> None:
    """P-070"""
    slab.given[1, 0] = -6
    answer = slab.run(slab.run_of(0, 2))
    [remark] = answer.remarks
    assert (remark.first, remark.text, remark.parameters) == (1, "", {"seen": 1, "by": "rows"})
    np.testing.assert_array_equal(slab.out[1], slab.given[1])


def test_an_output_that_is_made_in_its_rows_is_not_copied(slab: Slab) -> None:
    slab.given[0, 0] = -7
    before = slab.worker.counter(InstanceCounter.SCATTERED_BYTES)
    slab.run(slab.run_of(0, 1))
    np.testing.assert_array_equal(slab.out[0], slab.given[0] * 2)
    assert slab.worker.counter(InstanceCounter.SCATTERED_BYTES) == before + slab.about[0].nbytes


def test_a_hidden_response_sender_is_waited_for(slab: Slab) -> None:
    """P-038, P-077"""
    slab.given[1, 0] = -8
    answer = slab.run(slab.run_of(0, 2))
    assert answer.kind is Kind.RUNS_DONE
    np.testing.assert_array_equal(slab.out[:2], slab.given[:2] * 2)


def test_a_running_model_hears_that_a_client_has_left(slab: Slab) -> None:
    """P-039"""
    slab.given[0, 0] = -9
    slab.worker.send_runs(slab.run_of(0, 1))
    slab.worker.cancel_rows(slab.base, 0)
    assert slab.worker.runs_answer().kind is Kind.RUNS_DONE
    slab.worker.wait_done()


def test_a_model_that_reshapes_its_input_in_place_spoils_nobody_s(slab: Slab) -> None:
    slab.given[0, 0] = -10
    [remark] = slab.run(slab.run_of(0, 1)).remarks
    assert "produced output 'OUT' as FP32 [4, 1]" in remark.text
    slab.given[0, 0] = 1
    assert not slab.run(slab.run_of(0, 1)).remarks


def test_rows_of_a_producer_that_is_gone_are_left_alone(slab: Slab) -> None:
    answer = slab.run(slab.run_of(0, 1)._replace(producer=PRODUCER + 1), slab.run_of(1, 1))
    assert [run.first for run in answer.runs] == [1]
    assert slab.about[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("rows", {**CONFIG, "parameters": {"FOREBAY_CHECK_OUTPUTS": {"string_value": "no"}}}),
        (
            "waiting",
            {
                "backend": "python",
                "input": [{"name": "PARTY", "data_type": "TYPE_INT32", "dims": [1]}],
                "output": [{"name": "PRESENT", "data_type": "TYPE_INT32", "dims": [1]}],
            },
        ),
        (
            "repeat",
            {
                "backend": "python",
                "model_transaction_policy": {"decoupled": True},
                "input": [{"name": "IN", "data_type": "TYPE_INT32", "dims": [1]}],
                "output": [{"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]}],
            },
        ),
    ],
)
def test_models_that_answer_late_or_unlike_their_configuration_want_parcels(model: str, config: dict[str, Any]) -> None:
    with WorkerHarness(spec_from_config(config, model=model, model_path=str(MODELS / model)), load=False) as worker:
        assert worker.load().wants_parcels


def test_models_of_fixed_shapes_that_answer_in_time_want_rows() -> None:
    spec = spec_from_config(CONFIG, model="rows", model_path=str(MODELS / "rows"), rows_mode=True)
    with WorkerHarness(spec, load=False) as worker:
        assert not worker.load().wants_parcels
