"""Which requests outside slabs a worker copies together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Array, Arrays, TensorInstance
from forebay.engine.worker.places import Producers
from forebay.engine.worker.promised_outputs import PromisedOutputs
from forebay.engine.worker.tensor_parcels import JOINED_BYTES_MAX, TensorParcels
from forebay.ipc.counters import instance_words
from forebay.ipc.tensor import TensorSpec
from forebay.ipc.worker_messages import InstanceSpec


class Doubler(TensorInstance):
    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        return {"y": inputs["x"] * np.float32(2)}


def test_large_requests_are_not_copied_together_on_a_cpu() -> None:
    """Joining tensors of megabytes costs more than a further call of the framework."""
    spec = InstanceSpec(
        model="m", version=1, route=1, instance=1, instance_name="m_0", backend="b", model_path="", version_path="",
        model_file="", max_batch_size=8, inputs=(TensorSpec("x", "FP32", (-1,)),),
        outputs=(TensorSpec("y", "FP32", (-1,)),),
    )  # fmt: skip
    counters = memoryview(bytearray(8 * instance_words(8))).cast("Q")
    runner = TensorParcels(spec, Doubler(), Producers(), PromisedOutputs(spec), counters)
    small = {"x": np.zeros((1, 100), np.float32)}
    large = {"x": np.zeros((1, JOINED_BYTES_MAX), np.float32)}
    assert runner.is_worth_joining([small, small])
    assert not runner.is_worth_joining([large, large])
