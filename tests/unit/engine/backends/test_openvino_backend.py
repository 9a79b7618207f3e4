"""The OpenVINO backend, in this process. Skipped without the library."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from forebay.engine.backends.base import TensorInstance
from forebay.engine.backends.openvino_backend import OpenvinoBackend
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec

openvino: Any = pytest.importorskip("openvino")


def load(path: pathlib.Path, rows: int, parameters: dict[str, str] | None = None) -> TensorInstance:
    """Load a model that doubles float32 X [``rows``, 2] into Y; -1: any number of rows, up to 4."""
    from openvino import opset13 as operations

    source = operations.parameter([rows, 2], np.float32, name="X")
    source.output(0).get_tensor().set_names({"X"})
    doubled = operations.multiply(source, operations.constant(np.float32(2)))
    doubled.output(0).get_tensor().set_names({"Y"})
    openvino.save_model(openvino.Model([operations.result(doubled)], [source], "m"), path / "model.xml")
    spec = InstanceSpec(
        model="m",
        version=1,
        route=1,
        instance=1,
        instance_name="m_0",
        backend="openvino",
        model_path=str(path.parent),
        version_path=str(path),
        model_file="model.xml",
        kind="CPU",
        max_batch_size=4,
        inputs=(TensorSpec(name="X", datatype="FP32", dims=(2,)),),
        outputs=(TensorSpec(name="Y", datatype="FP32", dims=(2,)),),
        parameters=parameters or {},
    )
    return OpenvinoBackend().load(spec)


def rows_of(value: float, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full((count, 2), value, np.float32)


@pytest.mark.parametrize("count", [3, 2, 4])
def test_a_run_writes_nothing_to_rows_that_were_bound_before(tmp_path: pathlib.Path, count: int) -> None:
    instance = load(tmp_path, -1)
    output = rows_of(0, 3)
    bound = instance.bind({"X": rows_of(1, 3)}, {"Y": output})
    bound()
    np.testing.assert_array_equal(instance.run({"X": rows_of(5, count)}, ["Y"])["Y"], rows_of(10, count))
    np.testing.assert_array_equal(output, rows_of(2, 3))


def test_a_padded_batch_writes_nothing_to_the_rows_of_a_full_one(tmp_path: pathlib.Path) -> None:
    instance = load(tmp_path, 4, {"ENABLE_BATCH_PADDING": "YES"})
    full, part = rows_of(0, 4), rows_of(0, 1)
    instance.bind({"X": rows_of(1, 4)}, {"Y": full})()
    instance.bind({"X": rows_of(5, 1)}, {"Y": part})()
    np.testing.assert_array_equal(full, rows_of(2, 4))
    np.testing.assert_array_equal(part, rows_of(10, 1))
