"""Parcels in a real worker: joining, failures, blocks, wrong numbers in messages."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from worker_harness import PRODUCER, WorkerHarness, spec_from_config

from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Code
from forebay.ipc.messages import ParcelHead, TensorPlace
from forebay.ipc.wire import HEADER, PARCEL, TOKEN, Kind
from forebay.ipc.worker_messages import InstanceSpec


def fault_spec(
    data_type: str = "TYPE_FP32", dims: tuple[int, ...] = (-1,), max_batch_size: int = 0, **overrides: Any
) -> InstanceSpec:
    config = {
        "backend": "forebay_fault",
        "max_batch_size": max_batch_size,
        "input": [{"name": "IN", "data_type": data_type, "dims": list(dims)}],
        "output": [{"name": "OUT", "data_type": data_type, "dims": list(dims)}],
    }
    return spec_from_config(config, model="m", model_path="/nowhere", **overrides)


def row(*values: float) -> np.ndarray[Any, Any]:
    return np.array([values], np.float32)


def test_requests_of_a_batch_are_joined_and_split_again() -> None:
    with WorkerHarness(fault_spec(max_batch_size=8)) as worker:
        tokens = worker.submit({"IN": row(1, 2)}, {"IN": np.array([[3, 4], [5, 6]], np.float32)}, {"IN": row(7, 8)})
        outputs = {r.token: r.outputs["OUT"].tolist() for r in worker.responses(*tokens)}
        assert [outputs[token] for token in tokens] == [[[1, 2]], [[3, 4], [5, 6]], [[7, 8]]]
        worker.wait_done()
        assert worker.reply_kinds == [Kind.PARCEL_REPLIES], "the cost is per batch, not per request (I-3)"
        assert worker.counter(InstanceCounter.EXECUTIONS) == 1
        assert worker.counter(InstanceCounter.INFERENCES) == 4
        assert worker.counter(InstanceCounter.SUCCESS) == 3
        assert worker.counter(InstanceCounter.GATHERED_BYTES) == 4 * 2 * 4


def test_requests_that_warm_up_are_not_counted() -> None:
    """Spec C-115."""
    with WorkerHarness(fault_spec(max_batch_size=8), counted=False) as worker:
        tokens = worker.submit({"IN": row(1, 2)}, {"IN": row(3, 4)})
        assert [r.outputs["OUT"].tolist() for r in worker.responses(*tokens)] == [[[1, 2]], [[3, 4]]]
        worker.wait_done()
        counted = InstanceCounter.EXECUTIONS, InstanceCounter.INFERENCES, InstanceCounter.SUCCESS
        assert [worker.counter(counter) for counter in counted] == [0, 0, 0]


def test_strings_are_joined() -> None:
    with WorkerHarness(fault_spec("TYPE_STRING", max_batch_size=8)) as worker:
        tokens = worker.submit(*({"IN": np.array([[text]], object)} for text in ("a", "", "é\0")))
        outputs = {r.token: r.outputs["OUT"].tolist() for r in worker.responses(*tokens)}
        assert [outputs[token] for token in tokens] == [[[b"a"]], [[b""]], [["é\0".encode()]]]


def test_requests_that_do_not_fit_together_run_one_by_one() -> None:
    """The scheduler does not send such batches; a worker survives them all the same."""
    with WorkerHarness(fault_spec(max_batch_size=8)) as worker:
        tokens = worker.submit({"IN": row(1, 2)}, {"IN": row(1, 2, 3)})
        outputs = {r.token: r.outputs["OUT"].tolist() for r in worker.responses(*tokens)}
        assert [outputs[token] for token in tokens] == [[[1, 2]], [[1, 2, 3]]]


def test_one_broken_string_tensor_fails_alone() -> None:
    with WorkerHarness(fault_spec("TYPE_STRING", max_batch_size=8)) as worker:
        good, bad = worker.submit({"IN": np.array([["a"]], object)}, {"IN": ("BYTES", (1, 1), b"\xff\0\0\0a")})
        answers = {r.token: r for r in worker.responses(good, bad)}
        assert answers[good].outputs["OUT"].tolist() == [[b"a"]]
        error = answers[bad].error
        assert error is not None
        assert error.code == Code.INVALID_ARG


def test_known_output_shapes_are_written_in_place() -> None:
    with WorkerHarness(fault_spec(dims=(3,))) as worker:
        for _ in range(2):
            [response] = worker.infer({"IN": np.array([1, 2, 3], np.float32)})
            assert response.in_place
            assert response.outputs["OUT"].tolist() == [1, 2, 3]
        assert worker.counter(InstanceCounter.SCATTERED_BYTES) == 0


def test_small_output_without_a_block_travels_in_the_message() -> None:
    with WorkerHarness(fault_spec()) as worker:
        [response] = worker.infer({"IN": np.array([1, 2, 3], np.float32)}, reply_bytes=0)
        assert response.outputs["OUT"].tolist() == [1, 2, 3]


def test_large_output_waits_for_a_block_while_others_are_served() -> None:
    with WorkerHarness(fault_spec()) as worker:
        large = np.arange(50_000, dtype=np.float32)
        [token] = worker.submit({"IN": large}, reply_bytes=64)
        asked = worker.next_response(lend=False)
        assert (asked.token, asked.final, asked.outputs) == (token, False, {})
        [other] = worker.infer({"IN": np.array([1], np.float32)})
        assert other.outputs["OUT"].tolist() == [1]
        # Too small: it says again what it needs. Then the block.
        worker.collect(token, worker.blocks.allocate(64), 64)
        assert worker.next_response(lend=False).token == token
        worker.collect(token, worker.blocks.allocate(large.nbytes), large.nbytes)
        answer = worker.next_response()
        assert answer.final
        assert np.array_equal(answer.outputs["OUT"], large)


def test_producer_without_room_ends_the_request() -> None:
    with WorkerHarness(fault_spec()) as worker:
        [token] = worker.submit({"IN": np.zeros(50_000, np.float32)}, reply_bytes=0)
        worker.next_response(lend=False)
        worker.collect(token, 0, 0)
        answer = worker.next_response()
        assert answer.final
        assert answer.error is not None
        assert answer.error.code == Code.UNAVAILABLE


def test_cancelled_response_gets_a_last_word() -> None:
    with WorkerHarness(fault_spec()) as worker:
        [token] = worker.submit({"IN": np.zeros(50_000, np.float32)}, reply_bytes=0)
        worker.next_response(lend=False)
        worker.cancel(token)
        answer = worker.next_response()
        assert answer.final
        assert answer.error is not None
        assert answer.error.code == Code.CANCELLED


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-2, "injected failure"),
        (-6, "model 'm' produced output 'OUT' as float32 [1, 1], but its configuration promises FP32 [-1]"),
        (-7, "model 'm' produced output 'OUT' as int16 [1], but its configuration promises FP32 [-1]"),
        (-8, "model 'm' did not produce output 'OUT'"),
    ],
)
def test_what_the_backend_did_wrong_is_said(value: int, text: str) -> None:
    """L-022."""
    with WorkerHarness(fault_spec()) as worker:
        [response] = worker.infer({"IN": np.array([value], np.float32)})
        assert response.error is not None
        assert (response.error.code, response.error.text) == (Code.INTERNAL, text)
        assert worker.counter(InstanceCounter.FAILED_BACKEND) == 1
        [response] = worker.infer({"IN": np.array([1], np.float32)})
        assert response.error is None


@pytest.mark.parametrize(("value", "status"), [(-3, 3), (-4, -11)])
def test_crash_ends_the_worker(value: int, status: int) -> None:
    with WorkerHarness(fault_spec()) as worker:
        worker.submit({"IN": np.array([value], np.float32)})
        assert worker.process.wait(30) == status


def places(*values: TensorPlace) -> tuple[TensorPlace, ...]:
    return values


@pytest.mark.parametrize(
    "head",
    [
        ParcelHead(places(TensorPlace("IN", "FP32", (4,), 1 << 40, 16)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "FP32", (4,), 0, 15)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "FP32", (4,), -64, 16)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "FP32", (1 << 40, 1 << 40), 0, 16)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "FP32", (-4,), 0, 16)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "COMPLEX", (4,), 0, 16)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "FP32", (4,), 0, 16, arena=99)), 0, 0),
        ParcelHead(places(TensorPlace("IN", "FP32", (4,), 0, 16)), 1 << 40, 64),
        ParcelHead(places(), 0, 0),
    ],
)
def test_wrong_numbers_fail_the_request_and_nothing_else(head: ParcelHead) -> None:
    """I-2: whatever a message says is checked."""
    with WorkerHarness(fault_spec()) as worker:
        token = 1_000
        worker._heads[token] = head  # pyright: ignore[reportPrivateUsage]
        raw = msgspec.msgpack.encode(head)
        worker.send_raw(HEADER.pack(Kind.PARCELS, 0, 1, 0, 1) + PARCEL.pack(PRODUCER, 1, token, 0, len(raw)) + raw)
        answer = worker.next_response()
        assert answer.final
        assert answer.error is not None
        worker.wait_done()
        [response] = worker.infer({"IN": np.array([1], np.float32)})
        assert response.error is None


def test_garbage_on_the_doorbell_is_survived() -> None:
    with WorkerHarness(fault_spec()) as worker:
        parcels = HEADER.pack(Kind.PARCELS, 0, 3, 0, 1)
        for message in (
            b"\x02",
            parcels,
            parcels + PARCEL.pack(12345, 1, 1, 0, 0),
            HEADER.pack(Kind.COLLECT, 0, 1, PRODUCER, 0) + b"\1",
            HEADER.pack(Kind.CANCEL, 0, 60_000, PRODUCER, 0) + TOKEN.pack(5),
            HEADER.pack(99, 0, 1, 0, 0),
        ):
            worker.send_raw(message)
        worker.send_raw(HEADER.pack(Kind.PARCELS, 0, 1, 0, 2) + PARCEL.pack(PRODUCER, 1, 77, 0, 3) + b"\xc1\xc1\xc1")
        worker._heads[77] = ParcelHead((), 0, 0)  # pyright: ignore[reportPrivateUsage]
        unreadable = worker.next_response()
        assert unreadable.token == 77
        assert unreadable.error is not None
        # The two batches above and the unreadable one are reported as done.
        for _ in range(3):
            worker.wait_done()
        [response] = worker.infer({"IN": np.array([1], np.float32)})
        assert response.error is None


def test_lent_place_outside_the_arena_ends_only_the_request() -> None:
    with WorkerHarness(fault_spec()) as worker:
        [token] = worker.submit({"IN": np.zeros(50_000, np.float32)}, reply_bytes=0)
        worker.next_response(lend=False)
        worker.collect(token, 1 << 50, 1 << 20)
        worker.wait_done()
        [response] = worker.infer({"IN": np.array([1], np.float32)})
        assert response.error is None
