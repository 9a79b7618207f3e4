"""Warm-up in real workers: what the model sees, how it fails, what is counted (spec C-110..C-116)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.engine.repository.model_spec import (
    ControlSpec,
    SequenceBatchingSpec,
    StateSpec,
    WarmupInputSpec,
    WarmupSpec,
)
from forebay.engine.worker.model_data import TENSOR_BYTES_MAX
from forebay.engine.worker.warmup import tensor_array, tensor_bytes
from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Internal, InvalidArgument, ServingError
from forebay.ipc.worker_messages import InstanceSpec

#: Writes each execution to a file as a list of requests; echoes IN.
RECORDING_MODEL = """
import json, os
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.path = os.path.join(args["model_repository"], "calls")

    def execute(self, requests):
        calls = [
            {"id": r.request_id(), "corrid": r.correlation_id(), "flags": r.flags(),
             "inputs": {t.name(): t.as_numpy().astype(str).tolist() for t in r.inputs()}}
            for r in requests
        ]
        with open(self.path, "a") as file:
            print(json.dumps(calls), file=file)
        tensors = [pb_utils.get_input_tensor_by_name(r, "IN").as_numpy() for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", tensor)]) for tensor in tensors]
"""

#: Answers twice, from a thread of its own; fails in the second answer if IN is negative.
DECOUPLED_MODEL = """
import os, threading, time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.path = os.path.join(args["model_repository"], "calls")

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request.get_response_sender(), request)).start()

    def answer(self, sender, request):
        value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value)]))
        time.sleep(0.05)
        with open(self.path, "a") as file:
            print("answered", file=file)
        error = pb_utils.TritonError("too low") if value.min() < 0 else None
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value)], error=error))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def tensor(source: str = "zero", dims: tuple[int, ...] = (2,), datatype: str = "FP32", **more: Any) -> WarmupInputSpec:
    return WarmupInputSpec(**{"name": "IN", "datatype": datatype, "dims": dims, "source": source, **more})


def sample(*inputs: WarmupInputSpec, batch_size: int = 1, count: int = 1, name: str = "s") -> WarmupSpec:
    return WarmupSpec(name=name, batch_size=batch_size, count=count, inputs=inputs)


def spec_of(path: Path, backend: str, *samples: WarmupSpec, **config: Any) -> InstanceSpec:
    overrides = config.pop("overrides", {})
    data_type = config.pop("data_type", "TYPE_FP32")
    full = {
        "backend": backend,
        "input": [{"name": "IN", "data_type": data_type, "dims": [-1]}],
        "output": [{"name": "OUT", "data_type": data_type, "dims": [-1]}],
        **config,
    }
    plain = tuple(msgspec.to_builtins(one) for one in samples)
    return spec_from_config(full, model="m", model_path=str(path), warmup=plain, **overrides)


def python_spec(path: Path, *samples: WarmupSpec, source: str = RECORDING_MODEL, **config: Any) -> InstanceSpec:
    (path / "1").mkdir()
    (path / "1" / "model.py").write_text(source)
    return spec_of(path, "python", *samples, **config)


def calls(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line) for line in (path / "calls").read_text().splitlines()]


def test_samples_run_before_the_model_is_ready_and_are_not_counted(tmp_path: Path) -> None:
    """Spec C-110, C-115: a batch size above 1 makes so many requests of batch 1, in one execution."""
    samples = (
        sample(tensor(), batch_size=3, count=2, name="three"),
        sample(tensor(), batch_size=0, name="none"),
        sample(tensor(dims=(1,)), name="one"),
    )
    with WorkerHarness(python_spec(tmp_path, *samples, max_batch_size=4), load=False) as worker:
        loaded = worker.load()
        assert loaded.warmup_ns > 0
        found = calls(tmp_path)
        assert [[call["id"] for call in execution] for execution in found] == [["three"] * 3, ["three"] * 3, ["one"]]
        assert found[0][0]["inputs"] == {"IN": [["0.0", "0.0"]]}
        assert found[2][0]["inputs"] == {"IN": [["0.0"]]}
        assert not any(worker.counters)
        [response] = worker.infer({"IN": np.array([[5]], np.float32)})
        assert response.outputs["OUT"].tolist() == [[5]]
        assert worker.counter(InstanceCounter.SUCCESS) == 1


def test_model_without_samples_reports_no_warmup(tmp_path: Path) -> None:
    with WorkerHarness(python_spec(tmp_path), load=False) as worker:
        assert worker.load().warmup_ns == 0


@pytest.mark.parametrize("source", ["zero", "random"])
def test_strings_are_empty(tmp_path: Path, source: str) -> None:
    """Spec C-113."""
    spec = python_spec(tmp_path, sample(tensor(source, datatype="BYTES")), data_type="TYPE_STRING")
    with WorkerHarness(spec):
        assert calls(tmp_path)[0][0]["inputs"] == {"IN": ["", ""]}


def test_data_come_from_a_file(tmp_path: Path) -> None:
    """Spec C-111."""
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "raw").write_bytes(np.array([1, 2], np.float32).tobytes())
    with WorkerHarness(python_spec(tmp_path, sample(tensor("file", filename="raw")))):
        assert calls(tmp_path)[0][0]["inputs"] == {"IN": ["1.0", "2.0"]}


def test_decoupled_model_has_answered_before_it_is_ready(tmp_path: Path) -> None:
    decoupled = {"model_transaction_policy": {"decoupled": True}}
    spec = python_spec(tmp_path, sample(tensor(), count=2), source=DECOUPLED_MODEL, **decoupled)
    with WorkerHarness(spec):
        assert (tmp_path / "calls").read_text() == "answered\n" * 2


def test_error_among_the_answers_of_a_decoupled_model_fails_the_load(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "raw").write_bytes(np.array([-1, 2], np.float32).tobytes())
    decoupled = {"model_transaction_policy": {"decoupled": True}}
    given = tensor("file", filename="raw")
    spec = python_spec(tmp_path, sample(given), source=DECOUPLED_MODEL, **decoupled)
    with pytest.raises(ServingError, match=r"^failed to run warmup sample 's': too low; $"), WorkerHarness(spec):
        pass


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dims", [[-1], [2]], ids=["varying", "fixed"])
def test_models_of_arrays_are_run(tmp_path: Path, dims: list[int], batch_size: int) -> None:
    """A fixed shape takes the way of bound tensors, several requests are joined."""
    tensors = {
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": dims}],
        "output": [{"name": "OUT", "data_type": "TYPE_FP32", "dims": dims}],
    }
    samples = (sample(tensor("random"), batch_size=batch_size, count=3),)
    with WorkerHarness(spec_of(tmp_path, "forebay_fault", *samples, max_batch_size=4, **tensors)) as worker:
        assert not any(worker.counters)
        [response] = worker.infer({"IN": np.array([[1, 2]], np.float32)})
        assert response.outputs["OUT"].tolist() == [[1, 2]]
    faulty = {"parameters": {"fault": {"string_value": "error"}}}
    spec = spec_of(tmp_path, "forebay_fault", *samples, max_batch_size=4, **tensors, **faulty)
    with (
        pytest.raises(ServingError, match=r"^failed to run warmup sample 's': injected failure; $"),
        WorkerHarness(spec),
    ):
        pass


UNKNOWN = "[request id: <id_unknown>] "


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            tensor("file", filename="raw"),
            f"{UNKNOWN}warmup setting expects 8 bytes, but the data provided from raw is 3 bytes",
        ),
        (
            tensor("file", filename="absent"),
            "failed to open text file for read m/warmup/absent: No such file or directory",
        ),
        (
            tensor("file", filename="../config.pbtxt"),
            "invalid file name '../config.pbtxt', it must not contain path traversal characters",
        ),
        (
            tensor(dims=(-1,)),
            "warmup setting expects all variable-size dimensions are specified for input 'IN'",
        ),
        (tensor(datatype="INT8"), f"{UNKNOWN}inference input 'IN' data-type is 'INT8', but model 'm' expects 'FP32'"),
        (
            tensor(dims=(2, 2)),
            f"{UNKNOWN}unexpected shape for input 'IN' for model 'm'. Expected [-1, -1], got [1, 2, 2]",
        ),
        (tensor(name="X"), f"{UNKNOWN}unexpected inference input 'X' for model 'm'"),
    ],
)
def test_sample_that_does_not_fit_fails_the_load(tmp_path: Path, given: WarmupInputSpec, text: str) -> None:
    """Spec C-111, C-112, C-114."""
    path = tmp_path / "m"
    (path / "warmup").mkdir(parents=True)
    (path / "warmup" / "raw").write_bytes(b"abc")
    spec = spec_of(path, "forebay_fault", sample(given, name="wrong"), max_batch_size=4)
    with pytest.raises(ServingError) as raised, WorkerHarness(spec):
        pass
    assert raised.value.text == text


def test_sample_without_a_required_input_fails_the_load(tmp_path: Path) -> None:
    with (
        pytest.raises(ServingError, match="expected 1 inputs but got 0 inputs for model 'm'"),
        WorkerHarness(spec_of(tmp_path, "forebay_fault", sample())),
    ):
        pass


# --- sequence models (spec C-116) ---

CONTROLS = (
    ControlSpec(name="START", kind="START", datatype="INT32", false_value=0, true_value=1),
    ControlSpec(name="END", kind="END", datatype="FP32", false_value=0, true_value=2),
    ControlSpec(name="READY", kind="READY", datatype="BOOL", false_value=0, true_value=1),
    ControlSpec(name="CORRID", kind="CORRID", datatype="UINT64"),
)


def test_sequence_model_gets_sequences_of_one_request(tmp_path: Path) -> None:
    """What a sample lists itself stays as it is."""
    start = WarmupInputSpec(name="START", datatype="INT32", dims=(1,), source="zero")
    samples = (sample(tensor(), batch_size=2), sample(tensor(), start))
    extra = {"sequence": msgspec.to_builtins(SequenceBatchingSpec(controls=CONTROLS))}
    with WorkerHarness(python_spec(tmp_path, *samples, max_batch_size=2, overrides={"extra": extra})):
        [first, second], [third] = calls(tmp_path)
    full = {"IN": [["0.0", "0.0"]], "START": [["1"]], "END": [["2.0"]], "READY": [["True"]], "CORRID": [["1"]]}
    assert first["inputs"] == full
    assert second["inputs"] == {**full, "CORRID": [["2"]]}
    assert third["inputs"] == {**full, "START": [["0"]]}
    assert (first["corrid"], second["corrid"]) == (1, 2)


def test_sequence_model_of_arrays_gets_controls_and_initial_states(tmp_path: Path) -> None:
    """The fault backend answers its n-th output with its n-th input, so the checks of outputs look at each of them."""
    state = StateSpec(input_name="STATE", output_name="OUT", datatype="FP32", dims=(2,))
    policy = SequenceBatchingSpec(controls=CONTROLS[:1], states=(state,))
    tensors = {
        "input": [{"name": "IN", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [
            {"name": "FIRST", "data_type": "TYPE_FP32", "dims": [-1]},
            {"name": "SECOND", "data_type": "TYPE_INT32", "dims": [1]},
            {"name": "OUT", "data_type": "TYPE_FP32", "dims": [2]},
        ],
    }
    overrides = {"extra": {"sequence": msgspec.to_builtins(policy)}}
    samples = (sample(tensor(dims=(3,)), batch_size=2),)
    with WorkerHarness(spec_of(tmp_path, "forebay_fault", *samples, max_batch_size=2, overrides=overrides, **tensors)):
        pass


# --- data ---


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("FP16", np.float16), ("FP32", np.float32), ("FP64", np.float64), ("BOOL", np.uint8)]
)
def test_random_data_are_numbers_that_models_can_take(datatype: str, dtype: type[np.generic]) -> None:
    data = tensor_bytes(tensor("random", (100,), datatype), "/nowhere")
    assert data is not None
    values = np.frombuffer(data, dtype)
    assert values.shape == (100,)
    assert values.min() >= 0
    assert values.max() <= 1
    assert len(set(values.tolist())) > 1


def test_random_data_have_the_bytes_of_their_shape_and_are_the_same_each_time() -> None:
    for datatype, size in (("INT64", 48), ("UINT8", 6), ("BF16", 12)):
        data = tensor_bytes(tensor("random", (2, 3), datatype), "/nowhere")
        assert data is not None
        assert len(data) == size
        assert data == tensor_bytes(tensor("random", (2, 3), datatype), "/nowhere")


def test_zero_data_are_not_written_out() -> None:
    assert tensor_bytes(tensor(dims=(1000,)), "/nowhere") is None


def test_arrays_have_the_dims_of_the_sample() -> None:
    """Spec C-113: strings are empty."""
    assert tensor_array(tensor("zero", (2, 1), "BYTES"), "/nowhere").tolist() == [[b""], [b""]]
    assert tensor_array(tensor("zero", (2,), "INT16"), "/nowhere").tolist() == [0, 0]
    values = tensor_array(tensor("random", (2, 3), "FP32"), "/nowhere")
    assert values.tobytes() == tensor_bytes(tensor("random", (2, 3), "FP32"), "/nowhere")
    assert (values.shape, values.dtype) == ((2, 3), np.float32)


def test_tensor_may_not_be_of_any_size() -> None:
    with pytest.raises(InvalidArgument, match=f"at most {TENSOR_BYTES_MAX} are possible"):
        tensor_bytes(tensor(dims=(1 << 40,)), "/nowhere")


def test_string_file_must_have_the_elements_of_its_shape(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "raw").write_bytes(b"\1\0\0\0a")
    given = tensor("file", (1,), "BYTES", filename="raw")
    assert tensor_bytes(given, str(tmp_path)) == b"\1\0\0\0a"
    with pytest.raises(InvalidArgument, match="expected 2 string elements, got 1"):
        tensor_bytes(msgspec.structs.replace(given, dims=(2,)), str(tmp_path))


def test_file_may_not_be_a_link_out_of_the_repository(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "m" / "warmup"
    directory.mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(8))
    (directory / "raw").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidArgument, match="symbolic link out of the model repository"):
        tensor_bytes(tensor("file", filename="raw"), str(tmp_path / "models" / "m"))
    with pytest.raises(Internal):
        tensor_bytes(tensor("file", filename="other"), str(tmp_path / "models" / "m"))
