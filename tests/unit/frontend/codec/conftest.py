"""Signatures that the codec's tests ask."""

import pytest

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec


@pytest.fixture
def model():
    """Return a maker of entries: ``model("m", [("FP32", (-1,))])`` has IN0 and OUT0 of that kind."""

    def make(name, tensors, max_batch_size=0, *, optional_from=99, labels=("cat", "dog")):
        return ModelEntry(
            name=name,
            version=1,
            state="READY",
            max_batch_size=max_batch_size,
            inputs=tuple(
                TensorSpec(f"IN{index}", datatype, dims, optional=index >= optional_from)
                for index, (datatype, dims) in enumerate(tensors)
            ),
            outputs=tuple(
                TensorSpec(f"OUT{index}", datatype, dims, labels=labels)
                for index, (datatype, dims) in enumerate(tensors)
            ),
        )

    return make
