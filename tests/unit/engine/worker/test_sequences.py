"""Control tensors and initial states of sequence models (spec S-061, S-062, S-081). Batches: test_scheduling.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from forebay.engine.repository.model_spec import ControlSpec, SequenceBatchingSpec, StateSpec
from forebay.engine.worker.sequences import (
    SequenceControls,
    control_value,
    initial_state,
    sequence_policy,
    with_sequence_tensors,
)
from forebay.ipc.errors import Internal, InvalidArgument
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

RUNNING = SequenceControls(is_start=True, is_end=False, is_ready=True, correlation_id=7)
IDLE = SequenceControls(is_start=False, is_end=False, is_ready=False, correlation_id=0)


@pytest.mark.parametrize(
    ("kind", "datatype", "values", "running", "idle"),
    [
        ("START", "INT32", (5, 9), 9, 5),
        ("END", "FP32", (0.0, 0.5), 0.0, 0.0),
        ("READY", "BOOL", (0, 1), True, False),
    ],
)
def test_flags_have_the_configured_values(
    kind: str, datatype: str, values: tuple[float, float], running: object, idle: object
) -> None:
    """Spec S-061."""
    control = ControlSpec(name="C", kind=kind, datatype=datatype, false_value=values[0], true_value=values[1])
    for controls, expected in ((RUNNING, running), (IDLE, idle)):
        value = control_value(control, controls)
        assert value.shape == (1,)
        assert value.dtype == {"INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}[datatype]
        assert value[0] == expected


@pytest.mark.parametrize("datatype", ["UINT64", "INT64", "UINT32", "INT32"])
def test_numeric_ids_come_in_every_datatype(datatype: str) -> None:
    """Spec S-062."""
    value = control_value(ControlSpec(name="C", kind="CORRID", datatype=datatype), RUNNING)
    assert value.tolist() == [7]
    assert value.dtype == np.dtype(datatype.lower())


def test_largest_id_keeps_its_bits() -> None:
    controls = RUNNING._replace(correlation_id=2**64 - 1)
    assert control_value(ControlSpec(name="C", kind="CORRID", datatype="UINT64"), controls).tolist() == [2**64 - 1]
    assert control_value(ControlSpec(name="C", kind="CORRID", datatype="INT32"), controls).tolist() == [-1]


def test_ids_as_text() -> None:
    control = ControlSpec(name="C", kind="CORRID", datatype="BYTES")
    assert control_value(control, RUNNING).tolist() == [b"7"]
    assert control_value(control, RUNNING._replace(correlation_id="é")).tolist() == ["é".encode()]
    assert control_value(control, IDLE).tolist() == [b""]


def test_a_string_is_no_number() -> None:
    """Spec S-059."""
    with pytest.raises(InvalidArgument, match="correlation ID in request is not an unsigned int"):
        control_value(ControlSpec(name="C", kind="CORRID", datatype="UINT64"), RUNNING._replace(correlation_id="seven"))


def state(**fields: Any) -> StateSpec:
    defaults: dict[str, Any] = {"input_name": "S", "output_name": "T", "datatype": "FP32", "dims": (2, -1)}
    return StateSpec(**{**defaults, **fields})


def test_states_start_as_zeros_with_1_for_sizes_that_vary(tmp_path: Path) -> None:
    """Spec S-081."""
    value = initial_state(state(), str(tmp_path))
    assert (value.shape, value.dtype, value.any()) == ((2, 1), np.float32, False)
    assert initial_state(state(datatype="BYTES", dims=(2,)), str(tmp_path)).tolist() == [b"", b""]
    assert initial_state(state(initial_dims=(2, 3)), str(tmp_path)).shape == (2, 3)


def test_states_start_as_their_file_says(tmp_path: Path) -> None:
    """Spec S-081."""
    (tmp_path / "initial_state").mkdir()
    (tmp_path / "initial_state" / "f").write_bytes(np.float32([3, 4]).tobytes())
    given = state(dims=(2,), initial_dims=(2,), initial_file="f")
    assert initial_state(given, str(tmp_path)).tolist() == [3, 4]
    with pytest.raises(InvalidArgument, match="has 8 bytes, expected 12"):
        initial_state(state(dims=(3,), initial_dims=(3,), initial_file="f"), str(tmp_path))
    with pytest.raises(
        Internal, match=r"^failed to open text file for read .*/initial_state/g: No such file or directory$"
    ):
        initial_state(state(initial_file="g"), str(tmp_path))


def test_states_lie_beside_their_model_and_have_a_limit(tmp_path: Path) -> None:
    model = tmp_path / "models" / "m"
    (model / "initial_state").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(8))
    (model / "initial_state" / "f").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidArgument, match="out of the model repository"):
        initial_state(state(dims=(2,), initial_dims=(2,), initial_file="f"), str(model))
    for datatype in ("FP32", "BYTES"):
        with pytest.raises(InvalidArgument, match="is too large"):
            initial_state(state(datatype=datatype, initial_dims=(1 << 20, 1 << 20)), str(model))


def instance(backend: str, policy: SequenceBatchingSpec | None) -> InstanceSpec:
    return InstanceSpec(
        model="m", version=1, route=1, instance=1, instance_name="m_0", backend=backend, model_path="", version_path="",
        model_file="", inputs=(TensorSpec("X", "FP32", (1,)),), outputs=(TensorSpec("T", "FP32", (2, -1)),),
        extra={"sequence": msgspec.to_builtins(policy)} if policy is not None else {},
    )  # fmt: skip


def test_array_backends_are_told_of_controls_and_states() -> None:
    """Spec S-063, S-083: clients are not; a state may be an output too."""
    policy = SequenceBatchingSpec(controls=(ControlSpec(name="C", kind="START", datatype="INT32"),), states=(state(),))
    told = with_sequence_tensors(instance("onnxruntime", policy))
    assert [tensor.name for tensor in told.inputs] == ["X", "C", "S"]
    assert [tensor.name for tensor in told.outputs] == ["T"]
    for spec in (instance("python", policy), instance("onnxruntime", None)):
        assert with_sequence_tensors(spec) is spec
    assert sequence_policy(instance("python", policy)) == policy
