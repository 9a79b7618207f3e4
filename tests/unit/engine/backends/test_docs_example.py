"""The example in docs/backends.md is a backend that works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_harness import spec_from_config

from forebay.engine.backends.base import Backend, DescribedTensor, TensorInstance
from forebay.ipc.errors import InvalidArgument, NotFound

DOCS = Path(__file__).parents[4] / "docs" / "backends.md"


@pytest.fixture(name="backend")
def load_example(tmp_path: Path) -> Backend:
    found = re.search(r'```python\n(""".*?)```', DOCS.read_text(), re.DOTALL)
    assert found is not None
    source = found.group(1)
    assert len(source.splitlines()) < 60
    file = tmp_path / "numpy_linear_backend.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("numpy_linear_backend", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend: Backend = module.BACKEND()
    return backend


def test_example_describes_loads_and_runs(tmp_path: Path, backend: Backend) -> None:
    spec = spec_from_config({"backend": "numpy_linear", "max_batch_size": 8}, model="m", model_path=str(tmp_path))
    with pytest.raises(NotFound, match=r"^unable to find '1/model.npz' for model instance 'm_0_0'$"):
        backend.load(spec)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.npz").write_bytes(b"nonsense")
    with pytest.raises(InvalidArgument, match=r"^model 'm': '1/model.npz' is no linear model: "):
        backend.load(spec)
    np.savez(tmp_path / "1" / "model.npz", weights=np.array([[2.0], [3.0]]), bias=np.array([1.0]))
    described = backend.describe(spec)
    assert described.inputs == (DescribedTensor("INPUT0", "TYPE_FP32", (-1, 2)),)
    instance = backend.load(spec)
    assert isinstance(instance, TensorInstance)
    outputs = np.zeros((2, 1), np.float32)
    instance.bind({"INPUT0": np.array([[1, 1], [0, 2]], np.float32)}, {"OUTPUT0": outputs})()
    assert outputs.tolist() == [[6], [7]]
