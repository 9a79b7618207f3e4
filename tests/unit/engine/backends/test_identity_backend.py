"""The identity backend in a real worker process (spec B-082)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.backends.identity_backend import check_pairs
from forebay.ipc.errors import Code, InvalidArgument, ServingError
from forebay.ipc.tensor import DATATYPES

PARAMETERS = {"param0": "an example string parameter", "param1": 42, "param2": False, "param3": 123.123}


def config(*data_types: str, max_batch_size: int = 0, optional: bool = False, **extra: Any) -> dict[str, Any]:
    return {
        "backend": "identity",
        "max_batch_size": max_batch_size,
        "input": [
            {"name": f"INPUT{index}", "data_type": name, "dims": [-1], "optional": optional and index > 0}
            for index, name in enumerate(data_types)
        ],
        "output": [
            {"name": f"OUTPUT{index}", "data_type": name, "dims": [-1]} for index, name in enumerate(data_types)
        ],
        **extra,
    }


def test_every_datatype_and_zero_elements_come_back_as_they_went() -> None:
    """E-105..E-114: values, response parameters, zero-size tensors."""
    names = list(DATATYPES)
    spec = spec_from_config(
        config(*(DATATYPES[name].config_name for name in names)), model="id_all", model_path="/nowhere"
    )
    raw = {
        name: (name, (3,), b"\x01\0\0\0a\0\0\0\0\x02\0\0\0\xff\0" if name == "BYTES" else bytes(range(24))[: 3 * size])
        for name, size in ((name, DATATYPES[name].item_bytes) for name in names)
    }
    with WorkerHarness(spec) as worker:
        [response] = worker.infer({f"INPUT{index}": raw[name] for index, name in enumerate(names)})
        assert response.error is None
        assert response.parameters == PARAMETERS
        for index, name in enumerate(names):
            output = response.outputs[f"OUTPUT{index}"]
            assert response.datatypes[f"OUTPUT{index}"] == name
            if name == "BYTES":
                assert output.tolist() == [b"a", b"", b"\xff\0"]
            else:
                assert output.tobytes() == raw[name][2]
        [empty] = worker.infer(
            {f"INPUT{index}": (name, (0,), b"") for index, name in enumerate(names)}, outputs=("OUTPUT3", "OUTPUT12")
        )
        assert {name: array.shape for name, array in empty.outputs.items()} == {"OUTPUT3": (0,), "OUTPUT12": (0,)}


def test_output_without_its_optional_input_fails_with_tritons_text() -> None:
    """E-034; asked only for what can be answered, the request succeeds."""
    spec = spec_from_config(
        config("TYPE_FP32", "TYPE_STRING", max_batch_size=4, optional=True), model="m", model_path="/nowhere"
    )
    with WorkerHarness(spec) as worker:
        row = np.ones((1, 3), np.float32)
        [response] = worker.infer({"INPUT0": row})
        assert response.error is not None
        assert (response.error.code, response.error.text) == (
            Code.INTERNAL,
            "failed to reserve 18446744073709551615 bytes in output tensor buffer",
        )
        [response] = worker.infer({"INPUT0": row}, outputs=("OUTPUT0",))
        assert np.array_equal(response.outputs["OUTPUT0"], row)


def test_execute_delay_holds_the_whole_batch_once() -> None:
    spec = spec_from_config(
        config("TYPE_INT32", max_batch_size=8, parameters={"execute_delay_ms": {"string_value": "150"}}),
        model="m",
        model_path="/nowhere",
    )
    with WorkerHarness(spec) as worker:
        tokens = worker.submit(*({"INPUT0": np.array([[value]], np.int32)} for value in range(3)))
        responses = worker.responses(*tokens)
        assert [int(response.outputs["OUTPUT0"][0, 0]) for response in responses] == [0, 1, 2]
        _batch, (start_ns, _input_end, _output_start, end_ns) = worker.wait_done()
        assert end_ns - start_ns >= 150_000_000


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        (["INPUT0", "INPUT1"], ["OUTPUT0"], "model configuration must have equal input/output pairs"),
        (["IN"], ["OUTPUT0"], "expected input name to follow INPUT<index> pattern, got 'IN'"),
        (["INPUT0"], ["OUT"], "expected output name to follow OUTPUT<index> pattern, got 'OUT'"),
    ],
)
def test_wrong_pairs_fail_to_load_with_tritons_texts(inputs: list[str], outputs: list[str], text: str) -> None:
    """E-013."""

    def tensors(names: list[str]) -> list[dict[str, Any]]:
        return [{"name": name, "data_type": "TYPE_FP32", "dims": [1]} for name in names]

    spec = spec_from_config(
        {"backend": "identity", "input": tensors(inputs), "output": tensors(outputs)}, model="m", model_path="/nowhere"
    )
    with pytest.raises(InvalidArgument, match=r".") as caught:
        check_pairs(spec)
    assert caught.value.text == text
    with pytest.raises(ServingError) as from_worker, WorkerHarness(spec):
        pass
    assert (from_worker.value.code, from_worker.value.text) == (Code.INVALID_ARG, text)
