"""Nested calls (BLS) of one form: rows are kept ready for the next of them, and nobody else's answer is in them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from forebay_server import ForebayServer, wait_until

from forebay.client.connection import Connection
from forebay.engine.backends.python_model.engine_access import NestedRequest, NestedResponse
from forebay.engine.backends.python_model.shm_access import ShmEngineAccess
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.ipc.errors import ServingError

#: Rows of so many values are larger than what is kept ready.
WIDE = 65536

Array = npt.NDArray[np.float32]

#: Its outputs are its inputs.
MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        values = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", values)])
"""


def write_model(repository: Path, name: str, length: int, *, batch: int = 8) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    tensor = f'[ {{ name: "%s" data_type: TYPE_FP32 dims: [ {length} ] }} ]'
    (repository / name / "config.pbtxt").write_text(
        f'backend: "python"\nmax_batch_size: {batch}\n'
        f"input {tensor % 'INPUT0'}\noutput {tensor % 'OUTPUT0'}\ninstance_group [ {{ kind: KIND_CPU }} ]\n"
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForebayServer]:
    write_model(tmp_path, "row", 4)
    write_model(tmp_path, "flat", 4, batch=0)
    write_model(tmp_path, "wide", WIDE)
    flags = ("--model-control-mode=explicit", "--load-model=*")
    with ForebayServer(tmp_path, *flags, protocols=("http",)) as running:
        yield running


@pytest.fixture
def access(server: ForebayServer) -> Iterator[ShmEngineAccess]:
    """A worker's way to other models, in this process."""
    made = ShmEngineAccess(str(next(server.runtime_base.iterdir())))
    yield made
    made.close()


def ask(access: ShmEngineAccess, model: str, values: Array, outputs: tuple[str, ...] = ()) -> NestedResponse:
    inputs = (Tensor("INPUT0", values),)
    call = access.infer(NestedRequest(model, -1, "", inputs, outputs, {}, 0, 0, 0, None, False))
    call.wait()
    (response,) = call.take()
    return response


def rows(*firsts: float, length: int = 4) -> Array:
    return np.repeat(np.array(firsts, np.float32)[:, np.newaxis], length, axis=1)


def is_refused(access: ShmEngineAccess, values: Array) -> bool:
    try:
        return ask(access, "row", values).error is not None
    except ServingError:
        return True


def connection_of(access: ShmEngineAccess) -> Connection:
    connection = access.connection
    assert connection is not None
    return connection


def live_rows(access: ShmEngineAccess, model: str) -> int:
    connection = connection_of(access)
    _ = connection.used_bytes  # Takes back what was dropped.
    return sum(slab.live for slab in connection.open_model(model).slabs)


@pytest.mark.parametrize(("model", "values"), [("row", rows(1, 2)), ("flat", rows(3)[0])])
def test_answers_that_are_kept_are_never_written_again(access: ShmEngineAccess, model: str, values: Array) -> None:
    kept = [ask(access, model, values + number).outputs[0].data for number in range(100)]
    for number, answer in enumerate(kept):
        np.testing.assert_array_equal(answer, values + number)


def test_one_request_s_rows_are_kept_ready_and_no_more(access: ShmEngineAccess) -> None:
    for number in range(20):
        assert ask(access, "row", rows(number, number)).error is None
    assert live_rows(access, "row") == 2
    assert ask(access, "row", rows(1)).error is None
    assert live_rows(access, "row") == 3, "another number of rows is another form"


def test_large_rows_are_not_kept(access: ShmEngineAccess) -> None:
    for number in range(3):
        response = ask(access, "wide", rows(number, length=WIDE))
        np.testing.assert_array_equal(response.outputs[0].data, rows(number, length=WIDE))
        del response
    assert live_rows(access, "wide") == 0


def test_wanted_outputs_are_part_of_the_form(access: ShmEngineAccess) -> None:
    assert [tensor.name() for tensor in ask(access, "row", rows(1), outputs=("OUTPUT0",)).outputs] == ["OUTPUT0"]
    assert [tensor.name() for tensor in ask(access, "row", rows(1)).outputs] == ["OUTPUT0"]
    with pytest.raises(Exception, match="OUTPUT7"):
        ask(access, "row", rows(1), outputs=("OUTPUT7",))


def test_threads_share_no_rows(access: ShmEngineAccess) -> None:
    wrong: list[object] = []

    def call(thread: int) -> None:
        for number in range(200):
            values = rows(1000 * thread + number)
            response = ask(access, "row", values)
            if response.error is not None or not np.array_equal(response.outputs[0].data, values):
                wrong.append((thread, number, response))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert live_rows(access, "row") == 1


def test_a_model_of_another_signature_is_called_in_rows_of_its_own(access: ShmEngineAccess, tmp_path: Path) -> None:
    assert ask(access, "row", rows(1)).error is None
    connection = connection_of(access)
    model = connection.open_model("row")
    (former,) = model.slabs
    write_model(tmp_path, "row", 6)
    access.load_model("row", "", {})
    # The connection hears of it with one of the next requests, which does not fit any more.
    wait_until(lambda: is_refused(access, rows(1)), "the new signature")
    response = ask(access, "row", rows(1, length=6))
    np.testing.assert_array_equal(response.outputs[0].data, rows(1, length=6))
    del response
    gc.collect()  # What refused the request holds on to it.
    assert former not in model.slabs
    _ = connection.used_bytes
    assert connection.memory.slab(former.base) is not former, "what was kept ready has kept the slab"


def test_nothing_is_kept_of_a_connection_that_was_closed(access: ShmEngineAccess) -> None:
    answer = ask(access, "row", rows(5)).outputs[0].data
    connection = connection_of(access)
    model = connection.open_model("row")
    access.close()
    assert connection.loan_rows_now(model, 1) is None
    np.testing.assert_array_equal(answer, rows(5))
    assert ask(access, "row", rows(6)).error is None
