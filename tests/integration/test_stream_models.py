"""Decoupled models of the repeat and square backends, as clients of gRPC streams see them (spec B-083)."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import PATIENCE_S, ForebayServer

REPEAT = """
backend: "repeat"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] },
        { name: "DELAY" data_type: TYPE_UINT32 dims: [ -1 ] },
        { name: "WAIT" data_type: TYPE_UINT32 dims: [ 1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }, { name: "IDX" data_type: TYPE_UINT32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""

SQUARE = """
backend: "square"
max_batch_size: 8
model_transaction_policy { decoupled: true }
dynamic_batching { }
input [ { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("stream") / "models"
    for name, config in (("repeat_int32", REPEAT), ("square_int32", SQUARE)):
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(config)
    with ForebayServer(models, protocols=("grpc", "http")) as running:
        yield running


class Stream:
    """One gRPC stream; takes what comes in order."""

    def __init__(self, server: ForebayServer) -> None:
        self._client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: self._answers.put((result, error)))

    def ask(self, model: str, request_id: str, **inputs: np.ndarray[Any, np.dtype[Any]]) -> None:
        tensors: list[Any] = []
        for name, array in inputs.items():
            tensor = grpcclient.InferInput(name, array.shape, "INT32" if array.dtype == np.int32 else "UINT32")
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        self._client.async_stream_infer(model, tensors, request_id=request_id, enable_empty_final_response=True)

    def take_until_final(self, count: int = 1) -> list[tuple[str, Any]]:
        """Return (request id, result) of each response with tensors until ``count`` requests have ended."""
        taken: list[tuple[str, Any]] = []
        while count:
            result, error = self._answers.get(timeout=PATIENCE_S)
            assert error is None, error
            response = result.get_response()
            if response.outputs:
                taken.append((response.id, result))
            count -= response.parameters["triton_final_response"].bool_param
        return taken

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream()
        self._client.close()


def uints(*values: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.array(values, np.uint32)


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def test_repeat_sends_one_response_for_each_element(server: ForebayServer) -> None:
    with Stream(server) as stream:
        stream.ask("repeat_int32", "a", IN=ints(4, 2, 0, 1), DELAY=uints(1, 2, 3, 4), WAIT=uints(5))
        taken = [result for _id, result in stream.take_until_final()]
        assert [int(result.as_numpy("OUT")[0]) for result in taken] == [4, 2, 0, 1]
        assert [int(result.as_numpy("IDX")[0]) for result in taken] == [0, 1, 2, 3]


def test_repeat_of_nothing_has_an_empty_final_response_only(server: ForebayServer) -> None:
    with Stream(server) as stream:
        stream.ask("repeat_int32", "a", IN=ints(), DELAY=uints(), WAIT=uints(0))
        assert stream.take_until_final() == []


def test_a_short_wait_lets_the_next_request_overtake(server: ForebayServer) -> None:
    """One instance, two requests under way at once: WAIT is less than the sum of DELAY."""
    with Stream(server) as stream:
        stream.ask("repeat_int32", "slow", IN=ints(1, 2), DELAY=uints(0, 1500), WAIT=uints(0))
        stream.ask("repeat_int32", "fast", IN=ints(7), DELAY=uints(0), WAIT=uints(0))
        order = [request_id for request_id, _result in stream.take_until_final(2)]
        assert order == ["slow", "fast", "slow"]


def test_square_sends_its_input_as_often_as_it_says(server: ForebayServer) -> None:
    with Stream(server) as stream:
        stream.ask("square_int32", "a", IN=ints(4).reshape(1, 1))
        taken = [result.as_numpy("OUT").tolist() for _id, result in stream.take_until_final()]
        assert taken == [[[4]]] * 4
